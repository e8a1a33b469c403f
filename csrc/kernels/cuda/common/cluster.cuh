// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// Clusters: neighbouring blocks that run at the same time and read each other's shared memory. They need
// compute capability 9.0; code for older devices that is compiled along does nothing.

namespace mixture_of_mamba {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// All threads of all blocks; what they wrote to shared memory before is visible after.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The same in two steps, by all threads, for what needs no fence: blocks have come so far, and have read all
// that others may write over.
__device__ __forceinline__ void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Where a block of the cluster has what this block has at this address of its shared memory.
__device__ __forceinline__ uint32_t address_of_block(uint32_t address, uint32_t rank) {
  uint32_t there = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
#endif
  return there;
}

// A float of a block of the cluster, by its address in this block's shared memory.
__device__ __forceinline__ float load_of_block(uint32_t address, uint32_t rank) {
  float value = 0.0f;
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.f32 %0, [%1];"
               : "=f"(value)
               : "r"(address_of_block(address, rank))
               : "memory");
#endif
  return value;
}

// values += as many floats of a block of the cluster, from an address of whole words.
template <int kCount>
__device__ __forceinline__ void add_of_block(uint32_t address, uint32_t rank, float (&values)[kCount]) {
#if __CUDA_ARCH__ >= 900
  const uint32_t there = address_of_block(address, rank);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    float4 four;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
                 : "r"(there + 4 * i)
                 : "memory");
    values[i] += four.x, values[i + 1] += four.y, values[i + 2] += four.z, values[i + 3] += four.w;
  }
#endif
}

}  // namespace mixture_of_mamba
