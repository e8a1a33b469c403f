// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/common/cluster.cuh"

// Tiles of matrices on their way into shared memory by the copy engine (TMA), and the barriers that count
// their bytes. Compute capability 9.0 and up.

namespace mixture_of_mamba {

// A barrier in shared memory, by its address. Its phases are waited for by parity: 0, 1, 0, ...
__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After all init_barrier(), before the barrier of the block.
__device__ __forceinline__ void end_init_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// At the barrier that a block of the cluster has at this address. Without a fence: it tells that something
// has been read, not that something was written.
__device__ __forceinline__ void arrive_at_block(uint32_t barrier, uint32_t rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_of_block(barrier, rank))
               : "memory");
}

// The phase ends only when so many bytes have come as well.
__device__ __forceinline__ void arrive_and_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void wait_for_phase(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// How long the L2 cache should keep what it brings.
enum class Keep : uint64_t {
  kShort = 0x12F0000000000000,  // evict first: read once, or by neighbours at about the same time
  kLong = 0x14F0000000000000,   // evict last
};

// The tile of `map` with this first column and row; elements beyond the matrix are 0.
__device__ __forceinline__ void fetch_tile(uint32_t to, const CUtensorMap& map, int column, int row,
                                           uint32_t barrier, Keep keep) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(static_cast<uint64_t>(keep))
      : "memory");
}

// The same for the blocks of the cluster whose bits are set: to the same address of each, counted by its own
// barrier.
__device__ __forceinline__ void fetch_tile_for(uint16_t blocks, uint32_t to, const CUtensorMap& map,
                                               int column, int row, uint32_t barrier, Keep keep) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(blocks), "l"(static_cast<uint64_t>(keep))
      : "memory");
}

// What this thread has written to shared memory is there for the copy engine and the tensor cores.
__device__ __forceinline__ void show_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

}  // namespace mixture_of_mamba
