#pragma once

#include <map>
#include <vector>

#include <nlohmann/json.hpp>

#include "backend/put_rate.hpp"
#include "deep_ep/bootstrap.hpp"
#include "deep_ep/buffer.hpp"

namespace deep_ep::cli {

/// What NVSHMEM's puts reach, to be laid beside what calls between nodes reach in the same run.
struct PutRates {
  std::map<int, PutRate> by_sms;  ///< as many SMs as the calls have
  PutRate all{};                  ///< all SMs of the GPU

  std::int64_t wrong_words() const;
};

/// Collective: of the ranks of a Buffer on GPUs of several nodes.
PutRates measure_put_rates(const Buffer& buffer, Bootstrap& bootstrap, int ranks_per_node,
                           const std::vector<int>& num_sms);
void print_put_rates(const PutRates& rates);
nlohmann::ordered_json put_rates_json(const PutRates& rates);

}  // namespace deep_ep::cli
