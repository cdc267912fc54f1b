#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "plan/numerics.hpp"
#include "plan/reference_low_latency.hpp"

// How far the results of low-latency combines are from exact sums, by the format in which rows come
// home: normally distributed outputs of experts, by the reference, whose bits all backends have.
namespace deep_ep {
namespace {

namespace reference = plan::reference;
using plan::WireFormat;

constexpr std::int64_t kTokens = 32;  // of a rank
constexpr std::int64_t kHidden = 7168;
constexpr int kTopk = 8;
constexpr int kExpertsInAll = 64;

struct Deviation {
  double rms = 0;   // over the exact results' own
  double most = 0;  // the same
};

class Layer {
 public:
  explicit Layer(int ranks) : random_(ranks), shape_{} {
    shape_.num_topk = kTopk;
    shape_.num_experts = kExpertsInAll;
    shape_.num_ranks = ranks;
    for (int rank = 0; rank < ranks; ++rank) route();
    received_ = reference::low_latency_dispatch(shape_, kTokens, dispatched_);
    for (int rank = 0; rank < ranks; ++rank) fill_outputs(rank);
  }

  Deviation error_of(WireFormat wire) {
    shape_.wire = wire;
    const auto combined = reference::low_latency_combine(shape_, kHidden, received_, combines_);
    Deviation error;
    double squares = 0;
    for (std::size_t rank = 0; rank < combined.size(); ++rank) {
      for (std::size_t i = 0; i < exact_[rank].size(); ++i) {
        plan::Bfloat16 value{};
        std::memcpy(&value, combined[rank].data() + i * 2, 2);
        const double off = plan::to_float(value) - exact_[rank][i];
        error.rms += off * off;
        error.most = std::max(error.most, std::abs(off));
        squares += exact_[rank][i] * exact_[rank][i];
      }
    }
    const auto count = static_cast<double>(combined.size() * kTokens * kHidden);
    error.most /= std::sqrt(squares / count);
    error.rms = std::sqrt(error.rms / squares);
    return error;
  }

 private:
  void route() {
    reference::DispatchInput input;
    reference::LowLatencyCombineInput combine;
    input.num_tokens = kTokens;
    for (std::int64_t token = 0; token < kTokens; ++token) {
      std::vector<std::int64_t> experts;
      for (std::int64_t i = 0; i < kExpertsInAll; ++i) experts.push_back(i);
      std::shuffle(experts.begin(), experts.end(), random_);
      double sum = 0;
      std::vector<double> weights;
      for (int k = 0; k < kTopk; ++k) sum += weights.emplace_back(std::exp(normal_(random_)));
      for (int k = 0; k < kTopk; ++k) {
        input.topk_idx.push_back(experts[static_cast<std::size_t>(k)]);
        combine.topk_weights.push_back(
            static_cast<float>(weights[static_cast<std::size_t>(k)] / sum));
      }
    }
    combine.topk_idx = input.topk_idx;
    dispatched_.push_back(std::move(input));
    combines_.push_back(std::move(combine));
    exact_.emplace_back(kTokens * kHidden, 0.0);
  }

  /// Rows that the experts of a rank put out; adds them to the exact results.
  void fill_outputs(int rank) {
    const std::int64_t local_experts = kExpertsInAll / shape_.num_ranks;
    auto& groups = received_[static_cast<std::size_t>(rank)].groups;
    for (std::size_t g = 0; g < groups.size(); ++g) {
      auto& x = combines_[static_cast<std::size_t>(rank)].x.emplace_back();
      for (std::size_t row = 0; row < groups[g].src_idx.size(); ++row) {
        const auto source = static_cast<std::size_t>(groups[g].src_rank[row]);
        const std::int64_t token = groups[g].src_idx[row];
        const double weight =
            weight_of(source, token, rank * local_experts + static_cast<std::int64_t>(g));
        for (std::int64_t h = 0; h < kHidden; ++h) {
          const auto value = plan::from_float<plan::Bfloat16>(static_cast<float>(normal_(random_)));
          const auto* bytes = reinterpret_cast<const std::byte*>(&value);
          x.insert(x.end(), bytes, bytes + sizeof value);
          exact_[source][static_cast<std::size_t>(token * kHidden + h)] +=
              weight * plan::to_float(value);
        }
      }
    }
  }

  double weight_of(std::size_t source, std::int64_t token, std::int64_t expert) const {
    for (int k = 0; k < kTopk; ++k) {
      const auto entry = static_cast<std::size_t>(token * kTopk + k);
      if (combines_[source].topk_idx[entry] == expert) return combines_[source].topk_weights[entry];
    }
    return 0;
  }

  std::mt19937_64 random_;
  std::normal_distribution<double> normal_{};
  reference::LowLatencyShape shape_;
  std::vector<reference::DispatchInput> dispatched_{};
  std::vector<reference::LowLatencyReceived> received_{};
  std::vector<reference::LowLatencyCombineInput> combines_{};
  std::vector<std::vector<double>> exact_{};
};

void print_all() {
  fmt::print(
      "# {} tokens a rank, {} values, top-{} of {} experts, weights add up to 1; errors over "
      "the root mean square of the results\n",
      kTokens, kHidden, kTopk, kExpertsInAll);
  fmt::print("#{:>6} {:>8} {:>10} {:>10} {:>12}\n", "ranks", "home", "bytes", "rms", "most");
  for (const int ranks : {1, 2, 4, 8}) {
    Layer layer(ranks);
    for (const auto& [name, wire] : {std::pair{"bf16", WireFormat::kBfloat16},
                                     {"logfmt", WireFormat::kLogFmt},
                                     {"fp8", WireFormat::kFp8}}) {
      const Deviation error = layer.error_of(wire);
      fmt::print(" {:>6} {:>8} {:>10} {:>9.3f}% {:>11.2f}%\n", ranks, name,
                 plan::wire_row_bytes(wire, kHidden), 100 * error.rms, 100 * error.most);
    }
  }
}

}  // namespace
}  // namespace deep_ep

int main() { deep_ep::print_all(); }
