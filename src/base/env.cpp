#include "base/env.hpp"

#include <array>
#include <charconv>
#include <cstdlib>
#include <limits>
#include <string_view>

#include "base/error.hpp"

namespace deep_ep::env {
namespace {

constexpr auto kVariables = std::to_array<Variable>({
    {"DEEP_EP_TIMEOUT_MS", "100000",
     "How long one wait for other ranks may take, in ms; a Buffer's own timeout wins."},
    {"DEEP_EP_NUM_THREADS", "0",
     "Host worker threads of a rank; 0: the cores divided by the ranks of this machine."},
    {"DEEP_EP_RANKS_PER_NODE", "0",
     "Ranks that form one node, neighbours each; 0: those of one host and network namespace. Ranks "
     "of "
     "one host can pose as several nodes."},
    {"DEEP_EP_INBOX_BYTES", "4194304",
     "Bytes of the memory through which a rank receives rows that cannot be written to their final "
     "place."},
    {"DEEP_EP_COMBINE", "auto",
     "How the host's combine fetches rows: pull (reads them from the experts' ranks, which takes "
     "the rights of ptrace), ring (through the inbox) or auto (pull where all ranks can)."},
    {"DEEP_EP_FIRST_TICKET", "1",
     "Number of a Buffer's first low-latency calls, the same on all ranks. For tests of "
     "what happens where numbers wrap."},
    {"DEEP_EP_NVSHMEM_PUTS_ONLY", "0",
     "1: between nodes of GPUs rows always go by NVSHMEM's puts, also to memory that is mapped, "
     "which kernels else write themselves. For tests of what a network takes."},
    {"DEEP_EP_LOG_LEVEL", "warn", "trace, debug, info, warn, error or off."},
    {"DEEP_EP_LOG_FILE", "",
     "File that log lines are appended to; %p is the process id, %h the host. Empty: stderr."},
    {"DEEP_EP_DUMP_DIR", "",
     "Directory into which a faulted rank writes its last operations as JSON. Empty: no dump."},
    {"DEEP_EP_RENDEZVOUS_SECRET", "",
     "Word that all ranks of a TCP rendezvous must share. It crosses the network in clear: it "
     "keeps "
     "jobs apart, not eavesdroppers out."},
    {"DEEP_EP_RENDEZVOUS_PORT", "",
     "Port of the TCP rendezvous. Empty: MASTER_PORT, but under torchrun, whose agent holds that, "
     "the next one, or from 32768 on, where systems take ports, 12288 + MASTER_PORT % 16384."},
    {"RANK", "", "Rank of this process (torchrun)."},
    {"WORLD_SIZE", "", "Number of ranks (torchrun)."},
    {"OMPI_COMM_WORLD_RANK", "", "Rank of this process (Open MPI), if RANK is not set."},
    {"OMPI_COMM_WORLD_SIZE", "", "Number of ranks (Open MPI)."},
    {"OMPI_COMM_WORLD_LOCAL_SIZE", "",
     "Ranks of this machine (Open MPI): with fewer than all, MASTER_ADDR must be set."},
    {"PMIX_RANK", "",
     "Rank of this process (PMIx), if none of the above is set; needs WORLD_SIZE or SLURM_NTASKS."},
    {"SLURM_PROCID", "", "Rank of this process (Slurm), if none of the above is set."},
    {"SLURM_NTASKS", "", "Number of ranks (Slurm)."},
    {"SLURM_STEP_NUM_NODES", "",
     "Machines of the ranks (Slurm): with more than one, MASTER_ADDR must be set."},
    {"MASTER_ADDR", "127.0.0.1", "Address at which rank 0 listens for the others."},
    {"MASTER_PORT", "29477", "Port at which rank 0 listens for the others."},
    {"TORCHELASTIC_USE_AGENT_STORE", "",
     "Set to True by torchrun when its agent holds MASTER_PORT."},
});

const Variable& find(std::string_view name) {
  for (const Variable& variable : kVariables)
    if (name == variable.name) return variable;
  throw Error(ErrorCode::kUsage, fmt::format("{} is not in the list of variables", name));
}

/// An empty variable counts as not set.
bool is_set(std::string_view name) {
  const char* value = value_of(find(name));
  return value != nullptr && *value != '\0';
}

/// The value of a variable of the list.
std::string text(std::string_view name) {
  const Variable& variable = find(name);
  return is_set(name) ? value_of(variable) : variable.default_value;
}

std::int64_t integer(std::string_view name, std::int64_t min, std::int64_t max) {
  const std::string value = text(name);
  std::int64_t result = 0;
  const char* end = value.data() + value.size();
  const auto [parsed, error] = std::from_chars(value.data(), end, result);
  require(error == std::errc{} && parsed == end && result >= min && result <= max,
          "{}: '{}' is not allowed, must be an integer from {} to {}", name, value, min, max);
  return result;
}

constexpr int kMaxInt = std::numeric_limits<int>::max();

/// From here on Linux takes ports for connections and for who listens anywhere.
constexpr int kFirstSystemPort = 32768;

/// Another port than torchrun's agent holds, by which all ranks find it. The neighbour of one that
/// the system chose may be taken by any connection, so those have one where the system takes none.
int port_beside(int port) { return port < kFirstSystemPort ? port + 1 : 12288 + port % 16384; }

int port() {
  if (is_set("DEEP_EP_RENDEZVOUS_PORT"))
    return static_cast<int>(integer("DEEP_EP_RENDEZVOUS_PORT", 1, 65535));
  const int port = static_cast<int>(integer("MASTER_PORT", 1, 65535));
  if (text("TORCHELASTIC_USE_AGENT_STORE") != "True") return port;
  return port_beside(port);
}

/// From another machine nobody can guess where rank 0 listens, and ranks would wait for it in vain.
void require_address(bool several_machines, std::string_view told_by) {
  require(!several_machines || is_set("MASTER_ADDR"),
          "{} is {}, so the ranks are on several machines: MASTER_ADDR must be set, to an address "
          "of rank 0's",
          told_by, text(told_by));
}

bool has_ranks_elsewhere(const Launch& launch) {
  constexpr const char* kLocal = "OMPI_COMM_WORLD_LOCAL_SIZE";
  return is_set(kLocal) && integer(kLocal, 1, kMaxInt) < launch.size;
}

bool has_several_machines() {
  constexpr const char* kMachines = "SLURM_STEP_NUM_NODES";
  return is_set(kMachines) && integer(kMachines, 1, kMaxInt) > 1;
}

Launch launch_from(std::string_view rank_name, std::string_view size_name) {
  require(is_set(size_name), "{} is set ('{}'), so {} must be set as well", rank_name,
          text(rank_name), size_name);
  Launch launch;
  launch.size = static_cast<int>(integer(size_name, 1, kMaxInt));
  launch.rank = static_cast<int>(integer(rank_name, 0, launch.size - 1));
  launch.address = text("MASTER_ADDR");
  launch.port = port();
  return launch;
}

}  // namespace

std::span<const Variable> variables() { return kVariables; }

const char* value_of(const Variable& variable) {
  // The library never writes the environment; a program that does must not do so meanwhile.
  return std::getenv(variable.name);  // NOLINT(concurrency-mt-unsafe)
}

std::int64_t timeout_ms() { return integer("DEEP_EP_TIMEOUT_MS", 1, kMaxTimeoutMs); }

std::chrono::milliseconds require_timeout(std::chrono::milliseconds timeout, std::int64_t least) {
  require(timeout.count() >= least && timeout.count() <= kMaxTimeoutMs,
          "timeout is {} ms, must be from {} to {} (a year)", timeout.count(), least,
          kMaxTimeoutMs);
  return timeout;
}

int num_threads() { return static_cast<int>(integer("DEEP_EP_NUM_THREADS", 0, 4096)); }

int ranks_per_node() { return static_cast<int>(integer("DEEP_EP_RANKS_PER_NODE", 0, kMaxInt)); }

std::int64_t inbox_bytes() { return integer("DEEP_EP_INBOX_BYTES", 128, std::int64_t{1} << 40); }

bool nvshmem_puts_only() { return integer("DEEP_EP_NVSHMEM_PUTS_ONLY", 0, 1) != 0; }

CombinePath combine_path() {
  const std::string path = text("DEEP_EP_COMBINE");
  if (path == "auto") return CombinePath::kAuto;
  if (path == "pull") return CombinePath::kPull;
  if (path == "ring") return CombinePath::kRing;
  throw Error(
      ErrorCode::kInvalidArgument,
      fmt::format("DEEP_EP_COMBINE: '{}' is not allowed, must be auto, pull or ring", path));
}

std::uint64_t first_ticket() {
  return static_cast<std::uint64_t>(integer("DEEP_EP_FIRST_TICKET", 1, std::int64_t{1} << 62));
}

std::string log_level() {
  std::string level = text("DEEP_EP_LOG_LEVEL");
  for (const char* known : {"trace", "debug", "info", "warn", "error", "off"}) {
    if (level == known) return level;
  }
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("DEEP_EP_LOG_LEVEL: '{}' is not allowed, must be trace, debug, info, "
                          "warn, error or off",
                          level));
}

std::string log_file() { return text("DEEP_EP_LOG_FILE"); }
std::string dump_directory() { return text("DEEP_EP_DUMP_DIR"); }
std::string rendezvous_secret() { return text("DEEP_EP_RENDEZVOUS_SECRET"); }

std::optional<Launch> launch() {
  if (is_set("RANK")) return launch_from("RANK", "WORLD_SIZE");
  if (is_set("OMPI_COMM_WORLD_RANK")) {
    const Launch launch = launch_from("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE");
    require_address(has_ranks_elsewhere(launch), "OMPI_COMM_WORLD_LOCAL_SIZE");
    return launch;
  }
  if (!is_set("PMIX_RANK") && !is_set("SLURM_PROCID")) return std::nullopt;
  require_address(has_several_machines(), "SLURM_STEP_NUM_NODES");
  // PMIx tells the size only to its clients, not in the environment.
  if (is_set("PMIX_RANK"))
    return launch_from("PMIX_RANK", is_set("WORLD_SIZE") ? "WORLD_SIZE" : "SLURM_NTASKS");
  return launch_from("SLURM_PROCID", "SLURM_NTASKS");
}

}  // namespace deep_ep::env
