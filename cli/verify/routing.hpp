#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace deep_ep::verify {

/// Which experts a token's top-k names. Distinct experts unless said otherwise.
enum class Routing {
  kUniform,     ///< drawn uniformly
  kZipf,        ///< expert e with probability ~ 1 / (e + 1)^skew: a few experts are hot
  kGrouped,     ///< at most two ranks a token, as group-limited gating gives
  kAllToAll,    ///< entry k lies on rank k % R: with topk >= R every token goes to every rank
  kToRankZero,  ///< all experts on rank 0
  kToSelf,      ///< all experts on the token's own rank
  kNone,        ///< every entry is -1
  kHoles,       ///< uniform; half of the entries and every eighth token replaced by -1
  kDuplicates,  ///< uniform, each entry repeated: experts k and k + 1 of a token are one
};
const char* to_string(Routing routing);
/// Throws Error(kInvalidArgument) listing the names.
Routing routing_from(std::string_view name);

struct RoutingSpec {
  Routing routing = Routing::kUniform;
  std::int64_t tokens = 0;
  int topk = 1;
  int experts = 1;
  int ranks = 1;
  int rank = 0;
  std::uint64_t seed = 1;
  double skew = 1.0;  ///< of kZipf
};

/// Expert ids [tokens, topk] of one rank. Where a token has fewer experts to choose from than topk,
/// they repeat.
std::vector<std::int64_t> make_routing(const RoutingSpec& spec);

}  // namespace deep_ep::verify
