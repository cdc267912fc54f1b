#include "deep_ep/bootstrap.hpp"

#include "base/env.hpp"
#include "base/error.hpp"
#include "fabric/bootstrap_star.hpp"

namespace deep_ep {
namespace {

class Callback final : public Bootstrap {
 public:
  using AllGather = std::function<std::vector<std::string>(std::string_view)>;

  Callback(int rank, int size, AllGather all_gather)
      : rank_(rank), size_(size), all_gather_(std::move(all_gather)) {}

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  std::vector<std::string> all_gather(std::string_view bytes) override {
    std::vector<std::string> all = all_gather_(bytes);
    require(all.size() == static_cast<std::size_t>(size_),
            "bootstrap_callback: all_gather returned {} elements, must be one for each of {} ranks",
            all.size(), size_);
    require(all[rank_] == bytes,
            "bootstrap_callback: element {} that all_gather returned is not what this rank gave; "
            "results must be in rank order",
            rank_);
    return all;
  }

 private:
  int rank_;
  int size_;
  AllGather all_gather_;
};

}  // namespace

Bootstrap::~Bootstrap() = default;

std::shared_ptr<Bootstrap> bootstrap_callback(
    int rank, int size, std::function<std::vector<std::string>(std::string_view)> all_gather) {
  require(size >= 1, "size: {} is not allowed, must be at least 1", size);
  require(rank >= 0 && rank < size, "rank: {} is not allowed, must be from 0 to {}", rank,
          size - 1);
  require(static_cast<bool>(all_gather), "all_gather: an empty function is not allowed");
  return std::make_shared<Callback>(rank, size, std::move(all_gather));
}

std::shared_ptr<Bootstrap> bootstrap_from_environment() {
  const std::chrono::milliseconds timeout(env::timeout_ms());
  const std::optional<env::Launch> launch = env::launch();
  if (!launch) return fabric::bootstrap_star(0, 1, {}, timeout);
  return bootstrap_tcp(launch->rank, launch->size, launch->address, launch->port, timeout);
}

}  // namespace deep_ep
