// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/causal_conv1d.cuh"
#include "kernels/cuda/common/chained.cuh"
#include "kernels/cuda/common/steps.cuh"

// The forward convolution of a few tokens, as in decoding, where the states are most of what there is to
// move.
//
// Grid     channel blocks x as many sequences as fit at once.
// Thread   kVector channels, from sequence to sequence; the next one's state and token are loaded while this
//          one is computed. The first state is loaded before the kernel ahead has ended where that is
//          settled. No shared memory, no barrier.
// Cost     16-bit, width 4: 6 bytes read, 6 written of the state, 4 of the token a (sequence, channel).

namespace mixture_of_mamba::conv {

constexpr int kStepBlocks = 8;  // of a multiprocessor

// One token that is not padding.
template <typename K>
__device__ __forceinline__ void forward_token(const CausalConv1dForwardParams& p, Walk<K>& walk, int32_t row,
                                              const typename Walk<K>::Channels& x) {
  float y[K::kVector];
  walk.pre_activation(x, y);
#pragma unroll
  for (int v = 0; v < K::kVector; ++v) {
    const float activated = silu_fast<typename K::T>(y[v]);
    y[v] = p.silu ? activated : y[v];  // a selection: a branch would cut the run of instructions
  }
  walk.push(x);
  walk.store(p.y, row, y);
}

template <typename K>
__global__ void __launch_bounds__(kThreads, kStepBlocks)
    step_kernel(const __grid_constant__ CausalConv1dForwardParams p, const __grid_constant__ ConvArgs args) {
  using Channels = typename Walk<K>::Channels;
  constexpr int kTaps = K::kWidth - 1;
  let_next_begin();
  if (!p.settled_state) wait_for_previous();
  const int64_t channel = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) * K::kVector;
  if (channel >= p.channels) return wait_for_previous();
  Walk<K> walk(p, args, channel, false);
  struct One {
    Channels state[kTaps], x;
    int32_t row;
  };
  const int64_t length = p.order.length, sequences = p.order.sequences;
  const auto load_state = [&](One& one, int64_t sequence) {
    walk.unit.sequence = static_cast<int32_t>(sequence);
    one.row = p.order.row_of(sequence * length);
#pragma unroll
    for (int j = 0; j < kTaps; ++j) one.state[j] = walk.load_state(p.initial_state, j);
  };
  One now;
  load_state(now, blockIdx.y);
  wait_for_previous();
  walk.load_parameters();
  now.x = walk.load(p.x, now.row);  // of padding too, and then not used
#pragma unroll 1
  for (int64_t sequence = blockIdx.y; sequence < sequences; sequence += gridDim.y) {
    One next;
    load_state(next, min(sequence + gridDim.y, sequences - 1));
    next.x = walk.load(p.x, next.row);
#pragma unroll
    for (int j = 0; j < kTaps; ++j) walk.set_window(j, now.state[j]);
#pragma unroll 1
    for (int64_t t = 0; t < length; ++t) {
      const int32_t row = t == 0 ? now.row : p.order.row_of(sequence * length + t);
      if (walk.is_padding(row)) {
        const float zero[K::kVector] = {};
        walk.store(p.y, row, zero);
      } else {
        forward_token(p, walk, row, t == 0 ? now.x : walk.load(p.x, row));
      }
    }
    walk.unit.sequence = static_cast<int32_t>(sequence);
    if (p.final_state != nullptr) walk.put_window(p.final_state);
    now = next;
  }
}

template <typename K>
int launch_step(const CausalConv1dForwardParams& p, CUstream_st* stream) {
  const unsigned blocks = static_cast<unsigned>(channel_blocks_of(p.channels, K::kVector));
  const dim3 grid = step_grid(blocks, p.order.sequences, kStepBlocks);
  return launch_chained({grid, kThreads, 0, stream}, step_kernel<K>, p, ConvArgs());
}

}  // namespace mixture_of_mamba::conv
