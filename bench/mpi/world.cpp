#include "mpi/world.hpp"

#include <fmt/format.h>

#include <chrono>

#include "mpi/worker.hpp"

namespace deep_ep::bench {

using Clock = std::chrono::steady_clock;

std::vector<std::string> all_gather(int size, std::string_view bytes) {
  const int own = static_cast<int>(bytes.size());
  std::vector<int> counts(static_cast<std::size_t>(size)), offsets(counts.size(), 0);
  MPI_Allgather(&own, 1, MPI_INT, counts.data(), 1, MPI_INT, MPI_COMM_WORLD);
  for (std::size_t i = 1; i < counts.size(); ++i) offsets[i] = offsets[i - 1] + counts[i - 1];
  std::string all(static_cast<std::size_t>(offsets.back() + counts.back()), '\0');
  MPI_Allgatherv(bytes.data(), own, MPI_BYTE, all.data(), counts.data(), offsets.data(), MPI_BYTE,
                 MPI_COMM_WORLD);
  std::vector<std::string> parts;
  for (std::size_t i = 0; i < counts.size(); ++i)
    parts.push_back(
        all.substr(static_cast<std::size_t>(offsets[i]), static_cast<std::size_t>(counts[i])));
  return parts;
}

double run_timed(const std::function<void()>& call) {
  MPI_Barrier(MPI_COMM_WORLD);
  const auto start = Clock::now();
  call();
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

std::vector<double> slowest_rank(const std::vector<double>& times) {
  std::vector<double> slowest(times.size());
  MPI_Allreduce(times.data(), slowest.data(), static_cast<int>(times.size()), MPI_DOUBLE, MPI_MAX,
                MPI_COMM_WORLD);
  return slowest;
}

void print_result(const nlohmann::ordered_json& json) {
  fmt::print("{}{}\n", kResultPrefix, json.dump());
}

}  // namespace deep_ep::bench
