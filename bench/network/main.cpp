// The symmetric heap over UCX, or whole dispatches and combines, against ucx_perftest, all between
// two nodes that are network namespaces of this machine, one after the other over the same device.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "exchange.hpp"
#include "fabric/symmetric_heap_factory.hpp"
#include "json_file.hpp"
#include "machine.hpp"
#include "perftest.hpp"
#include "protocol/atomic.hpp"
#include "stats.hpp"

namespace {

using namespace deep_ep;
using namespace deep_ep::bench;
using Clock = std::chrono::steady_clock;
using net::Namespaces;

struct Settings {
  std::int64_t bytes = 14336;
  std::int64_t total = 256 << 20;
  int bundle = 32;
  int repeats = 5;
  std::string rate;
  std::string json;
  bool exchange = false;
  std::string require;
  ExchangeSettings calls;
};

// What the transport between hosts has to reach, docs/performance.md.
constexpr double kMostVethVsPlan = 1.03;   // TCP, IP and Ethernet, and what else comes along
constexpr double kLeastVsPerftest = 0.80;  // of ucp_put_bw, in the same run
constexpr const char* kBytes = "bytes";
constexpr const char* kAll = "all";

std::uint64_t word(const fabric::SymmetricHeap& heap, std::int64_t offset) {
  // Pairs with the release of the signal that sets the word.
  return protocol::load_acquire(reinterpret_cast<const std::uint64_t*>(heap.base() + offset));
}

void await(const fabric::SymmetricHeap& heap, std::int64_t offset, std::uint64_t value) {
  while (word(heap, offset) < value) std::this_thread::sleep_for(std::chrono::microseconds(50));
}

/// Puts `total` bytes as bundles with a signal behind each; bytes a second until rank 0 has seen,
/// and answered, the last one.
double send(fabric::SymmetricHeap& heap, const Settings& settings, std::int64_t total,
            std::uint64_t& bundles) {
  const std::int64_t area = settings.bytes * settings.bundle;
  std::vector<unsigned char> source(static_cast<std::size_t>(area));
  for (std::size_t i = 0; i < source.size(); ++i) source[i] = static_cast<unsigned char>(i * 7 + 1);
  const auto begin = Clock::now();
  std::int64_t sent = 0;
  for (; sent < total; sent += area) {
    for (std::int64_t at = 0; at < area; at += settings.bytes)
      heap.put(0, at, source.data() + at, settings.bytes);
    heap.signal(0, area, ++bundles);
    heap.flush(0, std::chrono::seconds(60));
  }
  await(heap, area, bundles);
  return static_cast<double>(sent) / std::chrono::duration<double>(Clock::now() - begin).count();
}

void receive(fabric::SymmetricHeap& heap, const Settings& settings, std::uint64_t bundles) {
  const std::int64_t area = settings.bytes * settings.bundle;
  await(heap, area, bundles);
  for (std::int64_t i = 0; i < area; ++i) {
    if (static_cast<unsigned char>(heap.base()[i]) != static_cast<unsigned char>(i * 7 + 1))
      throw Error(ErrorCode::kSystem, fmt::format("byte {} is wrong", i));
  }
  heap.signal(1, area, bundles);
}

double heap(const Namespaces& nodes, const Settings& settings) {
  return std::stod(on_nodes(nodes, 1, [&](const auto& bootstrap, Answer& answer) {
    const std::int64_t area = settings.bytes * settings.bundle;
    const auto heap = fabric::make_symmetric_heap(*bootstrap, {.bytes = area + 8});
    std::uint64_t bundles = 0;
    for (const std::int64_t total : {settings.total / 10, settings.total}) {
      if (bootstrap->rank() == 0) {
        bundles += static_cast<std::uint64_t>((total + area - 1) / area);
        receive(*heap, settings, bundles);
      } else {
        const double speed = send(*heap, settings, total, bundles);
        if (total == settings.total) answer.give(fmt::format("{}", speed));
      }
    }
    bootstrap->barrier();
  }));
}

double median(const std::vector<double>& values) { return cli::summarize(values).median; }

nlohmann::ordered_json json_of(const Settings& settings, const std::vector<double>& theirs) {
  nlohmann::ordered_json json;
  json["environment"] = cli::environment_json();
  json["rate"] = settings.rate;
  json["bytes"] = settings.bytes;
  json["total"] = settings.total;
  json["ucp_put_bw_bytes_per_s"] = theirs;
  return json;
}

int run_heap(const Namespaces& nodes, const Settings& settings) {
  std::vector<double> theirs;
  std::vector<double> ours;
  // In turn, so that a machine that others use as well treats both alike.
  for (int i = 0; i < settings.repeats; ++i) {
    theirs.push_back(perftest(nodes, settings.bytes, settings.total));
    ours.push_back(heap(nodes, settings));
    fmt::print("ucp_put_bw {:7.1f} MB/s   heap {:7.1f} MB/s\n", theirs.back() / 1e6,
               ours.back() / 1e6);
    std::fflush(stdout);
  }
  const double ratio = median(ours) / median(theirs);
  fmt::print(
      "{} bytes a put, {} puts a signal, rate {}: median ucp_put_bw {:.1f} MB/s, heap {:.1f} "
      "MB/s, ratio {:.2f}\n",
      settings.bytes, settings.bundle, settings.rate.empty() ? "not limited" : settings.rate,
      median(theirs) / 1e6, median(ours) / 1e6, ratio);
  if (settings.json.empty()) return 0;
  nlohmann::ordered_json json = json_of(settings, theirs);
  json["bundle"] = settings.bundle;
  json["heap_bytes_per_s"] = ours;
  json["ratio_of_medians"] = ratio;
  cli::write_json(settings.json, json);
  return 0;
}

void print_call(const char* name, const CallFigures& call, double theirs) {
  fmt::print("{:10}  {:>6}  {:>7.2f}  {:>7.1f}  {:>7.1f}  {:>6.2f}  {:>8.4f}  {:>5}  {:>10}\n",
             name, call.records[0], static_cast<double>(call.bytes[0]) / 1e6,
             median(call.seconds) * 1e3, median(call.bandwidths()) / 1e6,
             median(call.bandwidths()) / theirs, cli::summarize(call.veth_vs_plan).max,
             call.wrong_elements, call.miscounted == 0 ? "yes" : "NO");
  if (!call.trouble.empty()) fmt::print("  {}\n", call.trouble);
}

nlohmann::ordered_json json_of(const CallFigures& call) {
  nlohmann::ordered_json json;
  json["records"] = call.records;
  json["record_bytes"] = call.bytes;
  json["seconds"] = call.seconds;
  json["bytes_per_s"] = call.bandwidths();
  json["veth_vs_plan"] = call.veth_vs_plan;
  json["checked_elements"] = call.checked_elements;
  json["wrong_elements"] = call.wrong_elements;
  json["miscounted"] = call.miscounted;
  return json;
}

void write_exchange(const Settings& settings, const std::vector<double>& theirs,
                    const CallFigures& dispatch, const CallFigures& combine) {
  const ExchangeSettings& calls = settings.calls;
  nlohmann::ordered_json json = json_of(settings, theirs);
  json["args"] = {{"nodes", 2},
                  {"ranks_per_node", calls.ranks_per_node},
                  {"tokens", calls.tokens},
                  {"hidden", calls.hidden},
                  {"topk", calls.topk},
                  {"experts", calls.experts},
                  {"iterations", calls.iterations},
                  {"repeats", settings.repeats}};
  json["dispatch"] = json_of(dispatch);
  json["combine"] = json_of(combine);
  json["dispatch_vs_perftest"] = median(dispatch.bandwidths()) / median(theirs);
  json["combine_vs_perftest"] = median(combine.bandwidths()) / median(theirs);
  json["veth_vs_plan"] =
      std::max(cli::summarize(dispatch.veth_vs_plan).max, cli::summarize(combine.veth_vs_plan).max);
  json["wrong_elements"] = dispatch.wrong_elements + combine.wrong_elements;
  json["miscounted"] = dispatch.miscounted + combine.miscounted;
  cli::write_json(settings.json, json);
}

/// Says what is not reached of what --require asks; true if all is.
bool reaches(const Settings& settings, const char* name, const CallFigures& call, double theirs) {
  if (settings.require.empty()) return true;
  const double veth = cli::summarize(call.veth_vs_plan).max;
  const double speed = median(call.bandwidths()) / theirs;
  // Devices that sent less than the records did not carry them.
  const bool bytes = veth >= 1 && veth <= kMostVethVsPlan;
  const bool fast = settings.require == kBytes || speed >= kLeastVsPerftest;
  if (!bytes)
    fmt::print("FAILED: {}: devices sent {:.4f} of the records' bytes, required: 1 to {}\n", name,
               veth, kMostVethVsPlan);
  if (!fast)
    fmt::print("FAILED: {}: {:.2f} of ucp_put_bw, required: {}\n", name, speed, kLeastVsPerftest);
  return bytes && fast;
}

int run_exchange(const Namespaces& nodes, const Settings& settings) {
  std::vector<double> theirs;
  CallFigures dispatch;
  CallFigures combine;
  for (int i = 0; i < settings.repeats; ++i) {
    theirs.push_back(perftest(nodes, settings.bytes, settings.total));
    const ExchangeFigures one = measure_exchange(nodes, settings.calls);
    fmt::print("ucp_put_bw {:7.1f} MB/s   dispatch {:7.1f} MB/s   combine {:7.1f} MB/s\n",
               theirs.back() / 1e6, median(one.dispatch.bandwidths()) / 1e6,
               median(one.combine.bandwidths()) / 1e6);
    std::fflush(stdout);
    dispatch.merge(one.dispatch);
    combine.merge(one.combine);
  }
  fmt::print(
      "medians of one direction; veth: the most of any call and direction; counts: records and "
      "bytes handed to the network are the plan's\n"
      "{:10}  {:>6}  {:>7}  {:>7}  {:>7}  {:>6}  {:>8}  {:>5}  {:>10}\n"
      "{:10}  {:>6}  {:>7}  {:>7}  {:>7.1f}\n",
      "", "records", "MB", "ms", "MB/s", "ratio", "veth", "wrong", "counts", "ucp_put_bw", "", "",
      "", median(theirs) / 1e6);
  print_call("dispatch", dispatch, median(theirs));
  print_call("combine", combine, median(theirs));
  if (!settings.json.empty()) write_exchange(settings, theirs, dispatch, combine);
  const bool right = dispatch.wrong_elements + combine.wrong_elements == 0 &&
                     dispatch.miscounted + combine.miscounted == 0 &&
                     dispatch.checked_elements > 0 && combine.checked_elements > 0;
  if (!right) fmt::print("FAILED\n");
  const bool dispatches = reaches(settings, "dispatch", dispatch, median(theirs));
  const bool combines = reaches(settings, "combine", combine, median(theirs));
  return right && dispatches && combines ? 0 : 1;
}

int run(const Settings& settings) {
  if (!settings.json.empty()) cli::check_writable(settings.json);
  const Namespaces nodes(2);
  if (!settings.rate.empty()) nodes.shape(1, settings.rate);
  return settings.exchange ? run_exchange(nodes, settings) : run_heap(nodes, settings);
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app(
      "Puts of the symmetric heap, or dispatch and combine, against ucx_perftest between two "
      "network namespaces");
  app.add_option("--bytes", settings.bytes, "bytes of a put")->capture_default_str();
  app.add_option("--bundle", settings.bundle, "puts before a signal and a flush")
      ->capture_default_str();
  app.add_option("--total", settings.total, "bytes of a measurement")->capture_default_str();
  app.add_option("--repeats", settings.repeats, "measurements of each")->capture_default_str();
  app.add_option("--rate", settings.rate, "limit of the network, in words of tc: 2gbit");
  app.add_option("--json", settings.json, "file for all figures");
  app.add_flag("--exchange", settings.exchange,
               "cached dispatch and combine of whole Buffers, in BF16, in place of the heap");
  app.add_option(
         "--require", settings.require,
         "with --exchange: fail if the devices send more than 1.03 times the records' bytes "
         "(bytes), or if besides a call is below 0.8 of ucp_put_bw (all)")
      ->check(CLI::IsMember({kBytes, kAll}));
  ExchangeSettings& calls = settings.calls;
  app.add_option("--tokens", calls.tokens, "tokens of a rank")->capture_default_str();
  app.add_option("--hidden", calls.hidden, "values of a row")->capture_default_str();
  app.add_option("--topk", calls.topk, "experts of a token")->capture_default_str();
  app.add_option("--experts", calls.experts, "experts of all ranks")->capture_default_str();
  app.add_option("--ranks-per-node", calls.ranks_per_node)->capture_default_str();
  app.add_option("--iters", calls.iterations, "timed calls of a measurement")
      ->capture_default_str();
  app.add_option("--num-threads", calls.threads, "threads of a rank; 0: cores / ranks")
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  if (!settings.require.empty() && !settings.exchange) {
    fmt::print(stderr, "--require needs --exchange\n");
    return 1;
  }
  if (const std::string why = why_no_perftest(); !why.empty()) {
    fmt::print(stderr, "{}\n", why);
    return 77;
  }
  try {
    return run(settings);
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}
