#pragma once

#include <CLI/CLI.hpp>

// One function per command: adds it to `app` and sets `status` to the exit status when it runs.
namespace deep_ep::cli {

void add_info(CLI::App& app, int& status);
void add_verify(CLI::App& app, int& status);
void add_bench(CLI::App& app, int& status);
void add_plan(CLI::App& app, int& status);
// Below `verify` and `bench`.
void add_verify_low_latency(CLI::App& verify, int& status);
void add_bench_low_latency(CLI::App& bench, int& status);

}  // namespace deep_ep::cli
