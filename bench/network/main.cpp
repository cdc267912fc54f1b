// The symmetric heap over UCX against ucx_perftest, both between two nodes that are network
// namespaces of this machine, one after the other over the same device.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "deep_ep/bootstrap.hpp"
#include "fabric/symmetric_heap_factory.hpp"
#include "namespaces.hpp"
#include "protocol/atomic.hpp"

namespace {

using namespace deep_ep;
using Clock = std::chrono::steady_clock;
using net::Namespaces;

struct Settings {
  std::int64_t bytes = 14336;
  std::int64_t total = 256 << 20;
  int bundle = 32;
  int repeats = 5;
  std::string rate;
  std::string json;
};

/// A number that a forked rank leaves in a pipe.
class Result {
 public:
  Result() {
    if (pipe(ends_) != 0) throw_errno("pipe");
  }
  ~Result() {
    close(ends_[0]);
    close(ends_[1]);
  }
  Result(const Result&) = delete;
  Result& operator=(const Result&) = delete;
  void give(double number) { (void)!write(ends_[1], &number, sizeof(number)); }
  double take() {
    double number = 0;
    if (read(ends_[0], &number, sizeof(number)) != sizeof(number)) throw_errno("read(pipe)");
    return number;
  }

 private:
  int ends_[2];
};

double in_two_nodes(const Namespaces& nodes, const std::function<void(Bootstrap&, Result&)>& body) {
  Result result;
  const auto exits = run_forked(2, [&](const std::shared_ptr<Bootstrap>& bootstrap) {
    net::live_on(nodes, bootstrap->rank());
    body(*bootstrap, result);
    return 0;
  });
  for (const RankExit& exit : exits) {
    if (exit.status != 0)
      throw Error(ErrorCode::kSystem, fmt::format("rank {} ended with {}", exit.rank, exit.status));
  }
  return result.take();
}

/// Bytes a second of `ucx_perftest -t ucp_put_bw`.
double perftest(const Namespaces& nodes, const Settings& settings) {
  return in_two_nodes(nodes, [&](Bootstrap& bootstrap, Result& result) {
    if (bootstrap.rank() == 0) {
      bootstrap.barrier();
      FILE* server = popen("timeout 120 ucx_perftest -p 13399 >/dev/null 2>&1", "r");
      if (server == nullptr || pclose(server) != 0)
        throw Error(ErrorCode::kSystem, "ucx_perftest: the server failed (Debian: ucx-utils)");
      return;
    }
    bootstrap.barrier();
    std::this_thread::sleep_for(std::chrono::milliseconds(700));
    const std::string command =
        fmt::format("timeout 120 ucx_perftest {} -p 13399 -t ucp_put_bw -s {} -n {} -w {} 2>&1",
                    Namespaces::address(0), settings.bytes, settings.total / settings.bytes,
                    settings.total / settings.bytes / 10);
    FILE* client = popen(command.c_str(), "r");
    if (client == nullptr) throw_errno("popen(ucx_perftest)");
    double mebibytes = 0;
    char line[512];
    while (std::fgets(line, sizeof(line), client) != nullptr)
      std::sscanf(line, "Final: %*s %*s %*s %*s %*s %lf", &mebibytes);
    pclose(client);
    result.give(mebibytes * 1048576);
  });
}

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
  return in_two_nodes(nodes, [&](Bootstrap& bootstrap, Result& result) {
    const std::int64_t area = settings.bytes * settings.bundle;
    const auto heap = fabric::make_symmetric_heap(bootstrap, {.bytes = area + 8});
    std::uint64_t bundles = 0;
    for (const std::int64_t total : {settings.total / 10, settings.total}) {
      if (bootstrap.rank() == 0) {
        bundles += static_cast<std::uint64_t>((total + area - 1) / area);
        receive(*heap, settings, bundles);
      } else {
        const double speed = send(*heap, settings, total, bundles);
        if (total == settings.total) result.give(speed);
      }
    }
    bootstrap.barrier();
  });
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2),
                   values.end());
  return values[values.size() / 2];
}

void run(const Settings& settings) {
  const Namespaces nodes(2);
  if (!settings.rate.empty()) nodes.shape(1, settings.rate);
  std::vector<double> theirs;
  std::vector<double> ours;
  // In turn, so that a machine that others use as well treats both alike.
  for (int i = 0; i < settings.repeats; ++i) {
    theirs.push_back(perftest(nodes, settings));
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
  if (settings.json.empty()) return;
  std::ofstream(settings.json) << nlohmann::json{{"bytes", settings.bytes},
                                                 {"bundle", settings.bundle},
                                                 {"total", settings.total},
                                                 {"rate", settings.rate},
                                                 {"ucp_put_bw_bytes_per_s", theirs},
                                                 {"heap_bytes_per_s", ours},
                                                 {"ratio_of_medians", ratio}}
                                      .dump(2)
                               << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Puts of the symmetric heap against ucx_perftest, between two network namespaces");
  app.add_option("--bytes", settings.bytes, "bytes of a put")->capture_default_str();
  app.add_option("--bundle", settings.bundle, "puts before a signal and a flush")
      ->capture_default_str();
  app.add_option("--total", settings.total, "bytes of a measurement")->capture_default_str();
  app.add_option("--repeats", settings.repeats, "measurements of each")->capture_default_str();
  app.add_option("--rate", settings.rate, "limit of the network, in words of tc: 2gbit");
  app.add_option("--json", settings.json, "file for all figures");
  CLI11_PARSE(app, argc, argv);
  if (const std::string why = net::why_no_namespaces(); !why.empty()) {
    fmt::print(stderr, "{}\n", why);
    return 77;
  }
  try {
    run(settings);
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
  return 0;
}
