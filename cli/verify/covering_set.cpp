#include "verify/covering_set.hpp"

#include <algorithm>

#include "verify/random.hpp"

namespace deep_ep::verify {
namespace {

/// Builds the list; each case gets its own seed.
class Builder {
 public:
  Builder(int ranks, std::uint64_t seed) : ranks_(ranks), seed_(seed) {}

  template <class Change>
  void add(const char* name, const Change& change) {
    Case c;
    c.name = name;
    c.ranks = ranks_;
    c.experts = 8 * ranks_;
    c.seed = make_key(seed_, cases_.size());
    change(c);
    cases_.push_back(std::move(c));
  }

  std::vector<Case> take() { return std::move(cases_); }

 private:
  int ranks_;
  std::uint64_t seed_;
  std::vector<Case> cases_{};
};

void add_payloads(Builder& builder) {
  builder.add("bf16 rows, weights, two biases", [](Case& c) { c.biases = 2; });
  builder.add("fp16 rows, one bias", [](Case& c) {
    c.tokens = {33};
    c.dtype = c.combine_dtype = DType::kFloat16;
    c.biases = 1;
  });
  builder.add("fp32 rows", [](Case& c) {
    c.hidden = 1024;
    c.dtype = c.combine_dtype = DType::kFloat32;
  });
  builder.add("fp8 rows, fp32 scales, row-major", [](Case& c) {
    c.hidden = 896;
    c.dtype = DType::kFloat8E4m3;
    c.scales = Scales::kFloat32;
  });
  builder.add("fp8 rows, fp32 scales, column-major", [](Case& c) {
    c.tokens = {129};
    c.dtype = DType::kFloat8E4m3;
    c.scales = Scales::kFloat32ColumnMajor;
  });
  builder.add("fp8 rows, packed scales, row-major", [](Case& c) {
    c.hidden = 1536;
    c.dtype = DType::kFloat8E4m3;
    c.scales = Scales::kPacked;
    c.num_scales = 3;
  });
  builder.add("fp8 rows, packed scales, column-major", [](Case& c) {
    c.tokens = {17};
    c.dtype = DType::kFloat8E4m3;
    c.scales = Scales::kPackedColumnMajor;
    c.num_scales = 5;
  });
  builder.add("opaque bytes, rows of 16 bytes", [](Case& c) {
    c.tokens = {200};
    c.hidden = 16;
    c.dtype = DType::kUint8;
  });
  builder.add("rows of 32 KiB", [](Case& c) {
    c.tokens = {9};
    c.hidden = 16384;
  });
}

void add_routings(Builder& builder, int ranks) {
  builder.add("zipf: a few hot experts", [](Case& c) {
    c.routing = Routing::kZipf;
    c.tokens = {150};
  });
  builder.add("grouped: two ranks a token", [](Case& c) { c.routing = Routing::kGrouped; });
  builder.add("every token to every rank", [ranks](Case& c) {
    c.routing = Routing::kAllToAll;
    c.topk = std::max(8, ranks);
    c.tokens = {40};
  });
  builder.add("all tokens to rank 0", [](Case& c) { c.routing = Routing::kToRankZero; });
  builder.add("all tokens to their own rank", [](Case& c) {
    c.routing = Routing::kToSelf;
    c.tokens = {31};
  });
  builder.add("no token to any rank", [](Case& c) {
    c.routing = Routing::kNone;
    c.biases = 1;
  });
  builder.add("entries of -1, tokens without experts", [](Case& c) {
    c.routing = Routing::kHoles;
    c.tokens = {100};
    c.biases = 2;
  });
  builder.add("an expert twice in a token's top-k", [](Case& c) {
    c.routing = Routing::kDuplicates;
    c.topk = 9;
  });
  builder.add("top-1 of one expert a rank", [ranks](Case& c) {
    c.topk = 1;
    c.experts = ranks;
    c.tokens = {77};
  });
  builder.add("top-32", [ranks](Case& c) {
    c.topk = 32;
    c.experts = 32 * ranks;
  });
}

void add_sizes(Builder& builder, int ranks) {
  builder.add("no tokens anywhere", [](Case& c) { c.tokens = {0}; });
  builder.add("one token a rank", [](Case& c) {
    c.tokens = {1};
    c.cached_repeats = 3;
    c.combines = 3;
  });
  builder.add("tokens on odd ranks only", [ranks](Case& c) {
    c.tokens.assign(static_cast<std::size_t>(ranks), 0);
    for (std::size_t rank = 1; rank < c.tokens.size(); rank += 2) c.tokens[rank] = 50;
  });
  builder.add("tokens on one rank only, worst tokens", [ranks](Case& c) {
    c.tokens.assign(static_cast<std::size_t>(ranks), 0);
    c.tokens.back() = 60;
    c.num_worst_tokens = Case::kWorstFits;
  });
  builder.add("many tokens", [](Case& c) {
    c.tokens = {1500};
    c.hidden = 128;
  });
}

void add_calls(Builder& builder) {
  builder.add("expert_alignment 64, int32 ids", [](Case& c) {
    c.expert_alignment = 64;
    c.topk_dtype = DType::kInt32;
  });
  builder.add("worst tokens, int32 ids, wait statistics", [](Case& c) {
    c.tokens = {70};
    c.topk_dtype = DType::kInt32;
    c.num_worst_tokens = Case::kWorstFits;
    c.wait_stats = true;
  });
  builder.add("layout only, no top-k", [](Case& c) {
    c.pass_topk = false;
    c.weights = false;
    c.tokens = {55};
  });
  builder.add("top-k without weights", [](Case& c) { c.weights = false; });
  builder.add("cached handle, six times, results held", [](Case& c) {
    c.tokens = {90};
    c.cached_repeats = 6;
    c.combines = 3;
    c.hold_results = true;
  });
  builder.add("cloned handle, another num_sms", [](Case& c) {
    c.clone_handle = true;
    c.config.num_sms = 1;
    c.late_config.num_sms = 3;
    c.combines = 2;
  });
  builder.add("async, chained by events", [](Case& c) {
    c.async = true;
    c.tokens = {120};
    c.cached_repeats = 3;
    c.combines = 3;
    c.biases = 2;
  });
  builder.add("async, worst tokens, cloned handle", [](Case& c) {
    c.async = true;
    c.num_worst_tokens = Case::kWorstFits;
    c.clone_handle = true;
    c.dtype = DType::kFloat8E4m3;
    c.scales = Scales::kFloat32;
  });
  builder.add("inbox of one row", [](Case& c) {
    c.tokens = {65};
    c.config.num_max_nvl_chunked_send_tokens = 1;
    c.config.num_max_nvl_chunked_recv_tokens = 1;
    c.late_config = c.config;
  });
}

void add_groups(Builder& builder) {
  builder.add("rows grouped by expert, padded to 16", [](Case& c) {
    c.groups = Groups::kWeighted;
    c.expert_alignment = 16;
  });
  builder.add("grouped, an expert twice, not weighed", [](Case& c) {
    c.groups = Groups::kUnweighted;
    c.routing = Routing::kDuplicates;
  });
  builder.add("grouped, worst tokens, fp8 with scales", [](Case& c) {
    c.groups = Groups::kWeighted;
    c.num_worst_tokens = Case::kWorstFits;
    c.tokens = {20};
    c.dtype = DType::kFloat8E4m3;
    c.scales = Scales::kFloat32;
  });
  builder.add("prepared, outputs of the caller", [](Case& c) {
    c.prepare = true;
    c.outputs = Outputs::kPrivate;
    c.groups = Groups::kWeighted;
  });
  builder.add("prepared, rows into an earlier result", [](Case& c) {
    c.prepare = true;
    c.outputs = Outputs::kInResults;
    c.tokens = {44};
  });
}

}  // namespace

std::vector<Case> covering_set(int ranks, std::uint64_t seed) {
  Builder builder(ranks, seed);
  add_payloads(builder);
  add_routings(builder, ranks);
  add_sizes(builder, ranks);
  add_calls(builder);
  add_groups(builder);
  return builder.take();
}

}  // namespace deep_ep::verify
