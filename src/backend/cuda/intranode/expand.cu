#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/device/pump.cuh"
#include "backend/cuda/device/waiting.cuh"
#include "backend/cuda/intranode/local.cuh"
#include "backend/cuda/intranode/steps.hpp"

namespace deep_ep::cuda::intranode {

namespace {

constexpr std::uint32_t kAll = 0xffffffff;

__device__ int lane() { return static_cast<int>(threadIdx.x % 32); }

// As in the kernel that moves rows between ranks.
constexpr int kRowWarps = 4;
constexpr int kSmallWarps = 8;
constexpr int kExpandThreads = (kRowWarps + kSmallWarps) * 32;

/// A piece of a received row, and the grouped row that a lane writes it to: of entry `lane`, or -1.
struct Copy {
  std::int32_t to;
  std::int32_t row;
  std::uint32_t at;  // of the piece in the row, in bytes
  std::uint32_t bytes;
};
using RowPump = Pump<6, 7168, 2, Copy>;

struct Shared {
  RowPump::Storage rows[kRowWarps];
};

/// Entry k of a received row, -1 also for what is out of range, which is reported: groups may be
/// the caller's.
__device__ std::int32_t grouped_row(const GroupArgs& args, std::int64_t row, std::int64_t k) {
  const std::int64_t topk = args.shape.num_topk;
  const std::int32_t at = k < topk ? args.groups.grouped_rows[row * topk + k] : -1;
  if (at >= -1 && at < args.shape.num_grouped_rows) return at;
  raise_invalid(args.comm, Finding::kBadGroup, row, k, at, args.shape.num_grouped_rows);
  return -1;
}

/// By a warp: its rows, every stride-th; each is read once and written to all of its groups.
__device__ void expand_x(const GroupArgs& args, Shared& shared, std::int64_t rows) {
  const int warp = threadIdx.x / 32;
  const std::int64_t stride = std::int64_t{gridDim.x} * kRowWarps;
  const auto row_bytes = static_cast<std::uint32_t>(args.x_bytes);
  // A row ahead of its use, since it has to come from memory.
  const auto copy_of = [&](std::int64_t row) {
    const std::int32_t to = row < rows ? grouped_row(args, row, lane()) : -1;
    // Entries that name the same expert are one copy.
    const std::uint32_t same = __match_any_sync(kAll, to);
    return __ffs(same) - 1 == lane() ? to : -1;
  };
  std::int64_t row = std::int64_t{warp} * gridDim.x + blockIdx.x;
  std::uint32_t at = 0;
  std::int32_t to = copy_of(row);
  const auto next = [&](Piece& piece, Copy& copy) {
    if (row >= rows) return false;
    piece = {args.x + row * args.x_bytes + at, min(row_bytes - at, RowPump::kStageBytes)};
    copy = {to, static_cast<std::int32_t>(row), at, piece.bytes};
    at += RowPump::kStageBytes;
    if (at >= row_bytes) {
      at = 0;
      row += stride;
      to = copy_of(row);
    }
    return true;
  };
  RowPump pump(shared.rows[warp]);
  const auto place = [](const Copy& copy, bool) { return copy; };
  pump.run(next, place, [&](const std::byte* from, const Copy& copy) {
    if (copy.to >= 0)
      bulk_store(args.grouped_x + copy.to * args.x_bytes + copy.at, from, copy.bytes);
    for (std::int64_t k = 32 + lane(); k < args.shape.num_topk; k += 32) {
      const std::int32_t at = grouped_row(args, copy.row, k);
      if (at >= 0) bulk_store(args.grouped_x + at * args.x_bytes + copy.at, from, copy.bytes);
    }
  });
}

/// By a warp: its rows' scales, to each of their groups.
__device__ void expand_scales(const GroupArgs& args, std::int64_t rows, std::int64_t warp,
                              std::int64_t warps) {
  for (std::int64_t row = warp; row < rows; row += warps) {
    for (std::int64_t s = lane(); s < args.scale_words; s += 32) {
      const std::uint32_t word = args.scales[row * args.scale_words + s];
      for (std::int64_t k = 0; k < args.shape.num_topk; ++k) {
        const std::int32_t at = grouped_row(args, row, k);
        if (at >= 0) args.grouped_scales[at * args.scale_words + s] = word;
      }
    }
  }
}

/// By a warp: padding becomes zero, so that products over whole groups are right.
__device__ void clear_padding(const GroupArgs& args, std::int64_t end, std::int64_t warp,
                              std::int64_t warps) {
  for (std::int64_t base = warp * 32; base < end; base += warps * 32) {
    const std::int64_t g = base + lane();
    std::uint32_t left = __ballot_sync(kAll, g < end && args.groups.recv_rows[g] < 0);
    for (; left != 0; left &= left - 1) {
      const std::int64_t row = base + __ffs(left) - 1;
      auto* x = reinterpret_cast<uint4*>(args.grouped_x + row * args.x_bytes);
      for (std::int64_t i = lane(); i < args.x_bytes / 16; i += 32) x[i] = {0, 0, 0, 0};
      for (std::int64_t s = lane(); s < args.scale_words; s += 32)
        args.grouped_scales[row * args.scale_words + s] = 0;
    }
  }
}

/// Rows of all groups, of which the caller's may be wrong.
__device__ std::int64_t grouped_end(const GroupArgs& args) {
  const int experts = args.shape.num_local_experts;
  const std::int64_t end = args.groups.group_offsets[experts];
  if (end >= 0 && end <= args.shape.num_grouped_rows) return end;
  if (blockIdx.x == 0 && threadIdx.x == blockDim.x - 1)
    raise_invalid(args.comm, Finding::kBadOffsets, experts, end, args.shape.num_grouped_rows);
  return 0;
}

__global__ void __launch_bounds__(kExpandThreads, 1)
    expand_rows(const __grid_constant__ GroupArgs args) {
  extern __shared__ __align__(128) std::byte memory[];
  wait_for_kernel_before();
  const std::int64_t end = grouped_end(args);
  // Without groups (what was found does not fit) there is nowhere to copy to.
  const std::int64_t rows =
      end > 0 ? received_rows(args.num_received_rows, args.shape.num_rows) : 0;
  if (threadIdx.x < kRowWarps * 32) {
    expand_x(args, *reinterpret_cast<Shared*>(memory), rows);
  } else {
    const std::int64_t warps = std::int64_t{gridDim.x} * kSmallWarps;
    const std::int64_t warp = (std::int64_t{threadIdx.x / 32} - kRowWarps) * gridDim.x + blockIdx.x;
    if (args.scale_words > 0) expand_scales(args, rows, warp, warps);
    clear_padding(args, end, warp, warps);
  }
  if (is_last_block(args.comm)) end_local_kernel(args.comm);
}

}  // namespace

cudaError_t load_expand() { return load<expand_rows>(); }

cudaError_t launch_expand(const GroupArgs& args, int num_sms, cudaStream_t stream) {
  constexpr int kShared = sizeof(Shared);
  const cudaError_t allowed = allow_shared<expand_rows>(kShared);
  if (allowed != cudaSuccess) return allowed;
  return launch_kernel(expand_rows, num_sms, kExpandThreads, kShared, stream, args);
}

}  // namespace deep_ep::cuda::intranode
