// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace mixture_of_mamba {

constexpr int kWarp = 32;

// Sum of `value` over the threads before this one; *total is the sum over the block. Two barriers.
template <int kThreads>
__device__ __forceinline__ int32_t exclusive_sum(int32_t value, int32_t (&warp_totals)[kThreads / kWarp],
                                                 int32_t* total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t sum = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t before = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += before;
  }
  __syncthreads();  // the totals of the call before have been read
  if (lane == kWarp - 1) warp_totals[warp] = sum;
  __syncthreads();
  int32_t offset = 0;
  *total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp) offset += warp_totals[w];
    *total += warp_totals[w];
  }
  return offset + sum - value;
}

}  // namespace mixture_of_mamba
