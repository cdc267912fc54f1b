#pragma once

#include <memory>
#include <optional>

#include "backend/cuda/comm.hpp"
#include "deep_ep/error.hpp"

namespace deep_ep::cuda {

/// The words that the GPU shares with the host, for as long as somebody may ask what went wrong.
class Faults {
 public:
  Faults(int rank, bool several_nodes);
  ~Faults();
  Faults(const Faults&) = delete;
  Faults& operator=(const Faults&) = delete;

  HostStatus& status() const { return *status_; }
  /// What a kernel of this rank found or was told, as an Error that names `operation`.
  std::optional<Error> error(const char* operation) const;

 private:
  int rank_;
  bool several_nodes_;
  HostStatus* status_ = nullptr;
};

}  // namespace deep_ep::cuda
