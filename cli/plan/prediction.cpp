#include "plan/prediction.hpp"

#include <algorithm>
#include <cmath>

#include "deep_ep/buffer.hpp"
#include "plan/internode.hpp"
#include "plan/low_latency.hpp"
#include "plan/recv_arrays.hpp"
#include "protocol/rail.hpp"

namespace deep_ep::cli {
namespace {

constexpr std::int64_t kIdBytes = 8;
constexpr std::int64_t kWeightBytes = 4;
constexpr double kRecordBytes = sizeof(protocol::CallRecord);  // compared before anything moves
constexpr double kMega = 1e6;

Load times(const Load& load, double factor) { return {load.mean * factor, load.busiest * factor}; }

/// Microseconds for bytes at 10^9 a second.
double time_of(double bytes, double gbps) { return bytes / gbps / 1e3; }

class Predictor {
 public:
  Predictor(const Topology& topology, const Gate& gate, const Payload& payload,
            const Machine& machine, const Traffic& traffic)
      : topology_(topology), gate_(gate), payload_(payload), machine_(machine), traffic_(traffic) {
    const std::int64_t scales =
        payload.scale_group > 0 ? (payload.hidden + payload.scale_group - 1) / payload.scale_group
                                : 0;
    format_ = {payload.hidden * payload.value_bytes, scales * 4, gate.topk * kIdBytes,
               gate.topk * kWeightBytes,
               topology.nodes > 1 ? std::int64_t{sizeof(plan::SourceMeta)} : 0};
    head_bytes_ = static_cast<double>(sizeof(plan::Packet)) * (1 + gate.topk);
  }

  /// A row of counts to every rank; with several nodes a message to the rail peer on each other
  /// node, and what these say to every rank of the own node.
  Prediction notify() const {
    Prediction one = start(Operation::kNotify, 1);
    const double ranks = topology_.ranks();
    const double local_experts = gate_.experts / ranks;
    const bool several = topology_.nodes > 1;
    const double counts = several ? topology_.nodes * (topology_.ranks_per_node + 1.0) : ranks;
    one.row_bytes = kRecordBytes + 4 * (counts + local_experts);
    one.network_row_bytes =
        sizeof(protocol::RailMessage) + 4 * local_experts * topology_.ranks_per_node;
    one.own_bytes = one.row_bytes;
    one.local_messages = topology_.ranks_per_node - 1;
    one.network_messages = topology_.nodes - 1;
    one.local_bytes = times({1, 1}, one.local_messages * one.row_bytes);
    one.network_bytes = times({1, 1}, one.network_messages * one.network_row_bytes);
    return finish(one);
  }

  Prediction high_throughput(Operation operation) const {
    const bool dispatch = operation == Operation::kDispatch;
    Prediction one = start(operation, 2);
    const double row =
        dispatch
            ? static_cast<double>(format_.x_bytes + format_.scale_bytes + format_.topk_idx_bytes +
                                  format_.topk_weights_bytes + 4 + format_.src_meta_bytes)
            : static_cast<double>(payload_.hidden * payload_.sum_bytes);
    // As they cross the network: with a head, and parts and records aligned.
    const double record = static_cast<double>(
        dispatch ? plan::RecordFormat(format_, topology_.ranks_per_node).bytes
                 : plan::SumFormat(format_.topk_weights_bytes, payload_.hidden * payload_.sum_bytes)
                       .bytes);
    set_rows(one, traffic_.relayed, row, record);
    const auto chunk = static_cast<double>(machine_.chunk_rows);
    one.local_messages = traffic_.relayed.local.busiest;
    one.network_messages =
        std::max(std::ceil(traffic_.relayed.network.busiest / chunk),
                 std::min<double>(topology_.nodes - 1, traffic_.relayed.network.busiest));
    if (topology_.nodes > 1)  // the first chunk is passed on before its last byte can be
      one.wait_us += time_of(chunk * record, machine_.network_gbps) +
                     time_of(chunk * row, machine_.local_gbps);
    // All that it writes, rows passed on for others and its own included, or what it reads and
    // sums.
    const double rows =
        traffic_.relayed.own + traffic_.relayed.local.busiest + traffic_.relayed.network.busiest;
    one.compute_us = time_of(rows * row, dispatch ? machine_.write_gbps : machine_.sum_gbps);
    one.memory_bytes = memory(dispatch);
    return finish(one);
  }

  Prediction low_latency(Operation operation) const {
    const bool dispatch =
        operation == Operation::kLowLatencyDispatch || operation == Operation::kPerExpertDispatch;
    const bool per_expert =
        operation == Operation::kPerExpertDispatch || operation == Operation::kPerExpertCombine;
    const Route& route = per_expert ? traffic_.per_expert : traffic_.direct;
    // Weights go to the experts first, where sums are made.
    Prediction one = start(operation, dispatch || per_expert ? 1 : 2);
    const double sums = static_cast<double>(payload_.hidden * payload_.sum_bytes);
    const double values = static_cast<double>(format_.x_bytes + format_.scale_bytes);
    const double heads = per_expert ? sizeof(plan::Packet) : head_bytes_;
    const double row = heads + (dispatch ? values : sums);
    set_rows(one, route, row, row);
    const int rounds = dispatch || per_expert ? 1 : 2;  // messages of weights, and rows
    one.local_messages = rounds * route.local.busiest;
    one.network_messages = rounds * route.network.busiest;
    // Rows in their experts' places: all entries of those who came.
    const double entries =
        traffic_.entries_per_token * static_cast<double>(gate_.tokens) * busy(traffic_.received);
    const double messages = per_expert ? 0 : traffic_.received.busiest;
    one.compute_us = dispatch
                         ? time_of((entries + messages) * values, machine_.low_latency_write_gbps)
                         : time_of(entries * sums, machine_.low_latency_sum_gbps);
    one.memory_bytes = per_expert ? 0 : low_latency_memory(dispatch);
    return finish(one);
  }

 private:
  static double busy(const Load& load) { return load.mean > 0 ? load.busiest / load.mean : 1; }

  Prediction start(Operation operation, int exchanges) const {
    Prediction one;
    one.operation = operation;
    const bool low_latency =
        operation == Operation::kLowLatencyDispatch || operation == Operation::kLowLatencyCombine;
    one.wait_us = low_latency ? machine_.low_latency_call_us : machine_.call_us;
    if (topology_.ranks() > 1)
      one.wait_us += exchanges * (topology_.nodes > 1 ? machine_.network_us : machine_.local_us);
    return one;
  }

  static void set_rows(Prediction& one, const Route& route, double row, double network_row) {
    one.row_bytes = row;
    one.network_row_bytes = network_row;
    one.own_bytes = route.own * row;
    one.local_bytes = times(route.local, row);
    one.network_bytes = times(route.network, network_row);
  }

  Prediction finish(Prediction one) const {
    one.local_us = time_of(one.local_bytes.busiest, machine_.local_gbps);
    one.network_us = std::max(time_of(one.network_bytes.busiest, machine_.network_gbps),
                              one.network_messages / (machine_.network_mrate * kMega) * kMega);
    const double longest = std::max({one.local_us, one.network_us, one.compute_us});
    one.total_us = one.wait_us + longest;
    one.bound = longest < one.wait_us       ? "waits"
                : longest == one.network_us ? "network"
                : longest == one.compute_us ? "processors"
                                            : "local";
    return one;
  }

  double memory(bool dispatch) const {
    const Config config;
    const double buffers =
        static_cast<double>(config.get_nvl_buffer_size_hint(payload_.hidden * payload_.sum_bytes,
                                                            topology_.ranks())) +
        (topology_.nodes > 1 ? static_cast<double>(config.get_rdma_buffer_size_hint(
                                   payload_.hidden * payload_.sum_bytes, topology_.ranks()))
                             : 0);
    const auto rows = static_cast<std::int64_t>(std::ceil(traffic_.received.busiest));
    const double results =
        dispatch ? static_cast<double>(
                       plan::RecvArrays::bytes(format_, rows) +
                       plan::HandleArrays::bytes(rows, topology_.ranks(), config.num_sms / 2))
                 : static_cast<double>(gate_.tokens * payload_.hidden * payload_.sum_bytes);
    return buffers + results;
  }

  double low_latency_memory(bool dispatch) const {
    const std::int64_t most = payload_.max_tokens > 0 ? payload_.max_tokens : gate_.tokens;
    // What comes, and between nodes a mirror of what goes.
    const double buffers =
        (topology_.nodes > 1 ? 2 : 1) *
        static_cast<double>(Buffer::get_low_latency_rdma_size_hint(
            static_cast<int>(most), payload_.hidden, topology_.ranks(), gate_.experts, gate_.topk));
    const double rows =
        dispatch ? static_cast<double>(most) * gate_.experts : static_cast<double>(gate_.tokens);
    const double row = dispatch ? static_cast<double>(format_.x_bytes + format_.scale_bytes)
                                : static_cast<double>(payload_.hidden * payload_.sum_bytes);
    return buffers + rows * row;
  }

  const Topology& topology_;
  const Gate& gate_;
  const Payload& payload_;
  const Machine& machine_;
  const Traffic& traffic_;
  plan::RowFormat format_;
  double head_bytes_ = 0;
};

}  // namespace

const char* to_string(Operation operation) {
  switch (operation) {
    case Operation::kNotify:
      return "notify";
    case Operation::kDispatch:
      return "dispatch";
    case Operation::kCombine:
      return "combine";
    case Operation::kLowLatencyDispatch:
      return "low-latency dispatch";
    case Operation::kLowLatencyCombine:
      return "low-latency combine";
    case Operation::kPerExpertDispatch:
      return "per-expert dispatch";
    case Operation::kPerExpertCombine:
      return "per-expert combine";
  }
  return "unknown";
}

std::vector<Prediction> predict_high_throughput(const Topology& topology, const Gate& gate,
                                                const Payload& payload, const Machine& machine,
                                                const Traffic& traffic) {
  const Predictor predictor(topology, gate, payload, machine, traffic);
  return {predictor.notify(), predictor.high_throughput(Operation::kDispatch),
          predictor.high_throughput(Operation::kCombine)};
}

std::vector<Prediction> predict_low_latency(const Topology& topology, const Gate& gate,
                                            const Payload& payload, const Machine& machine,
                                            const Traffic& traffic) {
  const Predictor predictor(topology, gate, payload, machine, traffic);
  return {predictor.low_latency(Operation::kLowLatencyDispatch),
          predictor.low_latency(Operation::kLowLatencyCombine),
          predictor.low_latency(Operation::kPerExpertDispatch),
          predictor.low_latency(Operation::kPerExpertCombine)};
}

}  // namespace deep_ep::cli
