#include <fmt/format.h>

#include <cstdio>

#include <CLI/CLI.hpp>

#include "mpi/launcher.hpp"
#include "mpi/worker.hpp"

int main(int argc, char** argv) {
  deep_ep::bench::Settings settings;
  bool worker = false, probe = false;
  CLI::App app(
      "Dispatch and combine against the same exchange over MPI_Alltoallv and against memcpy.",
      "bench_mpi");
  app.option_defaults()->always_capture_default();
  app.add_option("--tokens", settings.tokens, "Tokens of a rank");
  app.add_option("--hidden", settings.hidden, "Values of a row, BF16");
  app.add_option("--topk", settings.topk, "Experts of a token");
  app.add_option("--experts", settings.experts, "Experts of all ranks");
  app.add_option("--repeats", settings.repeats, "Times each operation is measured");
  app.add_option("--seed", settings.seed, "Of routing and payload");
  app.add_option("--ranks", settings.ranks, "Numbers of ranks")->delimiter(',');
  app.add_option("--transport", settings.transport,
                 "Shared-memory transport of MPI; without it all are measured and the fastest is "
                 "taken");
  app.add_option("--json", settings.json, "File for the results");
  app.add_flag("--low-latency", settings.low_latency,
               "Low latency instead: FP8 rows packed per expert, weighted sums back; also at T=1");
  app.add_flag("--worker", worker, "This process was started by mpirun");
  app.add_flag("--probe", probe, "With --worker: only time MPI's exchange");
  CLI11_PARSE(app, argc, argv);
  try {
    if (!worker) return deep_ep::bench::launch(settings);
    if (!probe && settings.low_latency) return deep_ep::bench::run_low_latency_worker(settings);
    return probe ? deep_ep::bench::run_probe(settings) : deep_ep::bench::run_worker(settings);
  } catch (const std::exception& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return 1;
  }
}
