#include <cstdio>

#include "base/error.hpp"
#include "commands.hpp"
#include "deep_ep/version.hpp"

int main(int argc, char** argv) {
  CLI::App app(
      "Expert-parallel communication: what this machine offers, whether it works, how fast.",
      "deepep");
  app.set_version_flag("--version", std::string("deepep ") + deep_ep::version());
  app.require_subcommand(1);
  int status = 0;
  deep_ep::cli::add_info(app, status);
  deep_ep::cli::add_verify(app, status);
  deep_ep::cli::add_bench(app, status);
  deep_ep::cli::add_plan(app, status);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  } catch (const std::exception& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return 1;
  }
  return status;
}
