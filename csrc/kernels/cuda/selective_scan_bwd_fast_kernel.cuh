// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/common/chained.cuh"
#include "kernels/cuda/selective_scan_bwd_fast_elements.cuh"
#include "kernels/cuda/selective_scan_bwd_fast_sweep.cuh"

// The main kernel of the fast backward. selective_scan_bwd_fast.cu tells who owns what.

namespace mixture_of_mamba::fast_backward {

template <int kTeams, int kBiases>
struct Shared {
  TeamShared team[kTeams];
  float4 carry[kTeams == 1 ? 1 : kLaneChannels][kThreads];
  float4 bias[kBiases][kChannels / kQuad];
  float4 skip[kChannels / kQuad];  // D
  int32_t first_row[kBiases];      // of modality i + 1; the last: of padding
  ScanUnit unit;
};

// Barrier of a team; with one team that is the block.
template <int kTeams>
__device__ __forceinline__ void team_barrier(int team) {
  if constexpr (kTeams == 1) {
    __syncthreads();
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kThreads) : "memory");
  }
}

// Two teams walk the tiles of a unit alternately. Only sweep_back() must wait for the tile after: its g
// goes through shared memory. One buffer serves both directions, since a team takes before it gives.
template <typename BlockShared>
struct Handover {
  BlockShared& block;
  const int team, thread;

  __device__ int barrier(int of_team) const { return 3 + of_team; }

  template <bool kAll>
  __device__ __forceinline__ void take(Sweep<kAll>& sweep) const {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier(team)), "n"(2 * kThreads) : "memory");
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) unpack(block.carry[c][thread], sweep.carry[c]);
  }

  template <bool kAll>
  __device__ __forceinline__ void give(const Sweep<kAll>& sweep) const {
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) block.carry[c][thread] = pack(sweep.carry[c]);
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier(team ^ 1)), "n"(2 * kThreads) : "memory");
  }
};

template <int kTeams, int kBiases>
__device__ void fill_parameters(const Args& args, Shared<kTeams, kBiases>& block) {
  const TokenOrder& order = args.units.order;
  const int first = blockIdx.x * kChannels, i = threadIdx.x;
  if (i < kChannels) {
    reinterpret_cast<float*>(block.skip)[i] = args.D != nullptr ? args.D[first + i] : 0.0f;
    for (int m = 0; m < kBiases; ++m) {
      reinterpret_cast<float*>(block.bias[m])[i] =
          m < args.biases ? args.dt_bias[static_cast<int64_t>(m) * args.channels + first + i] : 0.0f;
    }
  }
  if (i < kBiases) {
    const int last = i < kBiases - 1 ? min(i + 1, order.modalities) : order.modalities;
    block.first_row[i] = order.offsets != nullptr ? order.offsets[last] : INT32_MAX;
  }
}

template <typename T, int kTeams, int kBiases, bool kAll>
__global__ void __launch_bounds__(kTeams* kThreads, kTeams == 1 ? 2 : 1)
    backward_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) unsigned char memory[];
  let_next_begin();
  using BlockShared = Shared<kTeams, kBiases>;
  BlockShared& block = *reinterpret_cast<BlockShared*>(memory);
  const int team = kTeams == 1 ? 0 : threadIdx.x / kThreads;
  TeamShared& shared = block.team[team];
  fill_parameters(args, block);
  Sweep<kAll> sweep(args, shared);
  ElementWise<T, kBiases, kAll, BlockShared> elements(args, block, shared);
  const Handover<BlockShared> handover{block, team, sweep.thread};

  ScanUnit unit;
  for (int index = blockIdx.y; get_unit(args.units, index, &unit); index += args.walkers) {
    __syncthreads();  // nobody is at the unit before any more
    if (threadIdx.x == 0) block.unit = unit;
    sweep.begin_unit(unit, index);
    const int tiles = (unit.length + kTokens - 1) / kTokens;
    int tile = tiles - 1 - team, buffer = 0;
    __syncthreads();
    elements.put_token(buffer, elements.find_row(tile));
    __syncthreads();
    if (tile >= 0) {
      elements.load(buffer);
      sweep.load_checkpoint(block.unit.slot + tile);
    }
    for (; tile >= 0; tile -= kTeams, buffer ^= 1) {
      const int32_t next_row = elements.find_row(tile - kTeams);
      elements.begin_tile(buffer);
      team_barrier<kTeams>(team);
      sweep.rebuild();
      elements.put_token(buffer ^ 1, next_row);
      elements.prefetch_token(next_row);
      if (kTeams == 2 && tile != tiles - 1) handover.take(sweep);
      sweep.sweep_back();
      if (kTeams == 2 && tile > 0) handover.give(sweep);
      team_barrier<kTeams>(team);
      if (tile >= kTeams) {
        elements.load(buffer ^ 1);
        sweep.load_checkpoint(block.unit.slot + tile - kTeams);
      }
      elements.store_state_gradients(buffer);
      elements.end_tile(buffer, block.unit.length - tile * kTokens);
      team_barrier<kTeams>(team);
    }
    const bool walked_tile_0 = (tiles + 1) % kTeams == team;
    if (walked_tile_0 && block.unit.chunk == 0 && args.grad_initial_state != nullptr) {
      sweep.store(args.grad_initial_state + block.unit.sequence * sweep.matrix_size(), sweep.carry);
    }
  }
  const int64_t walk = static_cast<int64_t>(blockIdx.y) * kTeams + team;
  sweep.store(args.grad_A + walk * sweep.matrix_size(), sweep.grad_A);
  elements.finish(walk);
}

template <typename T, int kTeams, int kBiases, bool kAll = true>
int launch(const Args& args, CUstream_st* stream) {
  const auto kernel = backward_kernel<T, kTeams, kBiases, kAll>;
  constexpr int kBytes = sizeof(Shared<kTeams, kBiases>);
  static_assert(kTeams == 1 ? 2 * kBytes <= kSharedOfTwo : kBytes <= kSharedOfOne,
                "a multiprocessor holds two teams");
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(args.channels / kChannels, args.walkers);
  kernel<<<grid, kTeams * kThreads, kBytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename T, int kTeams>
int launch_teams(const Args& args, CUstream_st* stream) {
  if (args.states < kStates) {
    return args.biases > 1 ? launch<T, kTeams, kMostBiases, false>(args, stream)
                           : launch<T, kTeams, 1, false>(args, stream);
  }
  switch (args.biases) {
    case 4:
      return launch<T, kTeams, 4>(args, stream);
    case 3:
      return launch<T, kTeams, 3>(args, stream);
    case 2:
      return launch<T, kTeams, 2>(args, stream);
    default:
      return launch<T, kTeams, 1>(args, stream);
  }
}

template <typename T>
int launch_main(const Args& args, int teams, CUstream_st* stream) {
  return teams == 1 ? launch_teams<T, 1>(args, stream) : launch_teams<T, 2>(args, stream);
}

}  // namespace mixture_of_mamba::fast_backward
