#include <fmt/format.h>

#include "contract/corner_list.hpp"

namespace deep_ep::test {
namespace {

using verify::Case;
using verify::Routing;
using verify::Scales;

Case small(int ranks) {
  Case c;
  c.ranks = ranks;
  c.experts = ranks * 8;
  c.topk = 4;
  return c;
}

Case large(int ranks) {
  Case c = small(ranks);
  c.tokens = {4096};
  c.hidden = 7168;
  c.topk = 8;
  return c;
}

void add_shapes(CornerList& list) {
  for (int ranks = 1; ranks <= 8; ++ranks) list.add(fmt::format("ranks_{}", ranks), {small(ranks)});

  Case c = large(4);
  c.experts = 256;
  list.add("deepseek_bf16", {c});
  c.dtype = DType::kFloat8E4m3;
  c.scales = Scales::kFloat32ColumnMajor;
  list.add("deepseek_fp8", {c});

  c = small(2);
  c.hidden = 16384;
  c.dtype = c.combine_dtype = DType::kFloat32;
  c.tokens = {4096};
  list.add("longest_rows", {c});

  c = small(3);
  c.dtype = DType::kUint8;
  c.hidden = 16;
  c.tokens = {4096};
  list.add("shortest_rows", {c});

  c = small(2);
  c.experts = 2 * 4096;
  list.add("most_local_experts", {c});

  c = small(5);
  c.experts = c.topk = 40;
  list.add("topk_is_all_experts", {c});
}

void add_routings(CornerList& list) {
  Case c = large(8);
  c.routing = Routing::kToRankZero;
  list.add("all_tokens_to_one_rank", {c});
  c = large(4);
  c.routing = Routing::kAllToAll;
  list.add("every_token_to_every_rank", {c});
  c = large(4);
  c.routing = Routing::kToSelf;
  list.add("nothing_leaves_its_rank", {c});

  c = small(4);
  c.routing = Routing::kNone;
  list.add("nothing_is_sent", {c});
  c.num_worst_tokens = Case::kWorstFits;
  list.add("nothing_is_sent_worst_case", {c});
  c = small(4);
  c.tokens = {0};
  list.add("no_tokens_anywhere", {c});
  c = small(4);
  c.tokens = {0, 0, 33, 0};
  list.add("one_rank_has_tokens", {c});
  c = small(3);
  c.tokens = {1, 4096, 0};
  list.add("very_ragged", {c});
  c = small(2);
  c.routing = Routing::kToRankZero;
  c.topk = 9;
  c.experts = 4;
  list.add("more_topk_than_local_experts", {c});
}

void add_reuse(CornerList& list) {
  Case c = small(4);
  c.cached_repeats = 50;
  list.add("handle_reused_50_times", {c});
  c.cached_repeats = 8;
  c.hold_results = true;
  c.clone_handle = true;
  list.add("cloned_handle_results_held", {c});
  c = small(3);
  c.combines = 20;
  c.biases = 2;
  list.add("combined_20_times", {c});
  c = small(4);
  c.async = true;
  c.cached_repeats = c.combines = 6;
  c.hold_results = true;
  list.add("async_chain", {c});
  c = small(2);
  c.config.num_sms = 1;
  c.late_config.num_sms = 24;
  c.cached_repeats = c.combines = 3;
  list.add("handle_used_with_more_sms", {c});
  std::swap(c.config, c.late_config);
  list.add("handle_used_with_fewer_sms", {c});
}

void add_groups(CornerList& list) {
  using verify::Groups;
  using verify::Outputs;
  Case c = large(4);
  c.experts = 64;
  c.expert_alignment = 128;
  c.groups = Groups::kWeighted;
  list.add("grouped_bf16", {c});
  c.dtype = DType::kFloat8E4m3;
  c.scales = Scales::kFloat32ColumnMajor;
  c.prepare = true;
  c.outputs = Outputs::kPrivate;
  list.add("grouped_fp8_prepared", {c});

  c = small(3);
  c.groups = Groups::kWeighted;
  c.topk = 9;
  c.routing = Routing::kDuplicates;
  list.add("grouped_duplicates", {c});
  c.experts = c.topk = 3 * 40;
  c.routing = Routing::kUniform;
  list.add("grouped_all_experts", {c});
  c = small(2);
  c.groups = Groups::kUnweighted;
  c.experts = 2 * 4096;
  list.add("grouped_most_local_experts", {c});
  c = small(2);
  c.groups = Groups::kWeighted;
  c.num_worst_tokens = Case::kWorstFits;
  c.expert_alignment = 16;
  list.add("grouped_worst_case", {c});
  c.outputs = Outputs::kPrivate;
  list.add("grouped_worst_case_as_many_as_given", {c});
  c = small(4);
  c.groups = Groups::kWeighted;
  c.tokens = {0, 0, 33, 0};
  c.routing = Routing::kToRankZero;
  list.add("grouped_empty_ranks", {c});
  c.tokens = {0};
  list.add("grouped_no_tokens", {c});
  c = small(4);
  c.groups = Groups::kWeighted;
  c.async = c.hold_results = c.clone_handle = true;
  c.cached_repeats = c.combines = 3;
  c.outputs = Outputs::kMixed;
  list.add("grouped_async_chain", {c});
}

void add_outputs(CornerList& list) {
  using verify::Outputs;
  for (const auto& [outputs, name] :
       {std::pair{Outputs::kLibrary, "library"}, std::pair{Outputs::kPrivate, "private"},
        std::pair{Outputs::kInResults, "in_results"}, std::pair{Outputs::kMixed, "mixed"}}) {
    Case c = small(4);
    c.outputs = outputs;
    c.dtype = DType::kFloat8E4m3;
    c.scales = Scales::kFloat32;
    c.prepare = true;
    c.cached_repeats = 3;
    list.add(fmt::format("prepared_outputs_{}", name), {c});
    c.prepare = false;
    c.async = true;
    c.num_worst_tokens = Case::kWorstFits;
    list.add(fmt::format("worst_case_outputs_{}", name), {c});
  }
  Case c = large(4);
  c.prepare = true;
  c.outputs = Outputs::kInResults;
  list.add("prepared_deepseek", {c});
}

/// Neighbouring calls differ in everything, so that what one leaves behind meets the next.
std::vector<Case> alternating(int ranks) {
  Case wide = small(ranks);
  wide.hidden = 8192;
  wide.tokens = {97};
  Case narrow = small(ranks);
  narrow.hidden = 16;
  narrow.dtype = DType::kUint8;
  narrow.topk = 1;
  Case scaled = small(ranks);
  scaled.dtype = DType::kFloat8E4m3;
  scaled.scales = Scales::kPackedColumnMajor;
  scaled.tokens = {5};
  scaled.prepare = true;
  scaled.groups = verify::Groups::kUnweighted;
  Case empty = small(ranks);
  empty.tokens = {0};
  Case worst = small(ranks);
  worst.num_worst_tokens = Case::kWorstFits;
  worst.topk_dtype = DType::kInt32;
  worst.groups = verify::Groups::kWeighted;
  worst.outputs = verify::Outputs::kMixed;
  std::vector<Case> cases;
  for (std::uint64_t round = 0; round < 4; ++round) {
    for (Case c : {wide, narrow, scaled, empty, worst}) {
      c.seed = round * 10 + cases.size();
      c.async = round == 2;
      cases.push_back(c);
    }
  }
  return cases;
}

void add_orders(CornerList& list) {
  for (int ranks : {2, 4, 8}) {
    list.add(fmt::format("alternating_shapes_{}", ranks), alternating(ranks));
    list.add(fmt::format("two_buffers_in_turn_{}", ranks), alternating(ranks),
             [](Program& program) {
               for (std::size_t i = 0; i < program.steps.size(); ++i)
                 program.steps[i].buffer = static_cast<int>(i % 2);
             });
  }
  list.add("three_buffers_at_once", alternating(3), [](Program& program) {
    program.concurrent = true;
    for (std::size_t i = 0; i < program.steps.size(); ++i)
      program.steps[i].buffer = static_cast<int>(i % 3);
  });
  list.add("new_buffers_at_once", alternating(2), [](Program& program) {
    program.concurrent = program.own_buffers = true;
    for (std::size_t i = 0; i < program.steps.size(); ++i)
      program.steps[i].buffer = static_cast<int>(i % 4);
  });
  list.add_growth(small(4));
}

}  // namespace

std::vector<Program> corner_programs(const Limits& limits) {
  CornerList list(limits);
  add_shapes(list);
  add_routings(list);
  add_reuse(list);
  add_groups(list);
  add_outputs(list);
  add_orders(list);
  return list.take();
}

}  // namespace deep_ep::test
