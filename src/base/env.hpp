#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

namespace deep_ep::env {

/// Every environment variable that the library reads, in one list: `deepep info --env` prints it,
/// docs/env.md is made from it.
struct Variable {
  const char* name;
  const char* default_value;
  const char* meaning;
};
std::span<const Variable> variables();
/// What the environment holds, unchecked; null if the variable is not there.
const char* value_of(const Variable& variable);

// Read at each call, so that a Buffer sees what was set before its construction. Throw
// Error(kInvalidArgument) naming the variable and its value.
std::int64_t timeout_ms();  // DEEP_EP_TIMEOUT_MS
/// The most that a timeout may be, given here or by a caller: a year, so that deadlines in ns stay
/// far from 2^63.
constexpr std::int64_t kMaxTimeoutMs = std::int64_t{365} * 24 * 3600 * 1000;
/// A caller's timeout; throws Error(kInvalidArgument) if it is not from `least` to the most.
std::chrono::milliseconds require_timeout(std::chrono::milliseconds timeout, std::int64_t least);
int num_threads();           // DEEP_EP_NUM_THREADS, 0: choose
int ranks_per_node();        // DEEP_EP_RANKS_PER_NODE, 0: find
std::int64_t inbox_bytes();  // DEEP_EP_INBOX_BYTES
enum class CombinePath : std::int32_t { kAuto, kPull, kRing };
CombinePath combine_path();       // DEEP_EP_COMBINE
std::uint64_t first_ticket();     // DEEP_EP_FIRST_TICKET
bool nvshmem_puts_only();         // DEEP_EP_NVSHMEM_PUTS_ONLY
std::string log_level();          // DEEP_EP_LOG_LEVEL
std::string log_file();           // DEEP_EP_LOG_FILE, "": stderr
std::string dump_directory();     // DEEP_EP_DUMP_DIR, "": no dump on a fault
std::string rendezvous_secret();  // DEEP_EP_RENDEZVOUS_SECRET, "": none

/// The process's place as the launcher's variables tell it; unset without a launcher.
struct Launch {
  int rank = 0;
  int size = 1;
  std::string address;  // MASTER_ADDR
  int port = 0;         // DEEP_EP_RENDEZVOUS_PORT, else MASTER_PORT
};
std::optional<Launch> launch();

}  // namespace deep_ep::env
