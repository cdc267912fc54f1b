#include <fmt/format.h>

#include "contract/corner_list.hpp"

namespace deep_ep::test {
namespace {

using verify::Hooks;
using verify::LowLatencyCase;
using verify::LowLatencyPayload;
using verify::Routing;

LowLatencyCase small(int ranks, int topk = 4) {
  LowLatencyCase c;
  c.ranks = ranks;
  c.experts = ranks * 8;
  c.topk = topk;
  return c;
}

// On GPUs tokens of eight experts have kernels of their own.
constexpr int kTopks[] = {4, 8};

void add_shapes(CornerList& list) {
  for (int ranks = 1; ranks <= 8; ++ranks) {
    list.add(fmt::format("ranks_{}", ranks), {small(ranks)});
    LowLatencyCase c = small(ranks);
    c.rank_major = true;
    list.add(fmt::format("ranks_{}_rank_major", ranks), {c});
  }
  LowLatencyCase c = small(4);
  c.tokens = {128};
  c.hidden = 7168;
  c.topk = 8;
  c.experts = 256;
  list.add("deepseek_fp8", {c});
  c.payload = LowLatencyPayload::kBfloat16;
  c.hooks = Hooks::kEach;
  list.add("deepseek_bf16_hooks", {c});
  c.payload = LowLatencyPayload::kScaledFp8;
  c.rank_major = true;
  list.add("deepseek_rank_major_given_fp8", {c});
  c = small(4);
  c.tokens = {1};
  c.max_tokens = 256;
  list.add("one_token_of_256", {c});
  c.max_tokens = 1;
  list.add("capacity_1", {c});
  c.rank_major = true;
  list.add("capacity_1_rank_major", {c});
  c = small(3);
  c.payload = LowLatencyPayload::kBfloat16;
  c.hidden = 8;
  c.tokens = {64};
  list.add("shortest_rows", {c});
  c = small(2);
  c.payload = LowLatencyPayload::kBytes;
  c.hidden = 16;
  list.add("shortest_rows_of_bytes", {c});
  c = small(2);
  c.hidden = 16384;
  list.add("longest_rows", {c});
  c.payload = LowLatencyPayload::kFloat32;
  list.add("longest_rows_fp32", {c});
  for (const int topk : {9, 10, 32, 40}) {
    c = small(5);
    c.experts = 40;
    c.topk = topk;
    list.add(fmt::format("topk_{}", topk), {c});
  }
}

/// Rows that come home in other formats, next to calls of the others.
void add_wires(CornerList& list) {
  for (const plan::WireFormat wire : {plan::WireFormat::kLogFmt, plan::WireFormat::kFp8}) {
    const auto add = [&](const std::string& name, LowLatencyCase c) {
      for (const bool rank_major : {false, true}) {
        c.rank_major = rank_major;
        c.wire = wire;
        LowLatencyCase plain = c;
        plain.wire = plan::WireFormat::kBfloat16;
        LowLatencyCase other = c;
        other.wire =
            wire == plan::WireFormat::kFp8 ? plan::WireFormat::kLogFmt : plan::WireFormat::kFp8;
        list.add(fmt::format("home_in_{}_{}{}", verify::to_string(wire), name,
                             rank_major ? "_rank_major" : ""),
                 {c, plain, c, other});
      }
    };
    for (const int ranks : {1, 2, 3, 8}) add(fmt::format("ranks_{}", ranks), small(ranks));
    LowLatencyCase c = small(4);
    c.hidden = 128;
    add("shortest_rows", c);
    c.hidden = 16384;
    c.topk = 8;
    add("longest_rows", c);
    c = small(4);
    c.tokens = {1};
    c.max_tokens = 128;
    c.hidden = 7168;
    c.hooks = Hooks::kEach;
    add("one_token_hooks", c);
    c = small(2);
    c.topk = 1;
    c.tokens = {70};  // more than travel in packets on GPUs
    c.hidden = 16384;
    c.hooks = Hooks::kTwoByRank;
    add("many_bytes_hooks", c);
    c = small(4);
    c.routing = Routing::kDuplicates;
    c.zero_copy = c.own_outputs = c.clone_handle = true;
    add("duplicates_views", c);
    c = small(4);
    c.masked = 2;
    add("masked_rank", c);
    c = small(2);
    c.async = true;
    c.combines = 8;
    add("async", c);
  }
}

void add_routings(CornerList& list) {
  for (const bool rank_major : {false, true}) {
    const char* suffix = rank_major ? "_rank_major" : "";
    const auto add = [&](const char* name, LowLatencyCase c) {
      c.rank_major = rank_major;
      list.add(fmt::format("{}{}", name, suffix), {c});
    };
    LowLatencyCase c = small(4);
    c.routing = Routing::kDuplicates;
    c.topk = 8;
    add("duplicates", c);
    c.experts = 4;  // one a rank: all entries of a rank are one expert
    c.topk = 12;
    add("more_topk_than_experts", c);
    c = small(4);
    c.routing = Routing::kHoles;
    add("holes", c);
    c.routing = Routing::kNone;
    add("nothing_is_sent", c);
    c = small(8);
    c.tokens = {64};
    c.routing = Routing::kToRankZero;
    add("all_tokens_to_one_rank", c);
    c.routing = Routing::kZipf;
    add("skew", c);
    c = small(4);
    c.tokens = {0};
    add("no_tokens_anywhere", c);
    c.tokens = {0, 0, 33, 0};
    add("one_rank_has_tokens", c);
    c.tokens = {1, 100, 0, 7};
    add("very_ragged", c);
    c = small(4);
    c.routing = Routing::kToSelf;
    add("nothing_leaves_its_rank", c);
  }
}

/// Both sides of what GPUs decide by: 64 tokens of this rank for a kernel's form, 32 for who sums,
/// how many groups of values a row has for who sends it. Ranks need not decide alike.
void add_few_tokens(CornerList& list) {
  for (const bool rank_major : {false, true}) {
    const auto add = [&](const char* name, std::vector<LowLatencyCase> cases) {
      for (LowLatencyCase& c : cases) c.rank_major = rank_major;
      list.add(fmt::format("{}{}", name, rank_major ? "_rank_major" : ""), std::move(cases));
    };
    std::vector<LowLatencyCase> cases;
    const std::vector<std::int64_t> counts[] = {{64}, {65}, {64, 65, 0, 1}, {33, 32, 31, 0}};
    for (const std::vector<std::int64_t>& tokens : counts) {
      LowLatencyCase c = small(4, 8);
      c.tokens = tokens;
      c.max_tokens = 65;
      c.topk_dtype = cases.size() % 2 == 0 ? DType::kInt64 : DType::kInt32;
      c.dispatches = 2;
      cases.push_back(c);
    }
    add("around_few_tokens", cases);
    LowLatencyCase c = small(4, 8);
    c.tokens = {1, 1, 300, 0};
    c.max_tokens = 300;
    c.hidden = 16384;
    add("few_tokens_beside_many", {c});
    cases.clear();
    for (const std::int64_t hidden : {8, 24}) {
      c = small(2, 8);
      c.tokens = {3};
      c.payload = LowLatencyPayload::kBfloat16;
      c.hidden = hidden;
      cases.push_back(c);
    }
    for (const std::int64_t hidden : {128, 384}) {
      for (const LowLatencyPayload payload :
           {LowLatencyPayload::kFp8, LowLatencyPayload::kFp8Ue8m0, LowLatencyPayload::kScaledFp8,
            LowLatencyPayload::kScaledPacked}) {
        c = small(2, 8);
        c.tokens = {16, 5};
        c.payload = payload;
        c.hidden = hidden;
        cases.push_back(c);
      }
    }
    add("few_tokens_of_short_rows", cases);
  }
}

void add_reuse(CornerList& list) {
  for (const Hooks hooks : {Hooks::kEach, Hooks::kTwoInOrder, Hooks::kTwoReversed,
                            Hooks::kTwoByRank, Hooks::kCrossed}) {
    for (const int topk : kTopks) {
      for (const bool rank_major : {false, true}) {
        LowLatencyCase c = small(4, topk);
        c.rank_major = rank_major;
        c.hooks = hooks;
        c.dispatches = 6;
        c.combines = 9;
        c.stats = true;
        const std::string name = fmt::format("hooks_{}_topk_{}{}", verify::to_string(hooks), topk,
                                             rank_major ? "_rank_major" : "");
        list.add(name, {c});
        c.zero_copy = c.own_outputs = c.clone_handle = true;
        list.add(name + "_views", {c});
      }
    }
  }
  LowLatencyCase c = small(3);
  c.dispatches = 8;
  c.combines = 24;
  c.clone_handle = true;
  list.add("cloned_handles_combined_in_any_order", {c});
  c.async = true;
  list.add("async_chain", {c});
  c = small(2);
  c.combines = 60;
  c.zero_copy = true;
  list.add("combined_60_times_zero_copy", {c});
}

/// Neighbouring calls differ in everything, so that what one leaves behind meets the next.
std::vector<LowLatencyCase> alternating(int ranks) {
  LowLatencyCase wide = small(ranks);
  wide.hidden = 8192;
  wide.tokens = {97};
  wide.payload = LowLatencyPayload::kBfloat16;
  LowLatencyCase narrow = small(ranks);
  narrow.hidden = 16;
  narrow.payload = LowLatencyPayload::kBytes;
  narrow.topk = 1;
  LowLatencyCase scaled = small(ranks);
  scaled.payload = LowLatencyPayload::kScaledPacked;
  scaled.tokens = {5};
  scaled.rank_major = true;
  scaled.hooks = Hooks::kTwoByRank;
  LowLatencyCase empty = small(ranks);
  empty.tokens = {0};
  LowLatencyCase few = small(ranks);
  few.tokens = {1};
  few.max_tokens = 256;
  few.topk = 16;
  few.topk_dtype = DType::kInt32;
  std::vector<LowLatencyCase> cases;
  for (std::uint64_t round = 0; round < 4; ++round) {
    for (LowLatencyCase c : {wide, narrow, scaled, empty, few}) {
      c.seed = round * 10 + cases.size();
      c.dispatches = 1 + static_cast<int>(round);  // so that parities meet differently
      c.combines = 2;
      cases.push_back(c);
    }
  }
  return cases;
}

void add_orders(CornerList& list) {
  for (int ranks : {2, 4, 8})
    list.add(fmt::format("alternating_shapes_{}", ranks), alternating(ranks));
  LowLatencyCase growing = small(4);
  std::vector<LowLatencyCase> cases;
  for (std::int64_t tokens : {1, 8, 64, 128, 3}) {
    growing.tokens = {tokens};
    growing.max_tokens = 128;
    growing.hidden = 4096;
    cases.push_back(growing);
  }
  list.add("token_counts_change", cases);
}

/// Calls on both sides of every place where a ticket, or what is made of it, wraps.
void add_wraps(CornerList& list) {
  constexpr std::int64_t kTag = (std::int64_t{1} << 31) - 1;  // tags repeat from here on
  const std::pair<const char*, std::int64_t> wraps[] = {
      {"16_bits", std::int64_t{1} << 16}, {"scrubbing", std::int64_t{1} << 17},
      {"31_bits", std::int64_t{1} << 31}, {"tags", kTag},
      {"tags_again", 2 * kTag},           {"32_bits", std::int64_t{1} << 32},
      {"33_bits", std::int64_t{1} << 33},
  };
  for (const auto& [name, at] : wraps) {
    for (const int topk : kTopks) {
      LowLatencyCase c = small(4, topk);
      c.dispatches = 9;
      c.combines = 9;
      LowLatencyCase other = small(4, topk);
      other.hooks = Hooks::kTwoReversed;
      other.rank_major = true;
      other.dispatches = 4;
      list.add(fmt::format("tickets_wrap_at_{}_topk_{}", name, topk), {c, other}, at - 5);
    }
  }
}

void add_masks(CornerList& list) {
  for (const int topk : kTopks) {
    for (const bool rank_major : {false, true}) {
      for (const int masked : {0, 2}) {
        LowLatencyCase c = small(4, topk);
        c.rank_major = rank_major;
        c.masked = masked;
        c.dispatches = 5;
        c.combines = 5;
        c.hooks = masked == 0 ? Hooks::kNone : Hooks::kTwoByRank;
        list.add(
            fmt::format("masked_rank_{}_topk_{}{}", masked, topk, rank_major ? "_rank_major" : ""),
            {c});
      }
    }
  }
}

}  // namespace

std::vector<Program> low_latency_corner_programs(const Limits& limits) {
  CornerList list(limits);
  add_shapes(list);
  add_wires(list);
  add_routings(list);
  add_few_tokens(list);
  add_reuse(list);
  add_orders(list);
  add_wraps(list);
  add_masks(list);
  return list.take();
}

}  // namespace deep_ep::test
