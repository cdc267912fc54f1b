#include "machine.hpp"

#include <sched.h>
#include <sys/utsname.h>

#include <ctime>
#include <fstream>
#include <string_view>

#include "deep_ep/version.hpp"

namespace deep_ep::cli {
namespace {

std::string first_line(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

/// The rest of the first line that starts with `key`, behind the colon.
std::string line_of(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(key)) continue;
    const std::size_t colon = line.find(':');
    const std::size_t begin = line.find_first_not_of(" \t", colon + 1);
    if (colon != line.npos && begin != line.npos) return line.substr(begin);
  }
  return {};
}

std::int64_t meminfo_bytes(const std::string& key) {
  return std::atoll(line_of("/proc/meminfo", key).c_str()) * 1024;
}

// The kernel marks the chosen one of all modes with brackets.
std::string chosen_mode(const std::string& modes) {
  const std::size_t begin = modes.find('['), end = modes.find(']');
  if (begin == modes.npos || end == modes.npos) return "unknown";
  return modes.substr(begin + 1, end - begin - 1);
}

}  // namespace

std::string shown_value(const env::Variable& variable) {
  const char* value = env::value_of(variable);
  if (value == nullptr) return variable.default_value;
  // What was shared as a secret must not end up in a file of results.
  return std::string_view(variable.name).ends_with("_SECRET") ? "(set)" : value;
}

Machine read_machine() {
  Machine machine;
  utsname names{};
  uname(&names);
  machine.host = names.nodename;
  machine.system = std::string(names.sysname) + " " + names.release + " " + names.machine;
  machine.cpu = line_of("/proc/cpuinfo", "model name");
  if (machine.cpu.empty()) machine.cpu = names.machine;
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) machine.cores = CPU_COUNT(&cpus);
  machine.memory_bytes = meminfo_bytes("MemTotal");
  machine.available_bytes = meminfo_bytes("MemAvailable");
  machine.shared_huge_pages =
      chosen_mode(first_line("/sys/kernel/mm/transparent_hugepage/shmem_enabled"));
  machine.host_id = first_line("/proc/sys/kernel/random/boot_id");
  return machine;
}

std::string now() {
  const std::time_t time = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&time, &parts);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

nlohmann::ordered_json environment_json() {
  const Machine machine = read_machine();
  nlohmann::ordered_json json;
  json["version"] = version();
  json["date"] = now();
  json["host"] = machine.host;
  json["system"] = machine.system;
  json["cpu"] = machine.cpu;
  json["cores"] = machine.cores;
  json["memory_bytes"] = machine.memory_bytes;
  json["available_bytes"] = machine.available_bytes;
  json["shared_huge_pages"] = machine.shared_huge_pages;
  json["variables"] = nlohmann::ordered_json::object();
  for (const env::Variable& variable : env::variables())
    if (env::value_of(variable) != nullptr)
      json["variables"][variable.name] = shown_value(variable);
  return json;
}

}  // namespace deep_ep::cli
