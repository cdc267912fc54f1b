#pragma once

#include <mpi.h>

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

// What the workers do with MPI beside the exchanges that are measured.
namespace deep_ep::bench {

struct Mpi {
  int rank = 0;
  int size = 1;
  Mpi() {
    MPI_Init(nullptr, nullptr);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
  }
  ~Mpi() { MPI_Finalize(); }
  Mpi(const Mpi&) = delete;
  Mpi& operator=(const Mpi&) = delete;
};

std::vector<std::string> all_gather(int size, std::string_view bytes);

/// us, behind a barrier.
double run_timed(const std::function<void()>& call);

/// Element-wise maximum over the ranks.
std::vector<double> slowest_rank(const std::vector<double>& times);

/// For the launcher, which looks for it in the output.
void print_result(const nlohmann::ordered_json& json);

}  // namespace deep_ep::bench
