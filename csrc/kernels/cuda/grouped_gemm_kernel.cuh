// SPDX-License-Identifier: Apache-2.0
#pragma once

// The kernels of grouped_gemm.cuh.

#include "kernels/cuda/common/chained.cuh"
#include "kernels/cuda/common/cluster.cuh"
#include "kernels/cuda/grouped_gemm_multiply.cuh"

namespace mixture_of_mamba::grouped_gemm {

// What a block has in shared memory beside the ring's bytes.
struct Shared {
  uint64_t full[kStages], empty[kStages];
  Tile tiles[kStages], found[32];
  Groups groups;
};

template <typename C>
__device__ __forceinline__ Ring<C> begin_block(const GroupedGemmParams& p, const void* memory,
                                               Shared& shared) {
  const uint32_t aligned = (shared_address(memory) + kAlignment - 1) / kAlignment * kAlignment;
  const Ring<C> ring{aligned, shared_address(shared.full), shared_address(shared.empty), shared.tiles,
                     blockIdx.x % C::kPair};
  let_next_begin();
  if (p.offsets != nullptr) wait_for_previous();
  if (threadIdx.x == kThreads - 1) ring.begin();
  if (C::kPair > 1) {
    __syncwarp();
    arrive_at_cluster();
  }
  shared.groups.find(p, C::kOverRows);
  if (C::kPair > 1) wait_for_cluster();  // the other block's barriers are there
  return ring;
}

// Pairs of blocks.
template <typename C, bool kMore>
__global__ void __launch_bounds__(kThreads, 1) grouped_gemm_kernel(const __grid_constant__ Params params) {
  extern __shared__ uint8_t memory[];
  __shared__ Shared shared;
  Ring<C> ring = begin_block<C>(params.problem, memory, shared);
  const int warp = threadIdx.x / 32, role = warp / 4;  // a warpgroup that multiplies, or the last one
  if (role == kWarpgroups) {
    warpgroup::fewer_registers<56>();
    const Walk<C> walk(params.problem, shared.groups);
    wait_for_previous();
    if (warp == 4 * kWarpgroups) fetch_all<C>(params, walk, shared.found, ring);
  } else {
    warpgroup::more_registers<224>();
    wait_for_previous();
    Multiplier<C, kMore> multiplier(params, role, ring.memory + kRingBytes + warp * kOutBuffers * kOutBytes);
    for (Tile tile; (tile = next_tile(ring)).group >= 0;) {
      if (multiplier.multiply(tile, ring)) multiplier.store(tile, ring);
    }
  }
}

// Adds up the sums that the blocks of a cluster have laid at the address `sums`, each block some words of
// them. It is bound by what blocks read of each other.
template <typename C>
__device__ __forceinline__ void add_up(const GroupedGemmParams& p, const Tile& tile, int blocks,
                                       uint32_t sums) {
  using T = typename C::T;
  constexpr int kWord = 4, kAtOnce = 2;
  const auto result = Result<C>::of(p, tile);
  const T* const bias = C::kOverRows ? nullptr : result.bias(p, tile);
  const int columns = min(result.columns, C::kColumns) / kWord, words = min(tile.rows, C::kRows) * columns;
  const int step = kThreads * blocks;
  const auto store = [&](int row, int column, float(&values)[kWord]) {
    const T* more = bias != nullptr ? bias + column : nullptr;
    if (!C::kOverRows && p.add) more = result.at(row, column);
    if (more != nullptr) {
      float other[kWord];
      to_floats(load_pack<T, kWord, true>(more), other);
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
      const uint32_t at = sums + 4 * (row[i] * C::kSumStride + column[i]);
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
template <typename C>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_gemm_cluster_kernel(const __grid_constant__ Params params) {
  extern __shared__ uint8_t memory[];
  __shared__ Shared shared;
  const GroupedGemmParams& p = params.problem;
  Ring<C> ring = begin_block<C>(p, memory, shared);
  const int blocks = params.blocks, rank = cluster_rank();
  const unsigned index = blockIdx.x / blocks;
  const Walk<C> walk(p, shared.groups);
  wait_for_previous();
  if (index >= walk.count()) return;
  const Tile tile = walk.at(index);
  Tile own = tile;
  own.depth += tile.stages * rank / blocks * kSpan;
  own.stages = tile.stages * (rank + 1) / blocks - tile.stages * rank / blocks;
  const int role = threadIdx.x / 128;  // a warpgroup that multiplies, or the last one
  if (role == kWarpgroups) {
    if (threadIdx.x == 128 * kWarpgroups) fetch<C>(params, own, ring);
    __syncwarp();
    __syncthreads();
  } else {
    Multiplier<C, false> multiplier(params, role, 0);
    const bool some = multiplier.multiply(own, ring);
    __syncthreads();  // the ring has been read
    if (some) multiplier.lay_out_sums(own, ring.memory);
  }
  cluster_barrier();
  add_up<C>(p, tile, blocks, ring.memory);
  __syncwarp();
  cluster_barrier();  // nobody leaves while others read
}

}  // namespace mixture_of_mamba::grouped_gemm
