#include "verify/low_latency_case.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>

#include "base/error.hpp"
#include "plan/numerics.hpp"
#include "verify/low_latency_expected.hpp"

namespace deep_ep::verify {

namespace {

constexpr std::array kPayloads{"bf16", "fp8",   "fp8-rounded", "fp8-ue8m0",    "fp16",
                               "fp32", "bytes", "scaled-fp8",  "scaled-packed"};
constexpr std::array kWires{"bf16", "logfmt", "fp8"};
constexpr std::array kHooks{"none",         "each",        "two-in-order",
                            "two-reversed", "two-by-rank", "crossed"};

template <class Names>
std::size_t index_of(const Names& names, std::string_view what, std::string_view name) {
  const auto at = std::find(names.begin(), names.end(), name);
  require(at != names.end(), "{} '{}' is unknown; allowed: {}", what, name, fmt::join(names, ", "));
  return static_cast<std::size_t>(at - names.begin());
}

}  // namespace

const char* to_string(LowLatencyPayload payload) {
  return kPayloads[static_cast<std::size_t>(payload)];
}
LowLatencyPayload low_latency_payload_from(std::string_view name) {
  return static_cast<LowLatencyPayload>(index_of(kPayloads, "payload", name));
}

const char* to_string(plan::WireFormat wire) { return kWires[static_cast<std::size_t>(wire)]; }
plan::WireFormat wire_from(std::string_view name) {
  return static_cast<plan::WireFormat>(index_of(kWires, "wire", name));
}

const char* to_string(Hooks hooks) { return kHooks[static_cast<std::size_t>(hooks)]; }
Hooks hooks_from(std::string_view name) {
  return static_cast<Hooks>(index_of(kHooks, "hooks", name));
}

std::int64_t LowLatencyCase::capacity() const {
  if (max_tokens > 0) return max_tokens;
  return std::max<std::int64_t>(*std::max_element(tokens.begin(), tokens.end()), 1);
}

// The size hint knows rows of bfloat16, which fp32 exceeds.
std::int64_t LowLatencyCase::buffer_bytes() const {
  const std::int64_t values = payload == LowLatencyPayload::kFloat32 ? 2 * hidden : hidden;
  return Buffer::get_low_latency_rdma_size_hint(static_cast<int>(capacity()), values, ranks,
                                                experts, topk);
}

std::string LowLatencyCase::describe() const {
  const auto flag = [](bool on, const char* text) { return on ? text : ""; };
  return fmt::format(
      "low latency: ranks={}{} tokens={} max={} hidden={} payload={} topk={} experts={} routing={} "
      "seed={} {} {} wire={} dispatches={} combines={} hooks={}{}{}{}{}{}{}{}",
      ranks, ranks_per_node > 0 ? fmt::format(" ranks_per_node={}", ranks_per_node) : "",
      fmt::join(tokens, ","), capacity(), hidden, to_string(payload), topk, experts,
      to_string(routing), seed, to_string(topk_dtype), rank_major ? "rank-major" : "expert-major",
      to_string(wire), dispatches, combines, to_string(hooks), flag(!weights, " no-weights"),
      flag(async, " async"), flag(zero_copy, " zero-copy"), flag(own_outputs, " own-outputs"),
      flag(clone_handle, " cloned-handle"), flag(stats, " stats"),
      masked == kNobody ? "" : fmt::format(" masked={}", masked));
}

void validate(const LowLatencyCase& c) {
  require(c.ranks >= 1, "ranks = {} must be at least 1", c.ranks);
  require(c.ranks_per_node == 0 || c.ranks % c.ranks_per_node == 0,
          "ranks_per_node = {} must divide the {} ranks", c.ranks_per_node, c.ranks);
  require(c.tokens.size() == 1 || c.tokens.size() == static_cast<std::size_t>(c.ranks),
          "tokens has {} entries; allowed: 1 or one for each of the {} ranks", c.tokens.size(),
          c.ranks);
  for (const std::int64_t tokens : c.tokens)
    require(tokens >= 0 && tokens <= c.capacity(), "tokens = {} must be in [0, {}]", tokens,
            c.capacity());
  const LowLatencyRows rows(c);
  require(c.hidden > 0 && c.hidden % 8 == 0 &&
              c.hidden * static_cast<std::int64_t>(size_of(rows.x_dtype)) % 16 == 0,
          "hidden = {} must give rows of a positive multiple of 16 bytes in bfloat16 and in {}",
          c.hidden, to_string(c.payload));
  require(!rows.use_fp8 || c.hidden % plan::kFp8Group == 0,
          "hidden = {} must be a multiple of {} for payload {}", c.hidden, plan::kFp8Group,
          to_string(c.payload));
  require(c.wire == plan::WireFormat::kBfloat16 || c.hidden % plan::kWireGroup == 0,
          "hidden = {} must be a multiple of {} for wire {}", c.hidden, plan::kWireGroup,
          to_string(c.wire));
  require(c.experts > 0 && c.experts % c.ranks == 0,
          "experts = {} must be a positive multiple of ranks = {}", c.experts, c.ranks);
  require(c.topk >= 1, "topk = {} must be at least 1", c.topk);
  require(c.dispatches >= 1 && c.combines >= 0, "dispatches = {}, combines = {}", c.dispatches,
          c.combines);
  require(!c.async || c.hooks == Hooks::kNone, "async excludes hooks");
  require(c.masked < c.ranks, "masked = {} of {} ranks", c.masked, c.ranks);
}

}  // namespace deep_ep::verify
