// SPDX-License-Identifier: Apache-2.0
//
// A thread holds 4 states of one channel, kLanes neighbouring threads a channel, and goes through its
// sequences kSequences at a time, so that as many state loads are in flight. A stays in registers; a warp
// reads states in whole lines. y is summed over the lanes by shuffles.
//
// Grid    (channels * kLanes / kThreads, sequences / kSequences). No shared memory, no barrier.
// Cost    per (sequence, channel) with 16 states: 64 bytes read, 64 written, and a token's activations. HBM
// is
//         the bound.

#include "kernels/cuda/selective_scan_step.cuh"

#include "kernels/cuda/common/element.cuh"
#include "kernels/cuda/common/fast_math.cuh"
#include "kernels/cuda/common/launch.h"

namespace mixture_of_mamba {
namespace {

constexpr int kThreads = 256;
constexpr int kStates = 4;     // of a thread
constexpr int kSequences = 2;  // more would cost registers, and with them other warps
constexpr int kMostLanes = 32;
constexpr int64_t kLongest = 4;  // tokens; a longer walk is the tiled kernels' work
constexpr int64_t kMostRows = 65535;

template <typename T>
__device__ __forceinline__ float element(const ConstRows& rows, int32_t row, int64_t column) {
  return to_float(static_cast<const T*>(rows.data)[row * rows.stride + column]);
}

template <typename T, int kLanes>
struct Lane {
  const SelectiveScanForwardParams& p;
  const int64_t channel;
  const int64_t state;     // the first of this thread's
  const bool exists;       // the channel
  const bool whole_words;  // every thread has 4 states, 16 bytes at an aligned address
  float A[kStates], skip;

  __device__ int64_t offset(int64_t sequence) const {
    return (sequence * p.channels + channel) * p.states + state;
  }

  __device__ void load(const void* from, int64_t at, float (&to)[kStates]) const {
    const float* values = static_cast<const float*>(from) + at;
    if (from != nullptr && exists && whole_words) {
      const float4 four = *reinterpret_cast<const float4*>(values);
      to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
      return;
    }
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      to[s] = from != nullptr && exists && state + s < p.states ? values[s] : 0.0f;
    }
  }

  __device__ void store(void* to, int64_t at, const float (&from)[kStates]) const {
    float* values = static_cast<float*>(to) + at;
    if (!exists) return;
    if (whole_words) {
      *reinterpret_cast<float4*>(values) = make_float4(from[0], from[1], from[2], from[3]);
      return;
    }
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      if (state + s < p.states) values[s] = from[s];
    }
  }

  // What a token brings. Padding may hold anything; its values are loaded and not used.
  struct Token {
    int32_t row;
    bool padding;
    float u, dt, z, B[kStates], C[kStates];
  };

  __device__ Token load_token(int64_t time) const {
    Token token;
    const int32_t row = token.row = p.order.row_of(time);
    const int64_t column = exists ? channel : 0;
    token.padding = p.order.is_padding(row);
    token.u = element<T>(p.u, row, column);
    token.dt = element<T>(p.dt, row, column);
    token.z = p.z.data != nullptr ? element<T>(p.z, row, column) : 0.0f;
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      const bool has = state + s < p.states;
      token.B[s] = has ? element<T>(p.B, row, state + s) : 0.0f;
      token.C[s] = has ? element<T>(p.C, row, state + s) : 0.0f;
    }
    if (p.dt_bias != nullptr) {
      const int32_t modality = p.bias_modalities > 1 && !token.padding ? p.order.modality_of_row(row) : 0;
      token.dt += static_cast<const float*>(p.dt_bias)[modality * p.channels + column];
    }
    return token;
  }

  // All lanes of a channel come here together.
  __device__ void step(const Token& token, float (&h)[kStates]) const {
    const float delta = p.softplus ? softplus2<T>(token.dt * kLog2E) : token.dt * kLog2E;
    const float input = delta * token.u * kLn2;
    float y = 0.0f;
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      const float next = fmaf(ex2(delta * A[s]), h[s], input * token.B[s]);
      h[s] = token.padding ? h[s] : next;
      y = fmaf(h[s], token.C[s], y);
    }
#pragma unroll
    for (int lane = kLanes / 2; lane > 0; lane /= 2) y += __shfl_xor_sync(~0u, y, lane);
    if (state != 0 || !exists) return;
    y = fmaf(skip, token.u, y);
    if (p.z.data != nullptr) y *= silu_fast<T>(token.z);
    static_cast<T*>(p.out.data)[token.row * p.out.stride + channel] = from_float<T>(token.padding ? 0.0f : y);
  }
};

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, 4)
    step_kernel(const __grid_constant__ SelectiveScanForwardParams p, const bool whole_words) {
  const int64_t thread = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t channel = thread / kLanes;
  Lane<T, kLanes> lane{p, channel, thread % kLanes * kStates, channel < p.channels, whole_words, {}, 0.0f};
  lane.load(p.A, channel * p.states + lane.state, lane.A);
  if (p.D != nullptr && lane.exists) lane.skip = static_cast<const float*>(p.D)[channel];
  const int64_t length = p.order.length;
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kSequences; first < p.order.sequences;
       first += static_cast<int64_t>(gridDim.y) * kSequences) {
    float h[kSequences][kStates];
#pragma unroll
    for (int k = 0; k < kSequences; ++k) {
      lane.load(first + k < p.order.sequences ? p.initial_state : nullptr, lane.offset(first + k), h[k]);
    }
    for (int64_t t = 0; t < length; ++t) {
      const int64_t position = p.reverse ? length - 1 - t : t;
      typename Lane<T, kLanes>::Token tokens[kSequences];
#pragma unroll
      for (int k = 0; k < kSequences; ++k) {
        const int64_t sequence = min(first + k, p.order.sequences - 1);
        tokens[k] = lane.load_token(sequence * length + position);
      }
#pragma unroll
      for (int k = 0; k < kSequences; ++k) {
        if (first + k < p.order.sequences) lane.step(tokens[k], h[k]);
      }
    }
    if (p.final_state == nullptr) continue;
#pragma unroll
    for (int k = 0; k < kSequences; ++k) {
      if (first + k < p.order.sequences) lane.store(p.final_state, lane.offset(first + k), h[k]);
    }
  }
}

template <typename T, int kLanes>
int launch(const SelectiveScanForwardParams& p, CUstream_st* stream) {
  const auto aligned = [](const void* data) { return is_aligned_to(data, 16); };
  const bool whole_words =
      p.states == kLanes * kStates && aligned(p.A) && aligned(p.initial_state) && aligned(p.final_state);
  const int64_t rows = std::min(ceil_div(p.order.sequences, kSequences), kMostRows);
  const dim3 grid(grid_blocks(p.channels * kLanes, kThreads), static_cast<unsigned>(rows));
  step_kernel<T, kLanes><<<grid, kThreads, 0, stream>>>(p, whole_words);
  return cudaGetLastError();
}

template <typename T>
int launch_lanes(const SelectiveScanForwardParams& p, CUstream_st* stream) {
  if (p.states <= 4) return launch<T, 1>(p, stream);
  if (p.states <= 8) return launch<T, 2>(p, stream);
  if (p.states <= 16) return launch<T, 4>(p, stream);
  if (p.states <= 32) return launch<T, 8>(p, stream);
  if (p.states <= 64) return launch<T, 16>(p, stream);
  return launch<T, kMostLanes>(p, stream);
}

}  // namespace

bool scan_step_supports(const SelectiveScanForwardParams& p) {
  return p.order.cu_seqlens == nullptr && p.checkpoints == nullptr && p.order.length >= 1 &&
         p.order.length <= kLongest && p.states >= 1 && p.states <= kMostLanes * kStates;
}

int launch_scan_step(const SelectiveScanForwardParams& p, CUstream_st* stream) {
  return dispatch_type(p.type,
                       [&](auto type) { return launch_lanes<typename decltype(type)::type>(p, stream); });
}

}  // namespace mixture_of_mamba
