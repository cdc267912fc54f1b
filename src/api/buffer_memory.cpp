#include "api/buffer_impl.hpp"
#include "base/carver.hpp"
#include "base/error.hpp"

namespace deep_ep {

Allocator::~Allocator() = default;

std::vector<Tensor> Buffer::Impl::ask_allocator(std::vector<TensorView>& views,
                                                const CallOptions& options) {
  if (!options_.allocator) return {};
  const auto carve = [&](Carver carver) {
    for (TensorView& view : views)
      view.data = carver.take<std::byte>(static_cast<std::int64_t>(view.nbytes()));
    return std::max<std::int64_t>(carver.used(), 1);
  };
  const std::shared_ptr<void> owner =
      options_.allocator->allocate(carve(Carver(nullptr)), false, options);
  if (!owner) return {};
  (void)carve(Carver(static_cast<std::byte*>(owner.get())));
  std::vector<Tensor> tensors;
  tensors.reserve(views.size());
  for (const TensorView& view : views) tensors.emplace_back(view, owner);
  return tensors;
}

std::vector<Tensor> Buffer::Impl::allocate(std::vector<TensorView> views,
                                           const CallOptions& options) {
  if (views.empty()) return {};
  std::vector<Tensor> given = ask_allocator(views, options);
  if (!given.empty()) return given;
  return backend_->allocate(std::move(views), options.stream);
}

std::vector<Tensor> Buffer::Impl::allocate_private(std::vector<TensorView> views,
                                                   const CallOptions& options) {
  if (views.empty()) return {};
  std::vector<Tensor> given = ask_allocator(views, options);
  if (!given.empty()) return given;
  return backend_->allocate_private(std::move(views), options.stream);
}

Backend::Results Buffer::Impl::allocate_results(std::int64_t bytes, const CallOptions& options) {
  Backend::Results results;
  if (options_.allocator)
    results.owner = options_.allocator->allocate(std::max<std::int64_t>(bytes, 1), true, options);
  if (!results.owner) return backend_->allocate_results(bytes, options.stream);
  results.data = static_cast<std::byte*>(results.owner.get());
  results.block = backend_->locate(results.data, bytes);
  require(results.block.segment >= 0,
          "allocator gave {} bytes at {} for results that peers write; they must lie in what "
          "allocate_mapped of this Buffer gave",
          bytes, results.owner.get());
  return results;
}

std::vector<std::string> Buffer::Impl::exchange(const char* operation,
                                                const std::function<std::string()>& step,
                                                const char* agreed) {
  // What each rank gives begins with "+", or is "-" and the reason.
  std::string mine;
  std::exception_ptr error;
  try {
    mine = "+" + step();
  } catch (const std::exception& failure) {
    error = std::current_exception();
    mine = std::string("-") + failure.what();
  }
  std::vector<std::string> all = bootstrap_->all_gather(mine);
  if (error) std::rethrow_exception(error);
  require(all.size() == static_cast<std::size_t>(bootstrap_->size()),
          "bootstrap: all_gather returned {} elements, must be one for each of {} ranks",
          all.size(), bootstrap_->size());
  for (int i = 0; i < static_cast<int>(all.size()); ++i) {
    if (all[i].empty() || all[i][0] != '+') {
      throw Error(ErrorCode::kPeerFailed,
                  fmt::format("{} failed on rank {}: {}", operation, i,
                              all[i].empty() ? "" : all[i].substr(1)),
                  {i});
    }
    all[i].erase(0, 1);
    // Places of messages follow from it on all ranks.
    if (agreed == nullptr || all[i] == all[0]) continue;
    throw Error(ErrorCode::kDisagreement,
                fmt::format("{} is {} on rank 0 and {} on rank {}, must be the same on all ranks",
                            agreed, all[0], all[i], i),
                {i});
  }
  return all;
}

void Buffer::Impl::reserve(std::int64_t bytes) {
  const Usage usage(*this, "reserve");
  check_fault("reserve");
  std::vector<int> num_segments;
  for (const std::string& one : exchange("reserve", [&] {
         require(bytes >= 0, "bytes is {}, must not be negative", bytes);
         backend_->reserve(bytes);
         return std::to_string(backend_->num_segments());
       }))
    num_segments.push_back(std::stoi(one));
  (void)exchange("reserve", [&] {
    backend_->wait_mapped(num_segments);
    return std::string();
  });
}

Tensor Buffer::Impl::allocate_mapped(std::int64_t bytes) {
  if (!backend_) throw Error(ErrorCode::kUsage, "allocate_mapped: the Buffer is destroyed");
  require(bytes >= 1, "bytes is {}, must be at least 1", bytes);
  const Backend::Results results = backend_->allocate_mapped(bytes);
  return {TensorView(results.data, DType::kUint8, {bytes}, options_.device), results.owner};
}

}  // namespace deep_ep
