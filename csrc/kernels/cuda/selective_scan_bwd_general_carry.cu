// SPDX-License-Identifier: Apache-2.0
//
// Carries of the general backward between the chunks of a cut sequence. The adjoint is affine in what
// enters it: over chunk c,
//
//   leaving g = local[c] + exp(A * sum of delta over c) * entering g,     local: what leaves for entering 0
//
// so the chunks' locals and delta sums are made in parallel (adjoint_kernel), and a thread per state then
// walks the few chunks (combine_kernel), leaving in unit_carry what enters each.
//
// adjoint_kernel   grid (channels / 64, units, states / 16), 128 threads: element-wise as in the main
//                  kernel, then a thread sweeps one channel and 8 states. 17 exponentials and about 110
//                  issue slots per (token, channel).
// combine_kernel   grid (channels * states / 128, units); blocks of units that are not their sequence's
//                  last do nothing.

#include <algorithm>

#include "kernels/cuda/common/chained.cuh"
#include "kernels/cuda/common/launch.h"
#include "kernels/cuda/selective_scan_bwd_general.cuh"

namespace mixture_of_mamba::general_backward {
namespace {

constexpr int kThreadStates = kStates * kChannels / kThreads;
constexpr int kStagedC = kTokens * kStates / kThreads;
constexpr int64_t kMostGridRows = 65535;
constexpr int kCombinedAtOnce = 8;  // chunks whose loads are in flight together

struct Shared {
  TileValues delta, grad_y;
  float C[kTokens][kStates];
  TileTokens tokens[2];
};

template <typename T>
struct Inputs {
  T dt[kItems], z[kItems], grad_out[kItems], C[kStagedC];
  float bias[kItems];

  __device__ void load(const SelectiveScanBackwardParams& p, const TileTokens& tokens, int64_t channel) {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int t = threadIdx.x / kChannels * kItems + j;
      const bool wanted = channel < p.channels && tokens.modality[t] >= 0;
      bias[j] = load_bias(p, tokens.modality[t], channel, wanted);
      dt[j] = load_element<T>(p.dt, tokens.row[t], channel, wanted);
      z[j] = load_element<T>(p.z, tokens.row[t], channel, wanted && p.z.data != nullptr);
      grad_out[j] = load_element<T>(p.grad_out, tokens.row[t], channel, wanted);
    }
#pragma unroll
    for (int k = 0; k < kStagedC; ++k) {
      const int item = threadIdx.x + k * kThreads, t = item / kStates;
      const int64_t state = int64_t(blockIdx.z) * kStates + item % kStates;
      C[k] = load_element<T>(p.C, tokens.row[t], state, state < p.states && tokens.modality[t] >= 0);
    }
  }

  __device__ void store(const SelectiveScanBackwardParams& p, const TileTokens& tokens, int64_t channel,
                        Shared& shared) const {
#pragma unroll
    for (int k = 0; k < kItems / kGroup; ++k) {
      const int group = threadIdx.x / kChannels * (kItems / kGroup) + k;
      float delta[kGroup], grad_y[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int j = k * kGroup + i;
        const bool active = channel < p.channels && tokens.modality[group * kGroup + i] >= 0;
        const float x = to_float(dt[j]) + bias[j], gate = to_float(z[j]), grad = to_float(grad_out[j]);
        const float step = p.softplus ? softplus_fast(x).value : x;
        delta[i] = active ? step : 0.0f;
        grad_y[i] = p.z.data != nullptr ? grad * gate * sigmoid_fast(gate) : grad;
      }
      shared.delta.at(group, threadIdx.x % kChannels) = make_float4(delta[0], delta[1], delta[2], delta[3]);
      shared.grad_y.at(group, threadIdx.x % kChannels) =
          make_float4(grad_y[0], grad_y[1], grad_y[2], grad_y[3]);
    }
#pragma unroll
    for (int k = 0; k < kStagedC; ++k) (&shared.C[0][0])[threadIdx.x + k * kThreads] = to_float(C[k]);
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) adjoint_kernel(const __grid_constant__ Args args) {
  __shared__ Shared shared;
  let_next_begin();
  const SelectiveScanBackwardParams& p = args.params;
  const int64_t input_channel = int64_t(blockIdx.x) * kChannels + threadIdx.x % kChannels;
  const int sweep_channel = threadIdx.x * kThreadStates / kStates;
  const int64_t channel = int64_t(blockIdx.x) * kChannels + sweep_channel;
  const int tile_state = threadIdx.x * kThreadStates % kStates;
  const int64_t state = int64_t(blockIdx.z) * kStates + tile_state;
  float rate[kThreadStates];
#pragma unroll
  for (int s = 0; s < kThreadStates; ++s) {
    const bool exists = channel < p.channels && state + s < p.states;
    rate[s] = exists ? static_cast<const float*>(p.A)[channel * p.states + state + s] * kLog2E : 0.0f;
  }

  ScanUnit unit;
  for (int index = blockIdx.y; get_unit(args.units, index, &unit); index += gridDim.y) {
    if (unit.chunk == 0) continue;
    float carry[kThreadStates] = {}, delta_sum = 0.0f;
    Inputs<T> inputs;
    int tile = (unit.length + kTokens - 1) / kTokens - 1;
    __syncthreads();
    if (threadIdx.x < kTokens) {
      put_token(args, find_row(args, unit, tile * kTokens + threadIdx.x), shared.tokens[tile & 1],
                threadIdx.x);
    }
    __syncthreads();
    inputs.load(p, shared.tokens[tile & 1], input_channel);
    for (; tile >= 0; --tile) {
      inputs.store(p, shared.tokens[tile & 1], input_channel, shared);
      if (threadIdx.x < kTokens) {
        const int32_t row = find_row(args, unit, (tile - 1) * kTokens + threadIdx.x);
        put_token(args, row, shared.tokens[(tile & 1) ^ 1], threadIdx.x);
      }
      __syncthreads();
      inputs.load(p, shared.tokens[(tile & 1) ^ 1], input_channel);
#pragma unroll 1
      for (int group = kGroups - 1; group >= 0; --group) {
        float delta[kGroup], grad_y[kGroup];
        unpack(shared.delta.at(group, sweep_channel), delta);
        unpack(shared.grad_y.at(group, sweep_channel), grad_y);
#pragma unroll
        for (int i = kGroup - 1; i >= 0; --i) {
          delta_sum += delta[i];
#pragma unroll
          for (int s = 0; s < kThreadStates; ++s) {
            const float C = shared.C[group * kGroup + i][tile_state + s];
            carry[s] = exp2_fast(delta[i] * rate[s]) * fmaf(C, grad_y[i], carry[s]);
          }
        }
      }
      __syncthreads();
    }
    if (channel >= p.channels) continue;
#pragma unroll
    for (int s = 0; s < kThreadStates; ++s) {
      if (state + s < p.states)
        args.unit_carry[(index * p.channels + channel) * p.states + state + s] = carry[s];
    }
    if (state == 0) args.delta_sum[index * p.channels + channel] = delta_sum;
  }
}

__global__ void combine_kernel(const __grid_constant__ Args args) {
  follow_previous();
  const SelectiveScanBackwardParams& p = args.params;
  const int64_t size = p.channels * p.states, i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  const float rate = static_cast<const float*>(p.A)[i] * kLog2E;
  const float* grad_final_state = static_cast<const float*>(p.grad_final_state);
  ScanUnit unit;
  for (int index = blockIdx.y; get_unit(args.units, index, &unit); index += gridDim.y) {
    if (unit.chunk != unit.chunks - 1) continue;
    float entering = grad_final_state == nullptr ? 0.0f : grad_final_state[unit.sequence * size + i];
    const int64_t first = index - unit.chunk;
    for (int64_t chunk = index; chunk > first; chunk -= kCombinedAtOnce) {
      float local[kCombinedAtOnce], delta[kCombinedAtOnce];
#pragma unroll
      for (int k = 0; k < kCombinedAtOnce; ++k) {
        const bool exists = chunk - k > first;
        local[k] = exists ? args.unit_carry[(chunk - k) * size + i] : 0.0f;
        delta[k] = exists ? args.delta_sum[(chunk - k) * p.channels + i / p.states] : 0.0f;
      }
#pragma unroll
      for (int k = 0; k < kCombinedAtOnce; ++k) {
        if (chunk - k <= first) break;
        args.unit_carry[(chunk - k) * size + i] = entering;
        // A zero stays zero even where growing states make the decay of a whole chunk infinite.
        entering = entering == 0.0f ? local[k] : fmaf(exp2_fast(rate * delta[k]), entering, local[k]);
      }
    }
    args.unit_carry[(index - unit.chunk) * size + i] = entering;
  }
}

unsigned grid_rows(const Args& args) {
  return static_cast<unsigned>(std::min<int64_t>(args.units.max_units, kMostGridRows));
}

}  // namespace

int launch_unit_carries(const Args& args, CUstream_st* stream) {
  const SelectiveScanBackwardParams& p = args.params;
  const dim3 grid(static_cast<unsigned>((p.channels + kChannels - 1) / kChannels), grid_rows(args),
                  state_blocks(p));
  const int error = dispatch_type(p.type, [&](auto type) {
    adjoint_kernel<typename decltype(type)::type><<<grid, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
  });
  if (error != cudaSuccess) return error;
  return launch_combine(args, stream);
}

int launch_combine(const Args& args, CUstream_st* stream) {
  const int64_t size = args.params.channels * args.params.states;
  if (size == 0) return cudaSuccess;
  const dim3 combine_grid(static_cast<unsigned>((size + kThreads - 1) / kThreads), grid_rows(args));
  return launch_chained({combine_grid, kThreads, 0, stream}, combine_kernel, args);
}

}  // namespace mixture_of_mamba::general_backward
