#include "put_rates.hpp"

#include <fmt/format.h>

#include <cstdio>

#include "backend/plugin.hpp"

namespace deep_ep::cli {

std::int64_t PutRates::wrong_words() const {
  std::int64_t wrong = all.wrong_words;
  for (const auto& [num_sms, rate] : by_sms) wrong += rate.wrong_words;
  return wrong;
}

PutRates measure_put_rates(const Buffer& buffer, Bootstrap& bootstrap, int ranks_per_node,
                           const std::vector<int>& num_sms) {
  const int device = buffer.device().index;
  PutRates rates;
  for (const int count : num_sms) {
    if (rates.by_sms.count(count) == 0)
      rates.by_sms[count] = cuda_parts().measure_puts(bootstrap, device, {count, ranks_per_node});
  }
  rates.all = cuda_parts().measure_puts(bootstrap, device, {0, ranks_per_node});
  return rates;
}

void print_put_rates(const PutRates& rates) {
  const auto print = [](const PutRate& rate) {
    fmt::print("# puts of NVSHMEM, {} KiB each, by {} blocks: {:.1f} GB/s, {} words wrong\n",
               rate.put_bytes >> 10, rate.num_sms, rate.bytes_per_second / 1e9, rate.wrong_words);
  };
  for (const auto& [num_sms, rate] : rates.by_sms) print(rate);
  print(rates.all);
  std::fflush(stdout);
}

nlohmann::ordered_json put_rates_json(const PutRates& rates) {
  nlohmann::ordered_json json = nlohmann::ordered_json::array();
  const auto add = [&](const PutRate& rate) {
    json.push_back({{"num_sms", rate.num_sms},
                    {"put_bytes", rate.put_bytes},
                    {"put_gbps", rate.bytes_per_second / 1e9},
                    {"checked_words", rate.checked_words},
                    {"wrong_words", rate.wrong_words}});
  };
  for (const auto& [num_sms, rate] : rates.by_sms) add(rate);
  add(rates.all);
  return json;
}

}  // namespace deep_ep::cli
