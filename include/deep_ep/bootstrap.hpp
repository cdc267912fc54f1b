#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "deep_ep/export.hpp"

namespace deep_ep {

/// How ranks find each other before they share memory: an all-gather of bytes. Used at construction
/// of a Buffer and never by dispatch or combine. Calls are collective and ordered; one thread at a
/// time.
class DEEP_EP_API Bootstrap {
 public:
  virtual ~Bootstrap();
  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// Every rank gives bytes (lengths may differ) and gets all ranks' bytes, in rank order. Throws
  /// Error(kTimeout) or Error(kPeerFailed) naming the ranks that did not come.
  virtual std::vector<std::string> all_gather(std::string_view bytes) = 0;

  void barrier() { all_gather({}); }
};

/// Ranks started by torchrun, mpirun, srun or by hand: rank and size from RANK and WORLD_SIZE, else
/// OMPI_COMM_WORLD_RANK/SIZE, else PMIX_RANK, else SLURM_PROCID/SLURM_NTASKS; rank 0 listens on
/// MASTER_ADDR:MASTER_PORT (default 127.0.0.1, 29477). No variable at all means one rank. Throws
/// Error(kInvalidArgument) naming the variable, also where Open MPI or Slurm tell of ranks on
/// several machines and MASTER_ADDR is not set.
DEEP_EP_API std::shared_ptr<Bootstrap> bootstrap_from_environment();

/// Rendezvous over TCP at `address`:`port`, where rank 0 listens. `timeout` is from 1 ms to a year.
DEEP_EP_API std::shared_ptr<Bootstrap> bootstrap_tcp(
    int rank, int size, const std::string& address, int port,
    std::chrono::milliseconds timeout = std::chrono::seconds(100));

/// The caller's own all-gather, e.g. over MPI or torch.distributed.
DEEP_EP_API std::shared_ptr<Bootstrap> bootstrap_callback(
    int rank, int size, std::function<std::vector<std::string>(std::string_view)> all_gather);

/// `size` ranks as threads of this process; element i belongs to the thread that plays rank i.
/// `timeout` is from 1 ms to a year.
DEEP_EP_API std::vector<std::shared_ptr<Bootstrap>> bootstrap_threads(
    int size, std::chrono::milliseconds timeout = std::chrono::seconds(100));

/// How one forked rank ended.
struct RankExit {
  int rank = 0;
  int status = 0;  ///< what `main` returned, or 128 + signal
};

/// Forks `size` processes, runs `main` in each with a Bootstrap among them, and waits for all. An
/// exception that leaves `main` is printed and counts as status 1. When this process dies, so do
/// they. The caller must not have other threads. `started`, if given, is called once in the parent
/// with the process ids in rank order.
DEEP_EP_API std::vector<RankExit> run_forked(
    int size, const std::function<int(std::shared_ptr<Bootstrap>)>& main,
    const std::function<void(std::span<const int>)>& started = {});

}  // namespace deep_ep
