#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "deep_ep/bootstrap.hpp"

namespace deep_ep::test {

/// What a rank of the pool knows while it works on a job.
class Worker {
 public:
  virtual ~Worker() = default;
  virtual int rank() const = 0;
  virtual int num_ranks() const = 0;  ///< of the present job
  /// A Bootstrap among all ranks of the present job. May be kept and used in later jobs of as many
  /// ranks.
  virtual std::shared_ptr<Bootstrap> bootstrap() = 0;
  /// A Bootstrap among some ranks of the job (ascending), for those that are left after a fault.
  virtual std::shared_ptr<Bootstrap> bootstrap_among(const std::vector<int>& ranks) = 0;
};

/// How one rank's part of a job ended.
struct Outcome {
  bool answered = false;  ///< `answer` is what the work returned
  std::string answer{};
  std::string failure{};  ///< what left the work as an exception, or how the process ended
  int signal = 0;         ///< that killed the process, if one did
  bool timed_out = false;
};

/// Rank processes that are forked once and play one job after the other, so that Buffers can live
/// from job to job. The parent passes the bootstrap's messages on; it must not have other threads.
/// A dead rank is forked anew for the next job; after a job that did not end in time all are.
class Pool {
 public:
  /// `work` runs in the rank's process, once a job and rank; its result is the rank's answer.
  using Work = std::function<std::string(Worker&, const std::string& job)>;

  Pool(int num_ranks, Work work);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  /// Runs `job` on ranks 0..num_ranks-1.
  std::vector<Outcome> run(int num_ranks, const std::string& job, std::chrono::milliseconds limit);

  /// True if a process was forked since the last job ended, e.g. its Buffers are gone.
  bool has_fresh_ranks() const { return fresh_; }
  pid_t pid(int rank) const { return ranks_[static_cast<std::size_t>(rank)].pid; }

 private:
  struct Rank {
    pid_t pid = -1;
    int socket = -1;
  };
  /// A gathering that not all its ranks have joined yet: by member mask, rank -> bytes.
  using Gatherings = std::map<std::uint64_t, std::map<int, std::string>>;
  struct Job;

  void start(int rank);
  void stop(int rank);
  void receive(Job& job, int rank);
  void join_gathering(Job& job, int rank, std::uint64_t members, std::string bytes);
  void refuse_gatherings(Job& job, int leaver);

  Work work_;
  std::vector<Rank> ranks_;
  bool fresh_ = true;
};

}  // namespace deep_ep::test
