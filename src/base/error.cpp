#include "base/error.hpp"

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace deep_ep {

Error::Error(ErrorCode code, const std::string& what, std::vector<int> ranks)
    : std::runtime_error(what), code_(code), ranks_(std::move(ranks)) {
  std::sort(ranks_.begin(), ranks_.end());
}

Error::~Error() = default;

const char* to_string(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return "invalid argument";
    case ErrorCode::kDisagreement:
      return "disagreement";
    case ErrorCode::kTimeout:
      return "timeout";
    case ErrorCode::kPeerFailed:
      return "peer failed";
    case ErrorCode::kOutOfMemory:
      return "out of memory";
    case ErrorCode::kCapacity:
      return "capacity";
    case ErrorCode::kUsage:
      return "usage";
    case ErrorCode::kUnsupported:
      return "unsupported";
    case ErrorCode::kSystem:
      return "system";
  }
  return "unknown";
}

void throw_errno(std::string_view what) {
  const int number = errno;
  throw Error(ErrorCode::kSystem,
              fmt::format("{}: {} (errno {})", what,
                          std::error_code(number, std::generic_category()).message(), number));
}

}  // namespace deep_ep
