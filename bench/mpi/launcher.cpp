#include "mpi/launcher.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <optional>

#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "deep_ep/version.hpp"
#include "json_file.hpp"
#include "machine.hpp"
#include "mpi/process.hpp"
#include "mpi/worker.hpp"

namespace deep_ep::bench {
namespace {

using Json = nlohmann::ordered_json;

/// A way for Open MPI to move bytes between processes of one machine.
struct Transport {
  std::string name;
  std::vector<std::string> options;
};

// The components' own list. ob1 over vader (sm since Open MPI 5) with each of its ways to copy, and
// UCX and libfabric restricted to shared memory.
std::vector<Transport> list_transports() {
  const ProcessResult info = run_process({"ompi_info", "--parsable", "--all"});
  require(info.status == 0, "ompi_info failed ({}): Open MPI is needed", info.status);
  const auto has = [&](const std::string& text) {
    return info.output.find(text) != std::string::npos;
  };
  std::vector<Transport> transports;
  if (has("mca:btl:vader:version")) {
    for (const char* mechanism : {"cma", "knem", "xpmem", "emulated", "none"}) {
      const std::string known = "btl_vader_single_copy_mechanism:enumerator:value:";
      bool offered = false;
      for (char digit = '0'; digit <= '9'; ++digit) offered |= has(known + digit + ":" + mechanism);
      if (offered)
        transports.push_back({std::string("vader-") + mechanism,
                              {"--mca", "pml", "ob1", "--mca", "btl", "vader,self", "--mca",
                               "btl_vader_single_copy_mechanism", mechanism}});
    }
  }
  if (has("mca:btl:sm:version") && has("mca:smsc:"))
    transports.push_back({"sm", {"--mca", "pml", "ob1", "--mca", "btl", "sm,self"}});
  if (has("mca:pml:ucx:version"))
    transports.push_back({"ucx",
                          {"--mca", "pml", "ucx", "-x", "UCX_TLS=self,sm", "--mca", "pml_ucx_tls",
                           "any", "--mca", "pml_ucx_devices", "any", "--mca", "osc", "^ucx"}});
  if (has("mca:mtl:ofi:version"))
    transports.push_back({"ofi-shm",
                          {"--mca", "pml", "cm", "--mca", "mtl", "ofi", "--mca",
                           "mtl_ofi_provider_include", "shm", "-x", "FI_PROVIDER=shm"}});
  return transports;
}

std::vector<std::string> worker_command(const Settings& settings, int ranks,
                                        const Transport& transport) {
  std::vector<std::string> command = {"mpirun", "--oversubscribe",    "--bind-to",
                                      "none",   "--timeout",          "300",
                                      "-n",     std::to_string(ranks)};
  command.insert(command.end(), transport.options.begin(), transport.options.end());
  for (const std::string& word :
       {std::filesystem::read_symlink("/proc/self/exe").string(), std::string("--worker"),
        fmt::format("--tokens={}", settings.tokens), fmt::format("--hidden={}", settings.hidden),
        fmt::format("--topk={}", settings.topk), fmt::format("--experts={}", settings.experts),
        fmt::format("--repeats={}", settings.repeats), fmt::format("--seed={}", settings.seed)})
    command.push_back(word);
  if (settings.low_latency) command.emplace_back("--low-latency");
  return command;
}

/// The JSON that the worker printed, if it printed one.
std::optional<Json> find_result(const std::string& output) {
  const std::size_t at = output.find(kResultPrefix);
  if (at == output.npos) return std::nullopt;
  const std::size_t begin = at + std::string_view(kResultPrefix).size();
  return Json::parse(output.substr(begin, output.find('\n', begin) - begin));
}

struct Choice {
  Transport transport;
  Json measured = Json::object();  // name -> us a pair, or why not
};

Choice choose_transport(const Settings& settings, int ranks) {
  Choice choice;
  double best = 0;
  for (const Transport& transport : list_transports()) {
    if (!settings.transport.empty() && settings.transport != transport.name) continue;
    auto command = worker_command(settings, ranks, transport);
    command.push_back("--probe");
    const ProcessResult run = run_process(command);
    const auto result = find_result(run.output);
    if (run.status != 0 || !result) {
      choice.measured[transport.name] = fmt::format("failed with status {}", run.status);
      continue;
    }
    const double us = result->at("pair_us");
    choice.measured[transport.name] = us;
    if (best == 0 || us < best) {
      best = us;
      choice.transport = transport;
    }
  }
  require(best > 0, "no transport of Open MPI works for {} ranks: {}", ranks,
          choice.measured.dump());
  return choice;
}

void print_choice(const Choice& choice, int ranks) {
  fmt::print("R={}: MPI dispatch + combine by transport:", ranks);
  for (const auto& [name, value] : choice.measured.items())
    fmt::print(" {} {}", name,
               value.is_number() ? fmt::format("{:.1f} ms", value.get<double>() / 1e3)
                                 : value.get<std::string>());
  fmt::print("; taken: {}\n", choice.transport.name);
  std::fflush(stdout);
}

Json run_ranks(const Settings& settings, int ranks) {
  const Choice choice = choose_transport(settings, ranks);
  print_choice(choice, ranks);
  const ProcessResult run = run_process(worker_command(settings, ranks, choice.transport));
  auto result = find_result(run.output);
  require(result.has_value(), "the workers of {} ranks failed with status {}:\n{}", ranks,
          run.status, run.errors);
  if (run.status != 0) fmt::print(stderr, "{}", run.errors);
  Json json;
  json["ranks"] = ranks;
  json["transport"] = choice.transport.name;
  json["transports_us"] = choice.measured;
  json.update(*result);
  json["status"] = run.status;
  return json;
}

void print_result(const Json& result) {
  const auto ms = [&](const char* name) {
    return result["times_us"][name]["median"].get<double>() / 1e3;
  };
  fmt::print(
      "{:>2} {:>9.1f} {:>9.1f} {:>9.1f} {:>9.1f} {:>9.1f} {:>9.1f} {:>9.1f} {:>9.1f} {:>9.1f} "
      "{:>7}\n",
      result["ranks"].get<int>(), ms("dispatch"), ms("mpi_dispatch"), ms("mpi_dispatch_own_direct"),
      ms("combine"), ms("combine_in_place"), ms("mpi_combine"), ms("mpi_combine_own_direct"),
      ms("memcpy"), result["t1_pair_us"].get<double>(),
      result["wrong_elements"].get<std::int64_t>());
}

void print_ratios(const Json& result) {
  const auto ratio = [&](const char* name) { return result[name].get<double>(); };
  fmt::print(
      "R={}: dispatch_vs_mpi {:.2f} (own rows past MPI {:.2f})  combine_vs_mpi {:.2f} ({:.2f}),"
      " in place {:.2f}  memcpy_ratio {:.2f}  t1_pair {:.1f} us  ({})\n",
      result["ranks"].get<int>(), ratio("dispatch_vs_mpi"), ratio("dispatch_vs_mpi_own_direct"),
      ratio("combine_vs_mpi"), ratio("combine_vs_mpi_own_direct"), ratio("combine_in_place_vs_mpi"),
      ratio("memcpy_ratio"), ratio("t1_pair_us"), result["our_transport"].get<std::string>());
}

void print_low_latency(const Json& result) {
  const auto us = [&](const char* times, const char* name) {
    return result[times][name]["median"].get<double>();
  };
  fmt::print("R={} low latency: {} wrong elements\n", result["ranks"].get<int>(),
             result["wrong_elements"].get<std::int64_t>());
  for (const char* times : {"times_us", "t1_times_us"}) {
    fmt::print(
        "  {:<8} dispatch {:.1f} us (MPI {:.1f}), combine {:.1f} ({:.1f}), pair {:.1f} ({:.1f}): "
        "{:.2f} times as fast; MPI with a message an expert: {:.1f}, {:.2f} times\n",
        std::string_view(times) == "times_us" ? "batch" : "T=1", us(times, "dispatch"),
        us(times, "mpi_dispatch"), us(times, "combine"), us(times, "mpi_combine"),
        us(times, "pair"), us(times, "mpi_pair"),
        result[std::string(times) + "_pair_vs_mpi"].get<double>(), us(times, "mpi_per_expert_pair"),
        result[std::string(times) + "_pair_vs_mpi_per_expert"].get<double>());
  }
}

void write_results(const Settings& settings, const std::vector<Json>& results) {
  if (settings.json.empty()) return;
  Json json;
  json["command"] = "bench mpi";
  json["args"] = {{"tokens", settings.tokens},
                  {"hidden", settings.hidden},
                  {"topk", settings.topk},
                  {"experts", settings.experts},
                  {"repeats", settings.repeats},
                  {"seed", settings.seed},
                  {"dtype", settings.low_latency ? "fp8" : "bf16"},
                  {"low_latency", settings.low_latency},
                  {"ranks", settings.ranks}};
  json["environment"] = cli::environment_json();
  json["results"] = results;
  if (settings.low_latency) return cli::write_json(settings.json, json);
  for (const char* key : {"dispatch_vs_mpi", "combine_vs_mpi", "combine_in_place_vs_mpi",
                          "memcpy_ratio", "t1_pair_us"})
    for (const Json& result : results)
      json[key][std::to_string(result["ranks"].get<int>())] = result[key];
  cli::write_json(settings.json, json);
}

}  // namespace

int launch(const Settings& settings) {
  if (!settings.json.empty()) cli::check_writable(settings.json);
  // Open MPI refuses to start for root without both.
  setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
  setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
  const cli::Machine machine = cli::read_machine();
  fmt::print("# deepep {} bench mpi on {} ({}, {} cores), {}\n", version(), machine.host,
             machine.cpu, machine.cores, cli::now());
  fmt::print(
      "# {}, tokens {}, hidden {}, top-{} of {}; medians of {}, interleaved, of the slowest "
      "rank\n",
      settings.low_latency ? "low latency, FP8" : "BF16", settings.tokens, settings.hidden,
      settings.topk, settings.experts, settings.repeats);
  std::vector<Json> results;
  bool passed = true;
  for (const int ranks : settings.ranks) {
    results.push_back(run_ranks(settings, ranks));
    passed &= results.back()["status"] == 0;
  }
  if (settings.low_latency) {
    for (const Json& result : results) print_low_latency(result);
    write_results(settings, results);
    return passed ? 0 : 1;
  }
  fmt::print("{:>2} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>7}\n", "R", "dispatch",
             "mpi", "own past", "combine", "in place", "mpi", "own past", "memcpy", "T=1 pair",
             "wrong");
  fmt::print("{:>2} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}\n", "", "ms", "ms", "ms",
             "ms", "ms", "ms", "ms", "ms", "us");
  for (const Json& result : results) print_result(result);
  for (const Json& result : results) print_ratios(result);
  write_results(settings, results);
  return passed ? 0 : 1;
}

}  // namespace deep_ep::bench
