#include "perftest.hpp"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <thread>

#include "base/error.hpp"

namespace deep_ep::bench {

using net::Namespaces;

Answer::Answer() {
  if (pipe(ends_) != 0) throw_errno("pipe");
}

Answer::~Answer() {
  for (const int end : ends_) close(end);
}

void Answer::give(const std::string& text) {
  const auto bytes = static_cast<ssize_t>(text.size());
  if (write(ends_[1], text.data(), text.size()) != bytes) throw_errno("write(pipe)");
}

std::string Answer::take() {
  std::string text(1 << 16, '\0');
  const ssize_t bytes = read(ends_[0], text.data(), text.size());
  if (bytes < 0) throw_errno("read(pipe)");
  text.resize(static_cast<std::size_t>(bytes));
  return text;
}

std::string on_nodes(const Namespaces& nodes, int ranks_per_node,
                     const std::function<void(std::shared_ptr<Bootstrap>, Answer&)>& body) {
  Answer answer;
  const auto exits =
      run_forked(nodes.nodes() * ranks_per_node, [&](const std::shared_ptr<Bootstrap>& bootstrap) {
        net::live_on(nodes, bootstrap->rank() / ranks_per_node);
        body(bootstrap, answer);
        return 0;
      });
  for (const RankExit& exit : exits) {
    if (exit.status != 0)
      throw Error(ErrorCode::kSystem, fmt::format("rank {} ended with {}", exit.rank, exit.status));
  }
  return answer.take();
}

std::string why_no_perftest() {
  if (std::string why = net::why_no_namespaces(); !why.empty()) return why;
  FILE* found = popen("command -v ucx_perftest >/dev/null", "r");
  if (found != nullptr && pclose(found) == 0) return "";
  return "ucx_perftest is not here (Debian: ucx-utils)";
}

double perftest(const Namespaces& nodes, std::int64_t bytes, std::int64_t total) {
  const auto serve = [](Bootstrap& bootstrap) {
    bootstrap.barrier();
    FILE* server = popen("timeout 120 ucx_perftest -p 13399 >/dev/null 2>&1", "r");
    if (server == nullptr || pclose(server) != 0)
      throw Error(ErrorCode::kSystem, "ucx_perftest: the server failed (Debian: ucx-utils)");
  };
  return std::stod(on_nodes(nodes, 1, [&](const auto& bootstrap, Answer& answer) {
    if (bootstrap->rank() == 0) return serve(*bootstrap);
    bootstrap->barrier();
    std::this_thread::sleep_for(std::chrono::milliseconds(700));
    const std::string command =
        fmt::format("timeout 120 ucx_perftest {} -p 13399 -t ucp_put_bw -s {} -n {} -w {} 2>&1",
                    Namespaces::address(0), bytes, total / bytes, total / bytes / 10);
    FILE* client = popen(command.c_str(), "r");
    if (client == nullptr) throw_errno("popen(ucx_perftest)");
    double mebibytes = 0;
    char line[512];
    while (std::fgets(line, sizeof(line), client) != nullptr)
      std::sscanf(line, "Final: %*s %*s %*s %*s %*s %lf", &mebibytes);
    pclose(client);
    answer.give(fmt::format("{}", mebibytes * 1048576));
  }));
}

}  // namespace deep_ep::bench
