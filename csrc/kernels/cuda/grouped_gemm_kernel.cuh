// SPDX-License-Identifier: Apache-2.0
#pragma once

// The kernels of grouped_gemm.cuh.

#include "kernels/cuda/common/chained.cuh"
#include "kernels/cuda/common/cluster.cuh"
#include "kernels/cuda/grouped_gemm_multiply.cuh"

namespace mixture_of_mamba::grouped_gemm {

__device__ __forceinline__ void begin_block(const GroupedGemmParams& p, const Ring& ring, Groups& groups) {
  let_next_begin();
  if (p.offsets != nullptr) wait_for_previous();
  if (threadIdx.x == kThreads - 1) {
    for (int slot = 0; slot < kStages; ++slot) {
      init_barrier(ring.full + 8 * slot, 1);
      init_barrier(ring.empty + 8 * slot, 4 * kWarpgroups);
    }
    end_init_barriers();
  }
  groups.find(p, p.result == GroupedGemmParams::Result::kMatrix);
}

template <typename T, Form kForm, bool kMore>
__global__ void __launch_bounds__(kThreads, 1) grouped_gemm_kernel(const __grid_constant__ Params params) {
  extern __shared__ uint8_t memory[];
  __shared__ uint64_t barriers[2 * kStages];
  __shared__ Tile tiles[kStages], found[32];
  __shared__ Groups groups;
  const uint32_t shared = (shared_address(memory) + kAlignment - 1) / kAlignment * kAlignment;
  Ring ring{shared, shared_address(barriers), shared_address(barriers + kStages), tiles};
  begin_block(params.problem, ring, groups);
  const int role = threadIdx.x / 128;  // a warpgroup that multiplies, or the last one
  if (role == kWarpgroups) {
    warpgroup::fewer_registers<56>();
    const Walk<kForm> walk(params.problem, groups, gridDim.x);
    wait_for_previous();
    if (threadIdx.x / 32 == 4 * kWarpgroups) fetch_all(params, walk, found, ring);
  } else {
    warpgroup::more_registers<224>();
    wait_for_previous();
    Multiplier<T, kForm, kMore> multiplier(params, role,
                                           shared + kRingBytes + threadIdx.x / 32 * kOutBuffers * kOutBytes);
    for (Tile tile; (tile = next_tile(ring)).group >= 0;) {
      if (multiplier.multiply(tile, ring)) multiplier.store(tile);
    }
  }
}

// Adds up the sums that the blocks of a cluster have laid at the address `sums`, each block some words of
// them. It is bound by what blocks read of each other.
template <typename T, Form kForm>
__device__ __forceinline__ void add_up(const GroupedGemmParams& p, const Tile& tile, int blocks,
                                       uint32_t sums) {
  constexpr int kWord = 4, kAtOnce = 2;
  const auto result = Result<T>::template of<kForm>(p, tile);
  const int columns = min(result.columns, kTileColumns) / kWord, words = min(tile.rows, kTileRows) * columns;
  const int step = kThreads * blocks;
  const auto store = [&](int row, int column, float(&values)[kWord]) {
    if (const T* const more = kForm == Form::kOverRows ? nullptr : result.addend(p, tile, row);
        more != nullptr) {
      float other[kWord];
      to_floats(load_pack<T, kWord, true>(more + column), other);
#pragma unroll
      for (int k = 0; k < kWord; ++k) values[k] += other[k];
    }
    store_pack<T, kWord, true>(result.at(row, column), from_floats<T>(values));
  };
  for (int first = threadIdx.x + cluster_rank() * kThreads; first < words; first += kAtOnce * step) {
    int row[kAtOnce], column[kAtOnce];
    float values[kAtOnce][kWord] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int word = min(first + i * step, words - 1);
      row[i] = word / columns, column[i] = word % columns * kWord;
      const uint32_t at = sums + 4 * (row[i] * kSumStride + column[i]);
#pragma unroll
      for (int block = 0; block < kMostBlocks; ++block) {
        if (block < blocks) add_of_block(at, block, values[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * step < words) store(row[i], column[i], values[i]);
    }
  }
}

// A cluster of blocks a tile, which share its stages.
template <typename T, Form kForm>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_gemm_cluster_kernel(const __grid_constant__ Params params) {
  extern __shared__ uint8_t memory[];
  __shared__ uint64_t barriers[2 * kStages];
  __shared__ Tile tiles[kStages];
  __shared__ Groups groups;
  const GroupedGemmParams& p = params.problem;
  const uint32_t shared = (shared_address(memory) + kAlignment - 1) / kAlignment * kAlignment;
  Ring ring{shared, shared_address(barriers), shared_address(barriers + kStages), tiles};
  begin_block(p, ring, groups);
  const int blocks = params.blocks, rank = cluster_rank();
  const unsigned index = blockIdx.x / blocks;
  const Walk<kForm> walk(p, groups, 0);
  wait_for_previous();
  if (index >= walk.units()) return;
  const Tile tile = walk.at(index);
  Tile own = tile;
  own.depth += tile.stages * rank / blocks * kSpan;
  own.stages = tile.stages * (rank + 1) / blocks - tile.stages * rank / blocks;
  const int role = threadIdx.x / 128;  // a warpgroup that multiplies, or the last one
  if (role == kWarpgroups) {
    if (threadIdx.x == 128 * kWarpgroups) fetch<kForm>(params, own, ring);
    __syncwarp();
    __syncthreads();
  } else {
    Multiplier<T, kForm, false> multiplier(params, role, 0);
    const bool some = multiplier.multiply(own, ring);
    __syncthreads();  // the ring has been read
    if (some) multiplier.lay_out_sums(own, shared);
  }
  cluster_barrier();
  add_up<T, kForm>(p, tile, blocks, shared);
  __syncwarp();
  cluster_barrier();  // nobody leaves while others read
}

}  // namespace mixture_of_mamba::grouped_gemm
