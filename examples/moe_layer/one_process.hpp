#pragma once

#include <cstdint>

#include "model.hpp"

// The same layer without ranks and without the library, and how far the two may differ.
namespace moe {

struct Expected {
  Rows sum;    ///< what the experts say about each row, in fp32
  Rows bound;  ///< how far each value of the distributed layer may be from it
};

/// `layer` holds all experts.
Expected run_layer_alone(const Layer& layer, const Rows& x);

struct Difference {
  std::int64_t values = 0;
  std::int64_t outside = 0;  ///< values beyond their bound; NaN and infinity always are
  float largest = 0;         ///< largest difference ...
  float allowed = 0;         ///< ... and the bound of that value
  float closest = 0;         ///< largest ratio of a difference to its own bound
};

Difference compare(const Expected& expected, const Bf16Rows& actual);

}  // namespace moe
