#pragma once

#include "verify/compare.hpp"
#include "verify/low_latency_expected.hpp"

namespace deep_ep::verify {

/// Compares what one rank's low-latency calls gave with what they must give. Tensors lie on the
/// host.
class LowLatencyChecks {
 public:
  static constexpr std::int32_t kStatsStart = 7;

  LowLatencyChecks(const LowLatencyCase& c, int rank) : case_(c), rank_(rank), compare_(result_) {}

  void stage(std::string name) { compare_.set_stage(std::move(name)); }
  void happened(const EventHandle& event) {
    compare_.expect(event.query(), "the call's event has happened");
  }
  void expect(bool holds, std::string_view what) { compare_.expect(holds, what); }

  void dispatched(const LowLatencyDispatchResult& got, const LowLatencyExpected& expected);
  void handle(const LowLatencyHandle& handle, const LowLatencyExpected& expected);
  void unchanged_x(const Tensor& x, const LowLatencyExpected& expected);
  void combined(const Tensor& got, const LowLatencyExpected& expected, int round);
  void wait_stats(const Tensor& stats);
  void expert_stats(const Tensor& stats, const std::vector<LowLatencyExpected>& dispatched);
  void masks(const Tensor& masks);

  const CaseResult& result() const { return result_; }

 private:
  void payload(const LowLatencyDispatchResult& got, const LowLatencyExpected& expected);
  void scales(const Tensor& got, const LowLatencyExpected& expected);
  void topk(const LowLatencyDispatchResult& got, const LowLatencyExpected& expected);
  std::int64_t rows_of_group() const {
    return case_.rank_major ? case_.capacity() : case_.ranks * case_.capacity();
  }
  const plan::reference::LowLatencyReceived& mine(const LowLatencyExpected& expected) const {
    return expected.received[static_cast<std::size_t>(rank_)];
  }

  const LowLatencyCase& case_;
  int rank_;
  CaseResult result_;
  Comparator compare_;
};

}  // namespace deep_ep::verify
