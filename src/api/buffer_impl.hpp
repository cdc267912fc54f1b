#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>

#include "api/operation_log.hpp"
#include "backend/backend.hpp"
#include "base/nvtx.hpp"
#include "deep_ep/buffer.hpp"

namespace deep_ep {

/// The Buffer behind its public face: keeps the order of calls, numbers them, and turns what goes
/// wrong into faults.
class __attribute__((visibility("hidden"))) Buffer::Impl {  // a member of an exported class
 public:
  Impl(std::shared_ptr<Bootstrap> bootstrap, const BufferOptions& options);
  ~Impl();

  void sync();
  void destroy();
  DispatchLayout get_dispatch_layout(const TensorView& topk_idx, int num_experts,
                                     const CallOptions& options);
  DispatchResult intranode_dispatch(const DispatchArgs& args);
  CombineResult intranode_combine(const CombineArgs& args);
  void barrier();
  void reserve(std::int64_t bytes);
  void check() const;
  Tensor allocate_mapped(std::int64_t bytes);

  std::shared_ptr<Bootstrap> bootstrap_;
  BufferOptions options_;
  std::unique_ptr<Backend> backend_;  // null once destroyed
  OperationLog log_;

 private:
  struct DispatchJob;
  struct CombineJob;

  /// Marks a call as running; refuses overlap and use after destroy with Error(kUsage), which
  /// touches no peer.
  class Usage {
   public:
    Usage(Impl& impl, const char* operation);
    ~Usage() { impl_.in_call_.store(false, std::memory_order_release); }

   private:
    Impl& impl_;
  };

  /// Runs the body of a collective call. An Error of it is a fault of this Buffer on all ranks.
  template <class Body>
  auto collective(const char* operation, Body&& body) {
    const Usage usage(*this, operation);
    const NvtxRange range(operation);
    check_fault(operation);
    ++epoch_;
    return fail_together(operation, body);
  }

  /// Runs `body`; what it throws is told to the other ranks, std::bad_alloc too.
  template <class Body>
  auto fail_together(const char* operation, Body&& body) {
    try {
      return body();
    } catch (const Error& error) {
      fail(error);
      throw;
    } catch (const std::bad_alloc&) {
      const Error error = no_memory(operation);
      fail(error);
      throw error;
    }
  }

  std::string allocate_and_export();
  /// A stage of call `number` on the communication stream: its Error becomes a fault, and is
  /// logged, wherever it runs.
  std::function<void()> stage(std::uint64_t number, bool last, std::function<void()> body);
  static Error no_memory(const char* operation);
  void check_fault(const char* operation) const;
  void fail(const Error& error) noexcept;
  Call make_call(const char* operation, const Config& config) const;

  /// The views with data, and a block that peers can write: from the caller's allocator, if there
  /// is one and it gives any.
  std::vector<Tensor> allocate(std::vector<TensorView> views, const CallOptions& options);
  Backend::Results allocate_results(std::int64_t bytes, const CallOptions& options);
  internode::LayoutParams allocate_layout(const TensorView& topk_idx, int num_experts,
                                          const CallOptions& options, DispatchLayout& layout);
  std::shared_ptr<DispatchJob> prepare_dispatch(const DispatchArgs& args);
  void prepare_notify(DispatchJob& job);
  void place_results(DispatchJob& job, std::int64_t rows);
  void place_handle(DispatchJob& job, std::int64_t rows);
  void notify(DispatchJob& job);

  std::uint64_t epoch_ = 0;
  std::atomic<bool> in_call_{false};
  std::atomic<bool> dumped_{false};
  // What the call threw that failed here, so that later ones throw the same, whatever else was
  // reported meanwhile.
  mutable std::mutex first_error_mutex_;
  std::optional<Error> first_error_;
};

}  // namespace deep_ep
