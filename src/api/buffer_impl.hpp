#pragma once

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <utility>

#include "api/operation_log.hpp"
#include "api/row_forecast.hpp"
#include "backend/backend.hpp"
#include "base/nvtx.hpp"
#include "base/recycled.hpp"
#include "deep_ep/buffer.hpp"

namespace deep_ep {

struct LowLatencyDispatchShape;

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
  PreparedDispatch prepare_dispatch(const DispatchArgs& args);
  DispatchResult intranode_dispatch(const DispatchArgs& args);
  CombineResult intranode_combine(const CombineArgs& args);
  DispatchResult internode_dispatch(const DispatchArgs& args);
  CombineResult internode_combine(const CombineArgs& args);
  LowLatencyDispatchResult low_latency_dispatch(const LowLatencyDispatchArgs& args);
  LowLatencyCombineResult low_latency_combine(const LowLatencyCombineArgs& args);
  Tensor get_next_low_latency_combine_buffer(const LowLatencyHandle& handle);
  const Tensor& zero_copy_rows(const TensorView& x, std::uint64_t number) const;
  /// Between nodes it takes memory that only those get who ask for it.
  bool has_low_latency() const { return topology_.num_nodes() == 1 || options_.low_latency_mode; }
  /// Throws Error(kUnsupported) for a call that touches no peer then.
  void require_low_latency(const char* operation) const;
  void low_latency_mask(const char* operation, const std::function<void()>& body);
  /// Throws Error(kUnsupported) for a call that touches no peer then.
  void require_one_node(const char* operation) const;
  void barrier();
  void reserve(std::int64_t bytes);
  void check() const;
  Tensor allocate_mapped(std::int64_t bytes);

  std::shared_ptr<Bootstrap> bootstrap_;
  BufferOptions options_;
  plan::Topology topology_;
  std::unique_ptr<Backend> backend_;  // null once destroyed
  OperationLog log_;

 private:
  struct AnyDispatchJob;
  struct DispatchJob;
  struct AnyCombineJob;
  struct CombineJob;
  struct InternodeDispatchJob;
  struct InternodeCombineJob;
  struct LowLatencyDispatchJob;
  struct LowLatencyCombineJob;

  /// The low-latency calls of one kind: the call before the last must be received before another
  /// may be sent, since it has the same memory.
  struct LowLatencyCalls {
    std::uint64_t sent = 0;
    bool live[2] = {false, false};  // by parity: sent, its hook not run
  };

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

  /// Runs `body`; what it throws, of whatever type, is told to the other ranks.
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
    } catch (const std::exception& error) {  // of a caller's allocator, say
      fail(failed(operation, error.what()));
      throw;
    } catch (...) {
      fail(failed(operation, "an exception that is no std::exception"));
      throw;
    }
  }

  /// Runs the body of a low-latency call, which counts for itself.
  template <class Body>
  auto low_latency(const char* operation, LowLatencyCalls& calls, Body&& body) {
    const Usage usage(*this, operation);
    const NvtxRange range(operation);
    check_fault(operation);
    refuse_third(operation, calls);
    return fail_together(operation, [&] {
      ++calls.sent;
      return body();
    });
  }
  static void refuse_third(const char* operation, const LowLatencyCalls& calls);
  Call low_latency_call(const char* operation, const LowLatencyCalls& calls,
                        const protocol::CallRecord& record) const;
  static void fill_params(LowLatencyDispatchJob& job, const LowLatencyDispatchShape& shape);
  /// Sends and receives, or only sends; then `hook` receives.
  template <class Job>
  EventHandle submit_low_latency(LowLatencyCalls& calls, const std::shared_ptr<Job>& job,
                                 std::function<void()>& hook);

  /// What a call returns. Its job has it too, for the stages, unless none is left that holds the
  /// job: then it is moved, since a copy counts up every owner of memory. Not of an asynchronous
  /// call: its stages may have been another thread's, whose last look a count does not order.
  template <class Job>
  static auto take_result(const std::shared_ptr<Job>& job) {
    if (!job->args.options.async_finish && job.use_count() == 1) return std::move(job->result);
    return job->result;
  }

  /// Collective: every rank's outcome of `step`, in rank order. A failure of it on one rank throws
  /// on all, and so do outcomes that differ if they are what the ranks must have `agreed` on.
  std::vector<std::string> exchange(const char* operation, const std::function<std::string()>& step,
                                    const char* agreed = nullptr);
  /// Topology and transport, from every rank's unique id.
  void find_nodes(const std::vector<std::string>& ids);
  std::string allocate_and_export();
  /// A stage of call `number` on the communication stream, which is submitted with `options`: its
  /// Error becomes a fault, and is logged, wherever it runs.
  std::function<void()> stage(std::uint64_t number, bool last, const CallOptions& options,
                              std::function<void()> body);
  void end_calls();
  static Error no_memory(const char* operation);
  Error failed(const char* operation, const char* what) const;
  void check_fault(const char* operation) const;
  void fail(const Error& error) noexcept;
  Call make_call(const char* operation, const Config& config) const;

  /// The views with data, never of memory that peers map with `allocate_private`, and a block that
  /// peers can write: from the caller's allocator, if there is one and it gives any.
  std::vector<Tensor> allocate(std::vector<TensorView> views, const CallOptions& options);
  std::vector<Tensor> allocate_private(std::vector<TensorView> views, const CallOptions& options);
  std::vector<Tensor> ask_allocator(std::vector<TensorView>& views, const CallOptions& options);
  Backend::Results allocate_results(std::int64_t bytes, const CallOptions& options);
  internode::LayoutParams allocate_layout(const TensorView& topk_idx, int num_experts,
                                          const CallOptions& options, DispatchLayout& layout);
  std::shared_ptr<DispatchJob> make_dispatch(const char* operation, const DispatchArgs& args);
  void make_notify(DispatchJob& job);
  /// What the result has of counts; waits for them if they are not known. True: the dispatch is
  /// queued by then, its results are placed.
  bool find_counts(const std::shared_ptr<DispatchJob>& job);
  /// Places results ahead of the counts, for as many rows as are likely to come; false: not.
  bool place_ahead(DispatchJob& job);
  /// Results that were placed for more rows than came: what callers see of them.
  static void cut_results(DispatchJob& job, std::int64_t rows);
  /// Submits a stage of a call that is not its last, and is not asynchronous.
  void submit_now(const AnyDispatchJob& job, Backend::Part part, std::function<void()> work);
  /// Puts counts that are known by now into the result.
  static void take_counts(AnyDispatchJob& job);
  /// Waits for those of a notify that has been submitted.
  void await_counts(DispatchJob& job);
  PreparedDispatch intranode_prepare(const DispatchArgs& args);
  PreparedDispatch internode_prepare(const DispatchArgs& args);
  /// Whose counts have been waited for; without the handle.
  PreparedDispatch take_prepared(AnyDispatchJob& job, const protocol::CallRecord& record);
  void place_results(AnyDispatchJob& job, DispatchStep& dispatch, std::int64_t rows);
  /// Of `rows` received rows at most, `num_received_rows` of them by the device's word.
  void allocate_groups(AnyDispatchJob& job, const DispatchStep& dispatch, std::int64_t rows,
                       const std::int32_t* num_received_rows);
  static void set_arrays(AnyDispatchJob& job, const DispatchStep& dispatch);
  std::int64_t choose_grouped_rows(const AnyDispatchJob& job) const;
  void place_handle(DispatchJob& job, std::int64_t rows);
  void notify(DispatchJob& job);
  void place_sums(const CombineArgs& args, CombineStep& step, CombineResult& result);
  void reduce_first(AnyCombineJob& job, CombineStep& params, const std::int32_t* num_received_rows);
  std::shared_ptr<InternodeDispatchJob> make_internode_dispatch(const char* operation,
                                                                const DispatchArgs& args);
  void make_internode_notify(InternodeDispatchJob& job);
  void place_internode_handle(InternodeDispatchJob& job, std::int64_t rows, std::int64_t records);
  void internode_notify(InternodeDispatchJob& job);
  /// Rows that come and records to pass on, if they are known or can be waited for.
  struct InternodeCounts {
    std::int64_t rows;
    std::int64_t records;
  };
  InternodeCounts find_internode_counts(const std::shared_ptr<InternodeDispatchJob>& job);

  int ranks_on_host_ = 1;
  bool one_process_ = false;
  std::uint64_t epoch_ = 0;
  RowForecast row_forecast_;
  LowLatencyCalls low_latency_dispatches_;
  LowLatencyCalls low_latency_combines_;
  Tensor zero_copy_[2];  // by parity of the combine that reads it
  std::vector<Tensor> outgrown_zero_copy_;
  std::uint64_t zero_copy_for_ = 0;  // the combine for which one was asked for last
  std::shared_ptr<Impl*> self_ = std::make_shared<Impl*>(this);  // null in hooks once destroyed
  std::atomic<bool> in_call_{false};
  std::mutex destroy_mutex_;
  const pid_t pid_ = getpid();
  std::atomic<bool> dumped_{false};
  // What the call threw that failed here, so that later ones throw the same, whatever else was
  // reported meanwhile.
  mutable std::mutex first_error_mutex_;
  std::optional<Error> first_error_;
};

}  // namespace deep_ep
