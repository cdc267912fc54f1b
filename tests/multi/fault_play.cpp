#include "multi/fault_play.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "verify/case.hpp"

namespace deep_ep::test {

const char* to_string(Op op) {
  switch (op) {
    case Op::kBarrier:
      return "barrier";
    case Op::kDispatch:
    case Op::kCachedDispatch:
      return "dispatch";
    case Op::kCombine:
    case Op::kCombineOwn:
      return "combine";
    case Op::kLowLatency:
      return "low_latency_";
  }
  return "";
}

Exchange::Exchange(int rank, int ranks, std::int64_t num_tokens, std::int64_t num_values)
    : num_ranks(ranks),
      tokens(num_tokens),
      hidden(num_values),
      x(static_cast<std::size_t>(tokens * hidden), static_cast<float>(rank + 1)) {
  for (std::int64_t token = 0; token < tokens; ++token) {
    for (int expert = 0; expert < ranks; ++expert) {
      topk_idx.push_back(expert);
      topk_weights.push_back(0.5F);
    }
  }
}

DispatchArgs Exchange::dispatch_args(Buffer& buffer, bool with_layout) const {
  DispatchArgs args;
  args.x = {x.data(), DType::kFloat32, {tokens, hidden}};
  args.topk_idx = {topk_idx.data(), DType::kInt64, {tokens, num_ranks}};
  args.topk_weights = {topk_weights.data(), DType::kFloat32, {tokens, num_ranks}};
  if (with_layout) {
    args.layout = buffer.get_dispatch_layout(args.topk_idx, num_ranks);
  } else {
    args.num_experts = num_ranks;
  }
  return args;
}

CombineArgs Exchange::combine_args(const DispatchResult& dispatched) {
  CombineArgs args;
  args.x = dispatched.recv_x;
  args.handle = dispatched.handle;
  args.internode_handle = dispatched.internode_handle;
  return args;
}

DispatchArgs Exchange::cached_args(const Exchange& exchange, const DispatchResult& dispatched) {
  DispatchArgs args;
  args.x = {exchange.x.data(), DType::kFloat32, {exchange.tokens, exchange.hidden}};
  if (dispatched.internode_handle.recv_src_meta.defined()) {
    args.internode_handle = dispatched.internode_handle;
  } else {
    args.handle = dispatched.handle;
  }
  return args;
}

std::unique_ptr<Buffer> make_buffer(Worker& worker, const BufferOptions& options,
                                    int ranks_per_node) {
  if (ranks_per_node > 0)
    setenv("DEEP_EP_RANKS_PER_NODE", std::to_string(ranks_per_node).c_str(), 1);
  auto buffer = std::make_unique<Buffer>(worker.bootstrap(), options);
  unsetenv("DEEP_EP_RANKS_PER_NODE");
  return buffer;
}

std::int64_t Exchange::rdma_bytes(int num_ranks, std::int64_t tokens, std::int64_t hidden) {
  return Buffer::get_low_latency_rdma_size_hint(static_cast<int>(tokens), 2 * hidden, num_ranks,
                                                num_ranks);
}

// The rows as twice as many bfloat16.
void Exchange::run_low_latency(Buffer& buffer) const {
  LowLatencyDispatchArgs dispatch;
  dispatch.x = {x.data(), DType::kBfloat16, {tokens, 2 * hidden}};
  dispatch.topk_idx = {topk_idx.data(), DType::kInt64, {tokens, num_ranks}};
  dispatch.num_max_dispatch_tokens_per_rank = static_cast<int>(tokens);
  dispatch.num_experts = num_ranks;
  dispatch.use_fp8 = false;
  const LowLatencyDispatchResult dispatched = buffer.low_latency_dispatch(dispatch);
  LowLatencyCombineArgs combine;
  combine.x = dispatched.recv_x;
  combine.topk_idx = dispatch.topk_idx;
  combine.topk_weights = {topk_weights.data(), DType::kFloat32, {tokens, num_ranks}};
  combine.handle = dispatched.handle;
  buffer.low_latency_combine(combine);
}

void Exchange::run(Buffer& buffer, Op op, const DispatchResult& dispatched) const {
  switch (op) {
    case Op::kBarrier:
      buffer.barrier();
      break;
    case Op::kDispatch:
      buffer.dispatch(dispatch_args(buffer));
      break;
    case Op::kCachedDispatch:
      buffer.dispatch(cached_args(*this, dispatched));
      break;
    case Op::kCombine:
      buffer.combine(combine_args(dispatched));
      break;
    case Op::kLowLatency:
      run_low_latency(buffer);
      break;
    case Op::kCombineOwn: {
      CombineArgs args = combine_args(dispatched);
      const auto* rows = dispatched.recv_x.as<float>();
      outputs.assign(rows, rows + dispatched.recv_x.numel());
      args.x.data = outputs.data();
      buffer.combine(args);
      break;
    }
  }
}

void expect_all_well(const std::vector<Outcome>& outcomes) {
  for (std::size_t rank = 0; rank < outcomes.size(); ++rank) {
    const Outcome& outcome = outcomes[rank];
    EXPECT_TRUE(outcome.answered && outcome.answer.empty())
        << "rank " << rank << ": "
        << (outcome.timed_out ? "hangs" : outcome.answer + outcome.failure);
  }
}

std::optional<Thrown> thrown_by(const std::function<void()>& call) {
  const auto begin = std::chrono::steady_clock::now();
  try {
    call();
  } catch (const Error& error) {
    return Thrown{error.code(), error.what(), error.ranks(),
                  std::chrono::duration_cast<std::chrono::milliseconds>(
                      std::chrono::steady_clock::now() - begin)};
  }
  return std::nullopt;
}

Belongings Belongings::count() {
  Belongings belongings;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd"))
    ++belongings.descriptors;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);)
    belongings.segments += line.find("/memfd:") != std::string::npos ? 1 : 0;
  return belongings;
}

void check_belongings(Findings& findings, const Belongings& before) {
  const Belongings after = Belongings::count();
  findings.expect(
      after.descriptors == before.descriptors,
      fmt::format("{} descriptors before, {} after", before.descriptors, after.descriptors));
  findings.expect(after.segments == before.segments,
                  fmt::format("{} segments before, {} after", before.segments, after.segments));
}

void check_aftermath(Findings& findings, Buffer& buffer, const Keepsakes& kept, const Thrown& fault,
                     std::chrono::milliseconds patience) {
  for (int i = 0; i < 2; ++i) {
    const auto again = thrown_by([&] { buffer.barrier(); });
    findings.expect(again.has_value(), "a call after the fault succeeds");
    if (!again) continue;
    findings.expect(again->code == fault.code && again->ranks == fault.ranks,
                    fmt::format("a call after the fault throws another Error: {}", again->text));
    findings.expect(again->after < std::chrono::seconds(5), "a call after the fault waits");
  }
  findings.expect(thrown_by([&] { buffer.check(); }).has_value(), "check() sees no fault");
  findings.expect(kept.check().empty(), "after the fault: " + kept.check());
  const auto begin = std::chrono::steady_clock::now();
  buffer.destroy();
  const auto took = std::chrono::steady_clock::now() - begin;
  findings.expect(took < patience, "destroy waits");
  findings.expect(!buffer.is_available(), "the Buffer is available after destroy");
  findings.expect(kept.check().empty(), "after destroy: " + kept.check());
}

void check_new_buffer(Findings& findings, Worker& worker, const std::vector<int>& ranks) {
  BufferOptions options;
  options.timeout = std::chrono::seconds(20);
  Buffer buffer(worker.bootstrap_among(ranks), options);
  verify::Case exchange;
  exchange.ranks = static_cast<int>(ranks.size());
  if (buffer.num_nodes() > 1) exchange.ranks_per_node = buffer.num_ranks_per_node();
  exchange.experts = 4 * exchange.ranks;
  exchange.topk = 3;
  const verify::CaseResult result = verify::run_case(buffer, exchange);
  findings.expect(result.passed(), "a new Buffer is wrong: " + result.first_mismatch);
}

}  // namespace deep_ep::test
