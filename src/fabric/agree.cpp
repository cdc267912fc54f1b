#include "fabric/agree.hpp"

#include <cstring>

#include "base/error.hpp"

namespace deep_ep::fabric {

void fail_together(Bootstrap& bootstrap, const std::optional<Error>& mine) {
  std::string verdict;
  if (mine) {
    const ErrorCode code = mine->code();
    verdict.assign(reinterpret_cast<const char*>(&code), sizeof(code));
    verdict += mine->what();
  }
  const auto verdicts = bootstrap.all_gather(verdict);
  if (mine) throw Error(*mine);
  std::vector<int> failed;
  for (std::size_t rank = 0; rank < verdicts.size(); ++rank) {
    if (!verdicts[rank].empty()) failed.push_back(static_cast<int>(rank));
  }
  if (failed.empty()) return;
  const std::string& first = verdicts[failed.front()];
  ErrorCode code{};
  std::memcpy(&code, first.data(), sizeof(code));
  throw Error(code, fmt::format("rank {}: {}", failed.front(), first.substr(sizeof(code))), failed);
}

}  // namespace deep_ep::fabric
