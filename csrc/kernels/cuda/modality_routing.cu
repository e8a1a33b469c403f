// SPDX-License-Identifier: Apache-2.0
//
// A stable counting sort of tokens by modality, padding last, in three small kernels.
//
//   count    a block counts the modalities of its tile of tokens: counts [modalities + 1][tiles]
//   sum      one block replaces the counts by their exclusive prefix sum, modality-major, which is the first
//            row of each modality of each tile
//   place    a block walks its tile in rounds of kThreads tokens; a token's row is its tile's next row of the
//            modality plus its rank among the equal tokens before it in the warp
//
// Barriers  `place` lets the warps of a round take their rows one after the other: one barrier a warp.
// Cost      24 bytes a token of HBM and three launches; nothing comes near the bandwidth at usual sizes.

#include "kernels/modality_routing.h"

#include "kernels/cuda/common/block_sum.cuh"
#include "kernels/cuda/common/chained.cuh"
#include "kernels/cuda/common/launch.h"

namespace mixture_of_mamba {
namespace {

constexpr int kThreads = 256;
constexpr int kSumThreads = 1024;
constexpr int64_t kTile = 1024;      // tokens, at least
constexpr int64_t kMaxTiles = 1024;  // bounds the table of counts

struct Tiling {
  int64_t tile;  // tokens; a multiple of kThreads
  int64_t tiles;
};

Tiling tiling_of(int64_t tokens) {
  const int64_t tile = kTile * std::max<int64_t>(ceil_div(tokens, kTile * kMaxTiles), 1);
  return {tile, ceil_div(tokens, tile)};
}

__device__ __forceinline__ int32_t key_of(const ModalityRoutingParams& p, int64_t time) {
  const int64_t id = p.ids[time];
  return id >= 0 && id < p.num_modalities ? static_cast<int32_t>(id) : p.num_modalities;
}

// Tokens of the warp with the same key, and how many of them are before this lane. Lanes past the tile's end
// have key -1.
struct Peers {
  unsigned lanes;
  int rank;
  __device__ explicit Peers(int32_t key) : lanes(__match_any_sync(~0u, key)) {
    rank = __popc(lanes & ((1u << (threadIdx.x % kWarp)) - 1));
  }
  __device__ int count() const { return __popc(lanes); }
};

__global__ void __launch_bounds__(kThreads)
    count_kernel(const ModalityRoutingParams p, const Tiling tiling, int32_t* counts) {
  extern __shared__ int32_t tile_counts[];  // [modalities + 1]
  follow_previous();
  for (int m = threadIdx.x; m <= p.num_modalities; m += kThreads) tile_counts[m] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * tiling.tile, end = min(begin + tiling.tile, p.tokens);
  for (int64_t round = begin; round < end; round += kThreads) {
    const int64_t time = round + threadIdx.x;
    const int32_t key = time < end ? key_of(p, time) : -1;
    const Peers peers(key);
    if (key >= 0 && peers.rank == 0) atomicAdd(&tile_counts[key], peers.count());
  }
  __syncthreads();
  for (int m = threadIdx.x; m <= p.num_modalities; m += kThreads) {
    counts[m * tiling.tiles + blockIdx.x] = tile_counts[m];
  }
}

// A thread owns a run of the table, so that one pass of prefix sums over the block serves any size.
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const ModalityRoutingParams p, const Tiling tiling, int32_t* counts) {
  __shared__ int32_t warp_totals[kSumThreads / kWarp];
  follow_previous();
  const int64_t size = (p.num_modalities + 1) * tiling.tiles;
  const int64_t run = (size + kSumThreads - 1) / kSumThreads;
  const int64_t begin = min(threadIdx.x * run, size), end = min(begin + run, size);
  int32_t sum = 0, total;
  for (int64_t i = begin; i < end; ++i) sum += counts[i];
  int32_t next = exclusive_sum<kSumThreads>(sum, warp_totals, &total);
  for (int64_t i = begin; i < end; ++i) {
    const int32_t count = counts[i];
    counts[i] = next;
    next += count;
  }
  __syncthreads();
  for (int m = threadIdx.x; m <= p.num_modalities; m += kSumThreads) {
    p.offsets[m] = tiling.tiles > 0 ? counts[m * tiling.tiles] : 0;
  }
}

__global__ void __launch_bounds__(kThreads)
    place_kernel(const ModalityRoutingParams p, const Tiling tiling, const int32_t* first_rows) {
  extern __shared__ int32_t next_row[];  // [modalities + 1]
  follow_previous();
  for (int m = threadIdx.x; m <= p.num_modalities; m += kThreads) {
    next_row[m] = first_rows[m * tiling.tiles + blockIdx.x];
  }
  const int warp = threadIdx.x / kWarp;
  const int64_t begin = blockIdx.x * tiling.tile, end = min(begin + tiling.tile, p.tokens);
  for (int64_t round = begin; round < end; round += kThreads) {
    const int64_t time = round + threadIdx.x;
    const int32_t key = time < end ? key_of(p, time) : -1;
    const Peers peers(key);
    int32_t row = 0;
    for (int turn = 0; turn < kThreads / kWarp; ++turn) {
      __syncthreads();
      if (turn != warp) continue;
      if (key >= 0) row = next_row[key] + peers.rank;
      __syncwarp();
      if (key >= 0 && peers.rank == 0) next_row[key] += peers.count();
    }
    if (key >= 0) {
      p.rows[time] = row;
      p.order[row] = static_cast<int32_t>(time);
    }
  }
}

}  // namespace

size_t modality_routing_workspace_cuda(const ModalityRoutingParams& p) {
  return (p.num_modalities + 1) * tiling_of(p.tokens).tiles * sizeof(int32_t);
}

int launch_modality_routing_cuda(const ModalityRoutingParams& p, void* workspace, CUstream_st* stream) {
  const Tiling tiling = tiling_of(p.tokens);
  const unsigned blocks = static_cast<unsigned>(tiling.tiles);
  const size_t shared = (p.num_modalities + 1) * sizeof(int32_t);
  int32_t* const table = static_cast<int32_t*>(workspace);
  const Launch tiles{blocks, kThreads, shared, stream};
  int error = blocks > 0 ? launch_chained(tiles, count_kernel, p, tiling, table) : cudaSuccess;
  if (error == cudaSuccess) error = launch_chained({1, kSumThreads, 0, stream}, sum_kernel, p, tiling, table);
  if (error != cudaSuccess || blocks == 0) return error;
  return launch_chained(tiles, place_kernel, p, tiling, static_cast<const int32_t*>(table));
}

}  // namespace mixture_of_mamba
