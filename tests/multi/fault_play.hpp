#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "contract/keepsake.hpp"
#include "contract/pool.hpp"
#include "deep_ep/deep_ep.hpp"

// What the ranks of the fault tests have in common.
namespace deep_ep::test {

/// kCombineOwn: from memory of the caller; kCombine: from the results of the dispatch. kLowLatency:
/// a dispatch and its combine.
enum class Op { kBarrier, kDispatch, kCachedDispatch, kCombine, kCombineOwn, kLowLatency };
/// The name under which an Error must speak of the operation.
const char* to_string(Op op);

/// Inputs of small calls of one rank; every token goes to every rank.
class Exchange {
 public:
  static constexpr std::int64_t kTokens = 40;
  static constexpr std::int64_t kHidden = 256;

  Exchange(int rank, int num_ranks, std::int64_t tokens = kTokens, std::int64_t hidden = kHidden);

  /// num_rdma_bytes of a Buffer for kLowLatency.
  static std::int64_t rdma_bytes(int num_ranks, std::int64_t tokens = kTokens,
                                 std::int64_t hidden = kHidden);

  /// `with_layout`: it is found here; else the call is to find it.
  DispatchArgs dispatch_args(Buffer& buffer, bool with_layout = true) const;
  /// `dispatched` must outlive the call.
  static CombineArgs combine_args(const DispatchResult& dispatched);
  static DispatchArgs cached_args(const Exchange& exchange, const DispatchResult& dispatched);

  /// One call; `dispatched` is an earlier dispatch of this exchange.
  void run(Buffer& buffer, Op op, const DispatchResult& dispatched) const;

  void run_low_latency(Buffer& buffer) const;

  int num_ranks;
  std::int64_t tokens;
  std::int64_t hidden;
  std::vector<float> x;
  std::vector<std::int64_t> topk_idx;
  std::vector<float> topk_weights;
  mutable std::vector<float> outputs;  // of the last kCombineOwn
};

/// Among all ranks of the job, which pose as nodes of so many; 0: as one node.
std::unique_ptr<Buffer> make_buffer(Worker& worker, const BufferOptions& options,
                                    int ranks_per_node);

/// An Error that a call threw, and after how long.
struct Thrown {
  ErrorCode code{};
  std::string text{};
  std::vector<int> ranks{};
  std::chrono::milliseconds after{0};
};

/// Every rank has answered, and found nothing wrong.
void expect_all_well(const std::vector<Outcome>& outcomes);

/// Nothing if `call` throws no Error.
std::optional<Thrown> thrown_by(const std::function<void()>& call);

/// Collects what is not as it should be; the answer of a rank.
class Findings {
 public:
  void expect(bool ok, const std::string& what) {
    if (!ok) text_ += (text_.empty() ? "" : "; ") + what;
  }
  void expect_contains(const std::string& text, const std::string& part) {
    expect(text.find(part) != std::string::npos, "'" + part + "' is missing in '" + text + "'");
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

/// File descriptors and mapped segments of this process.
struct Belongings {
  int descriptors = 0;
  int segments = 0;
  static Belongings count();
};

/// Nothing is left behind: as many descriptors and segments as before.
void check_belongings(Findings& findings, const Belongings& before);

/// What must hold on every rank whose Buffer is faulted: the Error repeats, earlier results are
/// intact, destroy returns within `patience`.
void check_aftermath(Findings& findings, Buffer& buffer, const Keepsakes& kept, const Thrown& fault,
                     std::chrono::milliseconds patience = std::chrono::seconds(5));

/// A new Buffer among `ranks` works.
void check_new_buffer(Findings& findings, Worker& worker, const std::vector<int>& ranks);

}  // namespace deep_ep::test
