#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include <deep_ep/deep_ep.hpp>

#include "model.hpp"

// The layer spread over ranks: every rank owns some tokens and some experts.
namespace moe {

/// What a rank spends its time on, in the order of the layer.
enum class Phase { kGate, kLayout, kDispatch, kExperts, kCombine, kWait };
constexpr int kNumPhases = 6;

/// What one rank did, over all layers. Counts are of rows sent by dispatch; combine sends the same
/// ones back.
struct Account {
  std::array<double, kNumPhases> seconds{};
  std::int64_t rows = 0;           ///< one per (token, rank that owns one of its experts)
  std::int64_t rows_to_self = 0;   ///< of those, the ones that stay on this rank
  std::vector<std::int64_t> load;  ///< (token, expert) pairs of this rank's tokens, per expert
};

/// Adds nothing to x: returns what the experts say about each row of x, rounded to BF16.
/// `layer` holds the experts of this rank. Collective.
Bf16Rows run_layer_on_ranks(deep_ep::Buffer& buffer, const Layer& layer, const Rows& x,
                            Account& account);

}  // namespace moe
