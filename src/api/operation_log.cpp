#include "api/operation_log.hpp"

#include <algorithm>
#include <chrono>

#include <nlohmann/json.hpp>

#include "deep_ep/types.hpp"

namespace deep_ep {

namespace {

std::int64_t now_ns() {
  return std::chrono::system_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

}  // namespace

std::uint64_t OperationLog::begin(const char* name, std::uint64_t epoch,
                                  const protocol::CallRecord& record) {
  const std::lock_guard lock(mutex_);
  const std::uint64_t number = next_++;
  entries_[number % kSize] = {number, name, epoch, record, "running", now_ns(), 0};
  return number;
}

void OperationLog::finish(std::uint64_t number, const char* state) {
  const std::lock_guard lock(mutex_);
  Entry& entry = entries_[number % kSize];
  if (entry.number != number) return;
  entry.state = state;
  entry.end_ns = now_ns();
}

const char* OperationLog::name(std::uint64_t number) const {
  const std::lock_guard lock(mutex_);
  const Entry& entry = entries_[number % kSize];
  return entry.number == number ? entry.name : "a queued call";
}

std::string OperationLog::to_json() const {
  const std::lock_guard lock(mutex_);
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (std::uint64_t i = next_ - std::min(next_, kSize); i < next_; ++i) {
    const Entry& entry = entries_[i % kSize];
    list.push_back({{"number", entry.number},
                    {"operation", entry.name},
                    {"epoch", entry.epoch},
                    {"state", entry.state},
                    {"begin_ns", entry.begin_ns},
                    {"end_ns", entry.end_ns},
                    {"num_tokens", entry.record.num_tokens},
                    {"hidden", entry.record.hidden},
                    {"x_dtype", to_string(static_cast<DType>(entry.record.x_dtype))},
                    {"num_scales", entry.record.num_scales},
                    {"num_topk", entry.record.num_topk},
                    {"num_experts", entry.record.num_experts}});
  }
  return list.dump();
}

}  // namespace deep_ep
