#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "backend/plugin.hpp"
#include "base/env.hpp"
#include "base/error.hpp"
#include "commands.hpp"
#include "deep_ep/types.hpp"
#include "deep_ep/version.hpp"
#include "fabric/memory.hpp"
#include "fabric/process_memory.hpp"
#include "fabric/symmetric_heap_factory.hpp"
#include "machine.hpp"

namespace deep_ep::cli {
namespace {

struct Part {
  const char* name;
  bool on;
  std::string why;
};

// Goes the way that segments go: allocate, write, map again through the descriptor, read.
Part probe_shared_memory() {
  constexpr std::int64_t kBytes = 1 << 20;
  constexpr std::uint64_t kWord = 0x5eed0fda7a5eed01;
  try {
    const auto memory = fabric::make_memfd_memory();
    const auto own = memory->allocate(kBytes);
    std::memcpy(own->base(), &kWord, sizeof kWord);
    const fabric::Descriptor descriptor = memory->describe(*own);
    const auto peer = memory->map(descriptor);
    std::uint64_t seen = 0;
    std::memcpy(&seen, peer->base(), sizeof seen);
    require(seen == kWord, "a second mapping of a memfd reads {:#x} instead of {:#x}", seen, kWord);
    return {"shared memory", true, "memfd, written and read through two mappings"};
  } catch (const Error& error) {
    return {"shared memory", false, error.what()};
  }
}

// From a child to its parent, which the system allows where it allows it between brothers.
Part probe_process_memory() {
  constexpr const char* kName = "reading peers";
  const fabric::Beacon beacon;
  int ends[2];
  if (pipe(ends) != 0) return {kName, false, "no pipe for the probe"};
  const pid_t child = fork();
  if (child == 0) {
    fabric::ProcessMemory parent;
    const std::string why = parent.open(beacon.sight());
    _exit(write(ends[1], why.data(), why.size()) == static_cast<ssize_t>(why.size()) ? 0 : 1);
  }
  close(ends[1]);
  std::string why;
  char part[256];
  for (ssize_t n = 0; (n = read(ends[0], part, sizeof part)) > 0;)
    why.append(part, static_cast<std::size_t>(n));
  close(ends[0]);
  int status = 1;
  if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
    return {kName, false, "the probe ended early"};
  if (!why.empty()) return {kName, false, why + ": combine goes through the inbox"};
  return {kName, true, "process_vm_readv, from one process to another; for combine"};
}

std::vector<Part> backends() {
  const bool gpus = num_devices(DeviceType::kCuda) > 0;
  return {{"host", true, "CPU threads over shared memory"},
          {"cuda", gpus, describe_devices(DeviceType::kCuda).front()}};
}

Part probe_ucx() {
  const std::string why = fabric::why_no_symmetric_heap();
  return {"UCX", why.empty(), why.empty() ? "between nodes of the host backend" : why};
}

Part probe_nvshmem() {
  const std::string why = why_no_nvshmem();
  return {"NVSHMEM", why.empty(), why.empty() ? "between nodes of GPUs" : why};
}

std::vector<Part> transports() {
  return {probe_shared_memory(), probe_process_memory(), probe_nvshmem(), probe_ucx()};
}

nlohmann::ordered_json to_json(const std::vector<Part>& parts) {
  nlohmann::ordered_json json;
  for (const Part& part : parts) json[part.name] = {{"on", part.on}, {"why", part.why}};
  return json;
}

void print_parts(const char* title, const std::vector<Part>& parts) {
  fmt::print("{}\n", title);
  for (const Part& part : parts)
    fmt::print("  {:<15} {:<4} {}\n", part.name, part.on ? "on" : "off", part.why);
}

void print_json(bool with_variables) {
  nlohmann::ordered_json json = environment_json();
  json["host_id"] = read_machine().host_id;
  json["backends"] = to_json(backends());
  json["transports"] = to_json(transports());
  json["gpus"] = describe_devices(DeviceType::kCuda);
  if (with_variables) {
    json["variables"] = nlohmann::ordered_json::array();
    for (const env::Variable& variable : env::variables())
      json["variables"].push_back({{"name", variable.name},
                                   {"value", shown_value(variable)},
                                   {"default", variable.default_value},
                                   {"meaning", variable.meaning}});
  }
  fmt::print("{}\n", json.dump(2));
}

void print_variables() {
  fmt::print("environment variables\n");
  for (const env::Variable& variable : env::variables()) {
    const std::string value = shown_value(variable);
    fmt::print(
        "  {} = {}  (default {})\n      {}\n", variable.name, value.empty() ? "(empty)" : value,
        *variable.default_value == '\0' ? "(empty)" : variable.default_value, variable.meaning);
  }
}

void print_text(bool with_variables) {
  const Machine machine = read_machine();
  constexpr double kGiB = 1 << 30;
  fmt::print("deepep {}\n", version());
  fmt::print("machine\n");
  fmt::print("  host            {}, {}\n", machine.host, machine.system);
  fmt::print("  cpu             {}, {} cores usable\n", machine.cpu, machine.cores);
  fmt::print("  memory          {:.1f} GiB, {:.1f} GiB available\n",
             static_cast<double>(machine.memory_bytes) / kGiB,
             static_cast<double>(machine.available_bytes) / kGiB);
  fmt::print("  huge pages      {} (kernel's mode for shared memory)\n", machine.shared_huge_pages);
  fmt::print("  host id         {}\n", machine.host_id);
  print_parts("backends", backends());
  print_parts("transports", transports());
  if (num_devices(DeviceType::kCuda) > 0) {
    fmt::print("gpus\n");
    for (const std::string& line : describe_devices(DeviceType::kCuda)) fmt::print("  {}\n", line);
  }
  if (with_variables) print_variables();
}

}  // namespace

void add_info(CLI::App& app, int&) {
  CLI::App* command = app.add_subcommand(
      "info", "This machine, the backends and transports, and why others are off");
  const auto variables = std::make_shared<bool>(false);
  const auto json = std::make_shared<bool>(false);
  command->add_flag("--env", *variables, "Also every environment variable, its value and meaning");
  command->add_flag("--json", *json, "Print JSON");
  command->callback([variables, json] { *json ? print_json(*variables) : print_text(*variables); });
}

}  // namespace deep_ep::cli
