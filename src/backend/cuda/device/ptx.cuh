#pragma once

#include <cstddef>
#include <cstdint>

// All inline PTX: one instruction a function, with its memory order in its name where it has one.
namespace deep_ep::cuda {

/// Nanoseconds; one clock for all SMs, which advances in steps of up to 1 us.
__device__ __forceinline__ std::int64_t globaltimer() {
  std::int64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Barrier `number` of `threads` threads of the block, or of all of them; true in each if `value`
/// is in all. Unlike __syncthreads_and() it may stand at different places for different warps.
__device__ __forceinline__ bool barrier_and(bool value, int number, int threads) {
  std::uint32_t all;
  asm volatile(
      "{\n"
      ".reg .pred p, q;\n"
      "setp.ne.u32 p, %1, 0;\n"
      "barrier.cta.red.and.pred q, %2, %3, p;\n"
      "selp.u32 %0, 1, 0, q;\n"
      "}"
      : "=r"(all)
      : "r"(static_cast<std::uint32_t>(value)), "r"(number), "r"(threads)
      : "memory");
  return all != 0;
}
__device__ __forceinline__ bool barrier_and(bool value) {
  return barrier_and(value, 0, static_cast<int>(blockDim.x));
}

// 16 bytes in one access, never torn; relaxed: they order nothing but themselves.

struct Words16 {
  std::uint64_t low;
  std::uint64_t high;
};
__device__ __forceinline__ void store_relaxed_sys_b128(void* to, Words16 value) {
  asm volatile(
      "{\n"
      ".reg .b128 v;\n"
      "mov.b128 v, {%1, %2};\n"
      "st.relaxed.sys.global.b128 [%0], v;\n"
      "}" ::"l"(to),
      "l"(value.low), "l"(value.high)
      : "memory");
}
__device__ __forceinline__ Words16 load_relaxed_sys_b128(const void* from) {
  Words16 value;
  asm volatile(
      "{\n"
      ".reg .b128 v;\n"
      "ld.relaxed.sys.global.b128 v, [%2];\n"
      "mov.b128 {%0, %1}, v;\n"
      "}"
      : "=l"(value.low), "=l"(value.high)
      : "l"(from)
      : "memory");
  return value;
}
__device__ __forceinline__ Words16 load_acquire_sys_b128(const void* from) {
  Words16 value;
  asm volatile(
      "{\n"
      ".reg .b128 v;\n"
      "ld.acquire.sys.global.b128 v, [%2];\n"
      "mov.b128 {%0, %1}, v;\n"
      "}"
      : "=l"(value.low), "=l"(value.high)
      : "l"(from)
      : "memory");
  return value;
}
__device__ __forceinline__ void fence_acq_rel_sys() {
  asm volatile("fence.acq_rel.sys;" ::: "memory");
}
__device__ __forceinline__ void fence_sc_gpu() { asm volatile("fence.sc.gpu;" ::: "memory"); }

// A kernel that launch_kernel() launches may begin while the one before it in its stream runs.

/// By every block: the kernel behind may be launched when all blocks have come here.
__device__ __forceinline__ void allow_kernel_behind() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
/// Until the kernel before has ended, with all that it wrote visible: ahead of the first access to
/// memory that it may have to do with.
__device__ __forceinline__ void wait_for_kernel_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

/// Two floats to e4m3, the second in the upper byte: nearest even, saturating, NaN to 0x7f.
__device__ __forceinline__ std::uint16_t convert_e4m3x2(float low, float high) {
  std::uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}

// Copies of 4 bytes from global to shared memory, which nobody waits for but in groups: the words
// of a thread that it reads itself.

__device__ __forceinline__ void async_copy_4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
__device__ __forceinline__ void async_copy_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// All but the thread's last kPending groups are complete.
template <int kPending>
__device__ __forceinline__ void async_copy_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Bulk copies and the barriers in shared memory that they complete on. They run in the async proxy;
// their completion, once observed, is a fence between it and the generic one.

__device__ __forceinline__ void mbarrier_init(std::uint64_t* barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
/// Makes initialised barriers visible to the async proxy.
__device__ __forceinline__ void fence_mbarrier_init_release_cluster() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(std::uint64_t* barrier,
                                                          std::uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
/// acquire.cta of the phase's completion; false if the system suspended the thread for long enough.
__device__ __forceinline__ bool mbarrier_try_wait_parity_acquire_cta(std::uint64_t* barrier,
                                                                     std::uint32_t parity) {
  std::uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

/// Accesses of this thread to global memory, and what it has acquired, come before those of bulk
/// copies that it begins.
__device__ __forceinline__ void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
/// What this thread wrote to shared memory comes before bulk copies that are begun behind a barrier
/// with it.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/// Global to shared memory; addresses and size are multiples of 16. Completes on `barrier`.
__device__ __forceinline__ void bulk_load(void* to, const void* from, std::uint32_t bytes,
                                          std::uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
/// Shared to global memory, a peer's too; joins the thread's open bulk group.
__device__ __forceinline__ void bulk_store(void* to, const void* from, std::uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/// All but the thread's last kPending groups have read their sources: these may be overwritten.
template <int kPending>
__device__ __forceinline__ void bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
/// All but the thread's last kPending groups are complete: what they wrote is visible to it.
template <int kPending>
__device__ __forceinline__ void bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace deep_ep::cuda
