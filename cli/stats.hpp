#pragma once

#include <vector>

namespace deep_ep::cli {

struct Summary {
  double median = 0;  ///< of an even count: the mean of the middle two
  double p99 = 0;     ///< the smallest value that 99 % of the values do not exceed
  double min = 0;
  double max = 0;
};

/// All zero for no values.
Summary summarize(std::vector<double> values);

/// Element i is the largest of all ranks' element i: each iteration's slowest rank. All rows must
/// be of one length.
std::vector<double> slowest(const std::vector<std::vector<double>>& ranks);

}  // namespace deep_ep::cli
