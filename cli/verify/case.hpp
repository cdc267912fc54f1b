#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "deep_ep/deep_ep.hpp"
#include "verify/routing.hpp"

// One exchange (layout, dispatch, cached dispatches, combines) on a Buffer, checked bitwise against
// plan/reference. Every input is a function of (seed, rank), so that each rank knows all ranks'
// inputs without communication and computes what it must receive by itself.
namespace deep_ep::verify {

/// Dtype and memory order of the scales that go with x.
enum class Scales { kNone, kFloat32, kFloat32ColumnMajor, kPacked, kPackedColumnMajor };

/// Where the results of a dispatch lie: where the library puts them, in memory of the caller that
/// peers do not map, in a result of another dispatch, or by turns on even ranks there and on odd
/// ones in memory that peers do not map.
enum class Outputs { kLibrary, kPrivate, kInResults, kMixed };

/// Whether rows are grouped by expert, and if so whether combine weighs them.
enum class Groups { kNone, kWeighted, kUnweighted };

struct Case {
  /// For num_worst_tokens: exactly the sum of all ranks' tokens.
  static constexpr std::int64_t kWorstFits = -1;

  std::string name{};
  int ranks = 1;
  int ranks_per_node = 0;                ///< of the Buffer; 0: all ranks are of one node
  std::vector<std::int64_t> tokens{64};  ///< N of each rank; one entry: the same on all
  std::int64_t hidden = 256;
  DType dtype = DType::kBfloat16;          ///< of dispatch; kUint8 for opaque bytes
  DType combine_dtype = DType::kBfloat16;  ///< bfloat16, float16 or float32
  Scales scales = Scales::kNone;
  int num_scales = 0;  ///< 0: one for each 128 values, at least 1
  int topk = 8;
  int experts = 32;
  Routing routing = Routing::kUniform;
  std::uint64_t seed = 1;
  DType topk_dtype = DType::kInt64;  ///< int64 or int32
  bool pass_topk = true;             ///< false: dispatch is given the layout only
  bool weights = true;               ///< topk_weights in dispatch (with pass_topk) and in combine
  int biases = 0;                    ///< 0, 1 or 2
  int expert_alignment = 1;
  std::int64_t num_worst_tokens = 0;  ///< needs pass_topk; kWorstFits or a number
  int cached_repeats = 1;             ///< cached dispatches after the first, each with new rows
  int combines = 1;                   ///< each with new rows
  bool async = false;                 ///< async_finish, chained by previous_event
  bool clone_handle =
      false;  ///< cached dispatch and combine get deep copies of the handle's tensors
  bool hold_results = false;  ///< all results stay live to the end and are then compared once more
  bool wait_stats = false;    ///< pass the wait statistics; they may only grow
  bool prepare = false;       ///< counts by prepare_dispatch; without num_worst_tokens
  Outputs outputs = Outputs::kLibrary;
  Groups groups = Groups::kNone;  ///< needs pass_topk, and weights to be weighted
  Config config{};                ///< of dispatch
  Config late_config{};  ///< of the cached dispatches and combines; differing num_sms is legal

  int node_size() const { return ranks_per_node == 0 ? ranks : ranks_per_node; }
  std::int64_t tokens_of(int rank) const {
    return tokens.size() == 1 ? tokens[0] : tokens[static_cast<std::size_t>(rank)];
  }
  /// The numbers in one line, for messages and for repeating the case by hand.
  std::string describe() const;
};

/// What this rank found.
struct CaseResult {
  std::int64_t checked_elements = 0;
  std::int64_t wrong_elements = 0;
  std::int64_t checked_outputs = 0;
  /// Output, index, got and expected of the first mismatch; empty if there is none.
  std::string first_mismatch{};

  bool passed() const { return wrong_elements == 0 && first_mismatch.empty(); }
  void merge(const CaseResult& other);
};

/// Throws Error(kInvalidArgument) naming the field if no Buffer could run the case.
void validate(const Case& c);

/// Collective: all ranks of `buffer` call it with the same case. Runs layout, dispatch, cached
/// dispatches and combines and compares every output: values, dtypes, shapes, each handle tensor's
/// documented meaning, and that inputs and handles were left unchanged. A wrong output does not
/// stop the run, so ranks stay in step. Throws what the Buffer throws.
CaseResult run_case(Buffer& buffer, const Case& c);

}  // namespace deep_ep::verify
