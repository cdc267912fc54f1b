#include "fabric/available_memory.hpp"

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>

#include "base/error.hpp"

namespace deep_ep::fabric {
namespace {

constexpr std::int64_t kMiB = 1 << 20;

/// Left to everybody else: enough for all ranks of a machine to report the shortage.
constexpr std::int64_t kLeftAlone = 64 * kMiB;

std::optional<std::int64_t> read_number(const std::string& path) {
  std::ifstream file(path);
  std::int64_t value = 0;
  if (file >> value) return value;
  return std::nullopt;  // no such file, or "max"
}

/// The value of "key value" in a file of such lines, 0 if there is none.
std::int64_t read_field(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string name;
  std::int64_t value = 0;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    if (words >> name >> value && name == key) return value;
  }
  return 0;
}

struct Names {
  const char* limit;
  const char* usage;
  const char* stat_prefix;
};
constexpr Names kVersion1 = {"/memory.limit_in_bytes", "/memory.usage_in_bytes", "total_"};
constexpr Names kVersion2 = {"/memory.max", "/memory.current", ""};

void lower(AvailableMemory& least, const std::string& directory, const Names& names) {
  const auto limit = read_number(directory + names.limit);
  const auto usage = read_number(directory + names.usage);
  if (!limit || !usage) return;
  // The page cache counts as used, but is given back before anybody is killed. The files are not of
  // one moment, so cache may exceed usage; version 1 writes "no limit" as almost 2^63.
  const std::string stat = directory + "/memory.stat";
  const std::string prefix = names.stat_prefix;
  const std::int64_t cache =
      read_field(stat, prefix + "inactive_file") + read_field(stat, prefix + "active_file");
  const std::int64_t used = std::max<std::int64_t>(0, *usage - cache);
  const std::int64_t left = std::max<std::int64_t>(0, *limit - used);
  if (left < least.bytes) least = {left, "the memory limit of control group " + directory};
}

/// Every ancestor's limit binds. In a container the path may be the host's and not exist here; its
/// own limit then is that of the mount's root, where the walk ends.
void lower_along(AvailableMemory& least, const std::string& mount, std::string path,
                 const Names& names) {
  while (true) {
    lower(least, mount + path, names);
    if (path.empty()) return;
    path.resize(path.find_last_of('/'));
  }
}

}  // namespace

AvailableMemory available_memory(const std::string& root) {
  AvailableMemory least{std::numeric_limits<std::int64_t>::max(), "nothing known"};
  if (const auto kib = read_field(root + "/proc/meminfo", "MemAvailable:"); kib > 0)
    least = {kib * 1024, "MemAvailable of the machine"};
  std::ifstream groups(root + "/proc/self/cgroup");
  // "hierarchy:controllers:path"; version 2 has no controllers in the line.
  for (std::string line; std::getline(groups, line);) {
    const auto first = line.find(':');
    const auto second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    std::string path = line.substr(second + 1);
    if (path == "/" || path.empty() || path[0] != '/') path.clear();
    if (controllers == ",,") lower_along(least, root + "/sys/fs/cgroup", path, kVersion2);
    if (controllers.find(",memory,") != std::string::npos)
      lower_along(least, root + "/sys/fs/cgroup/memory", path, kVersion1);
  }
  return least;
}

void throw_shortage(std::int64_t bytes, const std::string& why) {
  throw Error(ErrorCode::kOutOfMemory,
              fmt::format("a segment of {} bytes ({:.1f} MiB) cannot be allocated: {}", bytes,
                          static_cast<double>(bytes) / kMiB, why));
}

void require_available(std::int64_t bytes, std::int64_t rest) {
  const AvailableMemory available = available_memory();
  if (rest <= available.bytes - kLeftAlone) return;
  throw_shortage(bytes,
                 fmt::format("{} leaves {} bytes ({:.1f} MiB), of which {} MiB are left "
                             "alone{}",
                             available.source, available.bytes,
                             static_cast<double>(available.bytes) / kMiB, kLeftAlone / kMiB,
                             rest < bytes ? fmt::format("; {} bytes were still to come", rest)
                                          : std::string()));
}

}  // namespace deep_ep::fabric
