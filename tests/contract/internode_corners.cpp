#include <fmt/format.h>

#include "contract/corner_list.hpp"

// The corners of several nodes, which ranks of this machine pose as.
namespace deep_ep::test {
namespace {

using verify::Case;
using verify::Routing;
using verify::Scales;

Case small(int nodes, int ranks_per_node) {
  Case c;
  c.ranks = nodes * ranks_per_node;
  c.ranks_per_node = ranks_per_node;
  c.experts = c.ranks * 8;
  c.topk = 4;
  return c;
}

Case large(int nodes, int ranks_per_node) {
  Case c = small(nodes, ranks_per_node);
  c.tokens = {4096};
  c.hidden = 7168;
  c.topk = 8;
  return c;
}

void add_shapes(CornerList& list) {
  for (const auto& [nodes, ranks_per_node] :
       {std::pair{2, 1}, {2, 2}, {4, 1}, {2, 4}, {4, 2}, {3, 2}, {8, 1}})
    list.add(fmt::format("nodes_{}_of_{}", nodes, ranks_per_node), {small(nodes, ranks_per_node)});

  Case c = large(2, 2);
  c.experts = 256;
  list.add("deepseek_bf16", {c});
  c.dtype = DType::kFloat8E4m3;
  c.scales = Scales::kFloat32ColumnMajor;
  list.add("deepseek_fp8", {c});

  // 512 KiB a row: more than a ring takes as one record.
  c = small(2, 2);
  c.hidden = 128 << 10;
  c.dtype = c.combine_dtype = DType::kFloat32;
  c.tokens = {9, 0, 4, 7};
  list.add("rows_in_pieces", {c});
  c = small(2, 1);
  c.dtype = DType::kUint8;
  c.hidden = 16;
  c.tokens = {4096};
  list.add("shortest_rows", {c});
  c = small(2, 2);
  c.experts = 4 * 4096;
  list.add("most_local_experts", {c});
  c = small(2, 2);
  c.experts = c.topk = 64;
  list.add("topk_is_all_experts", {c});
}

void add_routings(CornerList& list) {
  Case c = large(4, 2);
  c.routing = Routing::kToRankZero;
  list.add("all_tokens_to_one_rank", {c});
  c = large(2, 2);
  c.routing = Routing::kAllToAll;
  list.add("every_token_to_every_rank", {c});
  c = large(2, 2);
  c.routing = Routing::kToSelf;
  list.add("nothing_leaves_its_rank", {c});
  c = small(3, 2);
  c.routing = Routing::kNone;
  list.add("nothing_is_sent", {c});
  c.num_worst_tokens = Case::kWorstFits;
  list.add("nothing_is_sent_worst_case", {c});
  c = small(2, 2);
  c.tokens = {0};
  list.add("no_tokens_anywhere", {c});
  c = small(3, 2);
  c.tokens = {0, 0, 0, 333, 0, 0};
  list.add("one_rank_has_tokens", {c});
  c = small(2, 2);
  c.tokens = {1, 4096, 0, 17};
  list.add("very_ragged", {c});
}

void add_reuse(CornerList& list) {
  Case c = small(2, 2);
  c.cached_repeats = 50;
  list.add("handle_reused_50_times", {c});
  c.cached_repeats = 8;
  c.hold_results = c.clone_handle = true;
  list.add("cloned_handle_results_held", {c});
  c = small(3, 2);
  c.combines = 20;
  c.biases = 2;
  list.add("combined_20_times", {c});
  c = small(4, 1);
  c.async = c.hold_results = true;
  c.cached_repeats = c.combines = 6;
  list.add("async_chain", {c});
  c = small(2, 2);
  c.config.num_sms = 1;
  c.late_config.num_sms = 24;
  c.cached_repeats = c.combines = 3;
  list.add("handle_used_with_more_sms", {c});
  std::swap(c.config, c.late_config);
  list.add("handle_used_with_fewer_sms", {c});
}

void add_rows(CornerList& list) {
  using verify::Groups;
  using verify::Outputs;
  for (const auto& [outputs, name] :
       {std::pair{Outputs::kPrivate, "private"}, std::pair{Outputs::kInResults, "in_results"},
        std::pair{Outputs::kMixed, "mixed"}}) {
    Case c = small(2, 2);
    c.outputs = outputs;
    c.dtype = DType::kFloat8E4m3;
    c.scales = Scales::kFloat32;
    c.prepare = true;
    c.cached_repeats = 3;
    list.add(fmt::format("prepared_outputs_{}", name), {c});
  }
  Case c = large(2, 2);
  c.experts = 64;
  c.expert_alignment = 128;
  c.groups = Groups::kWeighted;
  c.prepare = true;
  c.outputs = Outputs::kPrivate;
  list.add("grouped_deepseek_prepared", {c});
  c = small(4, 1);
  c.groups = Groups::kUnweighted;
  c.topk = 9;
  c.routing = Routing::kDuplicates;
  list.add("grouped_duplicates", {c});
  c = small(2, 2);
  c.groups = Groups::kWeighted;
  c.num_worst_tokens = Case::kWorstFits;
  c.expert_alignment = 16;
  c.outputs = Outputs::kPrivate;
  list.add("grouped_worst_case_as_many_as_given", {c});
  c = small(2, 2);
  c.groups = Groups::kWeighted;
  c.tokens = {0, 0, 33, 0};
  c.routing = Routing::kToRankZero;
  c.prepare = true;
  list.add("grouped_empty_ranks", {c});
  c = small(3, 2);
  c.groups = Groups::kWeighted;
  c.async = c.hold_results = c.clone_handle = true;
  c.cached_repeats = c.combines = 3;
  c.outputs = Outputs::kMixed;
  list.add("grouped_async_chain", {c});
}

/// Neighbouring calls differ in everything, so that what one leaves behind meets the next.
std::vector<Case> alternating(int nodes, int ranks_per_node) {
  Case wide = small(nodes, ranks_per_node);
  wide.hidden = 8192;
  wide.tokens = {97};
  Case narrow = small(nodes, ranks_per_node);
  narrow.hidden = 16;
  narrow.dtype = DType::kUint8;
  narrow.topk = 1;
  Case scaled = small(nodes, ranks_per_node);
  scaled.dtype = DType::kFloat8E4m3;
  scaled.scales = Scales::kPackedColumnMajor;
  scaled.tokens = {5};
  scaled.prepare = true;
  scaled.groups = verify::Groups::kUnweighted;
  Case empty = small(nodes, ranks_per_node);
  empty.tokens = {0};
  Case worst = small(nodes, ranks_per_node);
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
  for (const auto& [nodes, ranks_per_node] : {std::pair{2, 1}, {2, 2}, {4, 2}}) {
    const std::string name = fmt::format("{}_of_{}", nodes, ranks_per_node);
    list.add("alternating_shapes_" + name, alternating(nodes, ranks_per_node));
    list.add("two_buffers_in_turn_" + name, alternating(nodes, ranks_per_node),
             [](Program& program) {
               for (std::size_t i = 0; i < program.steps.size(); ++i)
                 program.steps[i].buffer = static_cast<int>(i % 2);
             });
  }
  list.add("three_buffers_at_once", alternating(2, 2), [](Program& program) {
    program.concurrent = true;
    for (std::size_t i = 0; i < program.steps.size(); ++i)
      program.steps[i].buffer = static_cast<int>(i % 3);
  });
  list.add("new_buffers_at_once", alternating(2, 1), [](Program& program) {
    program.concurrent = program.own_buffers = true;
    for (std::size_t i = 0; i < program.steps.size(); ++i)
      program.steps[i].buffer = static_cast<int>(i % 2);
  });
  list.add_growth(small(2, 2));
}

}  // namespace

std::vector<Program> internode_corner_programs(const Limits& limits) {
  CornerList list(limits);
  add_shapes(list);
  add_routings(list);
  add_reuse(list);
  add_rows(list);
  add_orders(list);
  return list.take();
}

}  // namespace deep_ep::test
