#pragma once

#include <type_traits>

#include "backend/cuda/internode_ll/combine.cuh"

// The kernels of combines whose rows come home in bfloat16.
namespace deep_ep::cuda::internode_ll {

namespace {

/// Rows of bfloat16, as they are.
struct PlainRows {
  static constexpr bool kKeepsOwn = true;
  /// What a thread has of a row at once, so that their loads are under way together, and those of
  /// the next two addends while it sums.
  static constexpr int kUnits = 4;

  static __device__ std::int64_t x_bytes(const CombineArgs& args) { return args.shape.row_bytes; }

  static __device__ void stage(const auto& args, const Slice& slice) {
    sum_rows(args, slice, shared_at<Addend>(args.shared.places),
             args.is_rank_major() ? 1 : *shared_at<std::int32_t>(args.shared.num_places),
             shared_at<uint4>(args.shared.row));
  }

  static __device__ bool sum_token(const auto& args, const Ticket& ticket, std::int64_t token,
                                   const Slice& slice, const Route& route) {
    if (ticket.keeps_own && !args.is_rank_major()) {
      sum_rows(args, slice, shared_at<Addend>(args.shared.own_addends),
               *shared_at<std::int32_t>(args.shared.num_own),
               shared_at<uint4>(args.shared.own_row));
    }
    if (!await_rows(args, ticket, route)) return false;
    std::byte* out = args.combined_x + token * args.shape.row_bytes;
    if (!comes_in_packets(args, route)) {
      sum_plain(args, ticket, slice, route, out);
      __syncthreads();  // the route has been read
      return true;
    }
    auto* row = shared_at<std::byte>(args.shared.row);
    const bool good = sum_packets(args, ticket, slice, route, row);
    if (__syncthreads_and(good) == 0) return false;
    copy_units(row, out, slice.first_unit(), slice.end_unit(num_units(args)));
    return true;
  }

 private:
  static __device__ int num_units(const auto& args) {
    return static_cast<int>(args.shape.row_bytes / 16);
  }

  static __device__ void load_units(const uint4* from, int first, int end, uint4* values) {
#pragma unroll
    for (int j = 0; j < kUnits; ++j)
      if (first + j * kThreads < end) values[j] = from[first + j * kThreads];
  }

  /// By all threads: the weighted sum of rows, or the one row of rank-major.
  static __device__ void sum_rows(const auto& args, const Slice& slice, const Addend* addends,
                                  int count, uint4* row) {
    const int end = slice.end_unit(num_units(args));
#pragma unroll 1
    for (int first = slice.first_unit() + static_cast<int>(threadIdx.x); first < end;
         first += kUnits * kThreads)
      sum_units(args, addends, count, first, end, row);
  }

  static __device__ void sum_units(const auto& args, const Addend* addends, int count, int first,
                                   int end, uint4* row) {
    uint4 even[kUnits] = {};
    uint4 odd[kUnits] = {};
    if (count > 0) load_units(addends[0].row, first, end, even);
    if (count > 1) load_units(addends[1].row, first, end, odd);
    Sum8 sums[kUnits];
    if (!args.is_rank_major()) {
#pragma unroll 1
      for (int i = 0; i < count; i += 2) {
        add_units(sums, even, addends[i].weight);
        if (i + 2 < count) load_units(addends[i + 2].row, first, end, even);
        if (i + 1 == count) break;
        add_units(sums, odd, addends[i + 1].weight);
        if (i + 3 < count) load_units(addends[i + 3].row, first, end, odd);
      }
    }
#pragma unroll
    for (int j = 0; j < kUnits; ++j)
      if (first + j * kThreads < end)
        row[first + j * kThreads] = args.is_rank_major() ? even[j] : sums[j].round();
  }

  static __device__ void add_units(Sum8* sums, const uint4* values, float weight) {
#pragma unroll
    for (int j = 0; j < kUnits; ++j) sums[j].add(values[j], weight);
  }

  static __device__ bool comes_in_packets(const auto& args, const Route& route) {
    const Announced announced(args.shared, args.comm.num_ranks);
    bool found = false;
#pragma unroll 1
    for (int i = 0; i < *route.num_ranks; ++i)
      found = found || (route.to_rank[i] >= 0 && announced.packeted[route.to_rank[i]] != 0);
    return found;
  }

  static __device__ void sum_plain(const auto& args, const Ticket& ticket, const Slice& slice,
                                   const Route& route, std::byte* out) {
    const int ranks = *route.num_ranks;
    const int end = slice.end_unit(num_units(args));
#pragma unroll 2
    for (int unit = slice.first_unit() + static_cast<int>(threadIdx.x); unit < end;
         unit += kThreads) {
      Sum16<__nv_bfloat162> sum;
#pragma unroll 1
      for (int i = 0; i < ranks; ++i) {
        if (route.to_rank[i] < 0) continue;
        sum.add(reinterpret_cast<const uint4*>(plain_home(args, ticket, route, i))[unit]);
      }
      reinterpret_cast<uint4*>(out)[unit] = sum.round();
    }
  }

  /// By all threads, each its share: sums by packets into the row in shared memory. Some of the
  /// rows may have come plainly. False: a fault.
  static __device__ bool sum_packets(const auto& args, const Ticket& ticket, const Slice& slice,
                                     const Route& route, std::byte* row) {
    // Five are all that a thread has of a row of 7168 values; elsewhere registers are too few.
    using Known = std::remove_cvref_t<decltype(args)>;
    constexpr int kSize = !Known::kRankMajor ? 3 : Known::kIsOfFewTokens ? 4 : 5;
    const Announced announced(args.shared, args.comm.num_ranks);
    const MessageArea& area = args.places.returns;
    const int ranks = *route.num_ranks;
    const int end = slice.end_packet();
    const auto num_words = static_cast<int>(args.shape.row_bytes / 4);
#pragma unroll 1
    for (int first = slice.first_packet() + static_cast<int>(threadIdx.x); first < end;
         first += kSize * kThreads) {
      float2 sums[kSize][3] = {};
#pragma unroll 1
      for (int i = 0; i < ranks; ++i) {
        const int rank = route.to_rank[i];
        if (rank < 0) continue;
        PacketBatch<kSize> batch;
        if (announced.packeted[rank] != 0) {
          const Packet* from = place_here(ticket.packet_shift, area.row(rank, route.to_message[i]));
          const Arrival arrival = batch.await(args, ticket, rank, from, first, kThreads, end);
          if (arrival == Arrival::kFailed) return false;
          if (arrival == Arrival::kAbsent) continue;
        } else {
          const auto* words =
              reinterpret_cast<const std::uint32_t*>(plain_home(args, ticket, route, i));
#pragma unroll
          for (int j = 0; j < kSize; ++j) {
#pragma unroll
            for (int w = 0; w < 3; ++w) {
              const int word = 3 * (first + j * kThreads) + w;
              batch.packets[j].words[w] = word < num_words ? words[word] : 0;
            }
          }
        }
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
#pragma unroll
          for (int w = 0; w < 3; ++w) {
            const float2 pair = widen_bfloat16(batch.packets[j].words[w]);
            sums[j][w].x = plan::add(sums[j][w].x, pair.x);
            sums[j][w].y = plan::add(sums[j][w].y, pair.y);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const int number = first + j * kThreads;
        if (number >= end) break;
#pragma unroll
        for (int w = 0; w < 3; ++w)
          narrow(sums[j][w], reinterpret_cast<__nv_bfloat162*>(row)[3 * number + w]);
      }
    }
    return true;
  }
};

}  // namespace

/// Sends, receives, or both. Not of this file alone: a name that is would tell nothing.
template <Form kForm, class Args>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm<Args>)
    combine(const __grid_constant__ Formed<Args, kForm> args) {
  run_combine<PlainRows>(args);
}

template <class Args>
cudaError_t launch_plain_combine_kernel(const Args& given, int num_sms, cudaStream_t stream) {
  Args args = given;
  args.slice_shift = find_slice_shift(args, num_sms);
  const unsigned blocks = num_blocks(args, num_sms, 1 << args.slice_shift);
  const bool packeted = uses_packets(args.places.returns, args.num_tokens);
  return with_form<Args>(form_of(args, blocks, packeted), [&](auto form) {
    return launch_form<combine<form.value, Args>, form.value>(args, blocks, stream);
  });
}

template <class Args>
cudaError_t load_plain_combine_kernels() {
  return with_all_forms<Args>([](auto form) { return load<combine<form.value, Args>>(); });
}

}  // namespace deep_ep::cuda::internode_ll
