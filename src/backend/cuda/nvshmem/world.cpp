#include "backend/cuda/nvshmem/world.hpp"

#include <nvshmem_host.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <sstream>

#include "backend/cuda/check.hpp"
#include "backend/cuda/gpu_name.hpp"
#include "backend/cuda/memory/zero.hpp"
#include "base/error.hpp"
#include "base/log.hpp"
#include "fabric/agree.hpp"
#include "fabric/mesh.hpp"
#include "fabric/socket.hpp"

namespace deep_ep::cuda::nvshmem {

namespace {

constexpr std::int64_t kAlignment = 128;

/// What a rank says of itself before it joins, or meets others again.
std::string describe(const std::string& world, int rank) {
  return fmt::format("{} {} {} {}", fabric::host_id(), fabric::process_id(),
                     world.empty() ? "-" : world, rank);
}

void require_processes(const std::vector<std::string>& all) {
  std::set<std::string> processes;
  for (const std::string& one : all) {
    std::istringstream words(one);
    std::string host;
    std::string process;
    words >> host >> process;
    if (processes.insert(host + " " + process).second) continue;
    throw Error(ErrorCode::kUnsupported,
                "device cuda: ranks of several nodes are threads of one process; NVSHMEM, which "
                "connects nodes, serves one rank a process");
  }
}

/// This rank's GPU, alike on the ranks that share it.
std::string describe_gpu(int device) { return fabric::host_id() + gpu_name(device); }

/// NVSHMEM's initialisation was seen to wait for ever with three ranks on two GPUs.
void require_even(const std::vector<std::string>& gpus) {
  std::map<std::string, int> ranks;
  for (const std::string& gpu : gpus) ++ranks[gpu];
  const auto by_ranks = [](const auto& a, const auto& b) { return a.second < b.second; };
  const auto [fewest, most] = std::minmax_element(ranks.begin(), ranks.end(), by_ranks);
  if (fewest->second == most->second) return;
  throw Error(ErrorCode::kUnsupported,
              fmt::format("device cuda: a GPU has {} ranks and another {}; NVSHMEM, which connects "
                          "nodes, needs as many on each",
                          most->second, fewest->second));
}

}  // namespace

class World::PieceHeap final : public Heap {
 public:
  PieceHeap(World& world, int number, const Pieces::Piece& piece)
      : world_(world), number_(number), base_(piece.base), bytes_(piece.bytes) {}
  ~PieceHeap() override {
    const std::lock_guard lock(world_.mutex_);
    world_.pieces_.give_back(number_, abandoned_);
  }
  std::byte* base() const noexcept override { return base_; }
  std::int64_t bytes() const noexcept override { return bytes_; }
  std::byte* mapped(int rank) const noexcept override {
    return static_cast<std::byte*>(nvshmem_ptr(base_, rank));
  }
  void abandon() noexcept override { abandoned_ = true; }

 private:
  World& world_;
  int number_;
  std::byte* base_;
  std::int64_t bytes_;
  bool abandoned_ = false;
};

World& World::instance() {
  static auto* world = new World;  // results may outlive main()
  return *world;
}

std::unique_ptr<Heap> World::allocate(Bootstrap& bootstrap, int device, std::int64_t bytes) {
  const DeviceGuard guard(device);
  const std::lock_guard lock(mutex_);
  join(bootstrap, device);
  int number = pieces_.find_free(bootstrap, bytes);
  if (number < 0) {
    auto* base = static_cast<std::byte*>(
        nvshmem_align(kAlignment, static_cast<std::size_t>(bytes)));  // collective
    fabric::together(bootstrap, [&] {
      if (base != nullptr) return;
      throw Error(ErrorCode::kOutOfMemory,
                  fmt::format("NVSHMEM has no {} bytes for its symmetric heap on GPU {}; where it "
                              "cannot grow, NVSHMEM_SYMMETRIC_SIZE says how large it is",
                              bytes, device));
    });
    number = pieces_.add(base, bytes);
  }
  const Pieces::Piece& piece = pieces_.take(number);
  fabric::together(bootstrap, [&] { zero(piece.base, static_cast<std::size_t>(piece.bytes)); });
  return std::make_unique<PieceHeap>(*this, number, piece);
}

void World::join(Bootstrap& bootstrap, int device) {
  const std::vector<std::string> all = bootstrap.all_gather(describe(name_, bootstrap.rank()));
  require_processes(all);
  const bool nobody = std::all_of(all.begin(), all.end(), [](const std::string& one) {
    return one.find(" - ") != std::string::npos;
  });
  if (nobody) {
    std::string gpu;
    fabric::together(bootstrap, [&] { gpu = describe_gpu(device); });
    require_even(bootstrap.all_gather(gpu));
    nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
    fabric::together(bootstrap, [&] {
      if (bootstrap.rank() == 0 && nvshmemx_get_uniqueid(&id) != 0)
        throw Error(ErrorCode::kSystem, "nvshmemx_get_uniqueid failed");
    });
    const std::string mine(reinterpret_cast<const char*>(&id), sizeof id);
    init(bootstrap, device, bootstrap.all_gather(mine)[0]);
    return;
  }
  fabric::together(bootstrap, [&] {
    if (!name_.empty() && size_ == bootstrap.size() && rank_ == bootstrap.rank() &&
        device_ == device)
      return;
    const std::string known = name_.empty()
                                  ? "this process has not joined it, others have"
                                  : fmt::format("this process is rank {} of {} there, with GPU {}",
                                                rank_, size_, device_);
    throw Error(ErrorCode::kUnsupported,
                fmt::format("device cuda: NVSHMEM, which connects nodes, is joined once by a "
                            "process, and {}; a Buffer with rank {} of {} and GPU {} needs other "
                            "processes",
                            known, bootstrap.rank(), bootstrap.size(), device));
  });
  const std::vector<std::string> names = bootstrap.all_gather(name_);
  fabric::together(bootstrap, [&] {
    if (std::all_of(names.begin(), names.end(), [&](const auto& one) { return one == name_; }))
      return;
    throw Error(ErrorCode::kUnsupported,
                "device cuda: the ranks have joined NVSHMEM, which connects nodes, with others "
                "than these; a Buffer among them needs other processes");
  });
}

void World::init(Bootstrap& bootstrap, int device, const std::string& unique_id) {
  nvshmemx_uniqueid_t id{};
  std::memcpy(&id, unique_id.data(), sizeof id);
  nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
  fabric::together(bootstrap, [&] {
    if (nvshmemx_set_attr_uniqueid_args(bootstrap.rank(), bootstrap.size(), &id, &attributes) != 0)
      throw Error(ErrorCode::kSystem, "nvshmemx_set_attr_uniqueid_args failed");
  });
  int status = 0;
  fabric::together(bootstrap, [&] {
    status = nvshmemx_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes);
    if (status != 0)
      throw Error(ErrorCode::kSystem, fmt::format("nvshmemx_init_attr gives {}", status));
    if (nvshmem_my_pe() != bootstrap.rank() || nvshmem_n_pes() != bootstrap.size()) {
      throw Error(ErrorCode::kSystem,
                  fmt::format("NVSHMEM numbers rank {} of {} as {} of {}", bootstrap.rank(),
                              bootstrap.size(), nvshmem_my_pe(), nvshmem_n_pes()));
    }
  });
  name_ = fabric::to_hex(unique_id);
  rank_ = bootstrap.rank();
  size_ = bootstrap.size();
  device_ = device;
  log::debug("rank {}: NVSHMEM connects {} ranks, GPU {} here", rank_, size_, device_);
}

}  // namespace deep_ep::cuda::nvshmem
