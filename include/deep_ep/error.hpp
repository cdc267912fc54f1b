#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "deep_ep/export.hpp"

namespace deep_ep {

/// Why a call failed. The text of the Error names the argument or the rank, its value, and what is
/// allowed.
enum class ErrorCode : std::uint32_t {
  kInvalidArgument = 1,  ///< a value of this rank's call is not allowed
  kDisagreement = 2,     ///< ranks called with different shapes, dtypes or operations
  kTimeout = 3,          ///< a rank did not arrive within the timeout
  kPeerFailed = 4,       ///< another rank refused its call, died, or destroyed its Buffer
  kOutOfMemory = 5,      ///< a segment (the text has the sizes) or bookkeeping got no memory
  kCapacity = 6,         ///< num_worst_tokens is below the number of received tokens
  kUsage = 7,            ///< use after destroy, overlapping calls; touches no peer
  kUnsupported = 8,      ///< this build or machine cannot do it; the text says what is missing
  kSystem = 9,           ///< an operating system call failed (the text has its name and errno), or
                         ///< something else that threw an exception of its own
};

DEEP_EP_API const char* to_string(ErrorCode code);

/// The one exception type of the library.
class DEEP_EP_API Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& what, std::vector<int> ranks = {});
  ~Error() override;

  ErrorCode code() const noexcept { return code_; }
  /// The ranks that are to blame (missing, dead or disagreeing), ascending; may be empty.
  const std::vector<int>& ranks() const noexcept { return ranks_; }

 private:
  ErrorCode code_;
  std::vector<int> ranks_;
};

}  // namespace deep_ep
