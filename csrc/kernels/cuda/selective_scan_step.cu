// SPDX-License-Identifier: Apache-2.0
//
// A thread holds 8 states of one channel, kLanes neighbouring threads a channel (2 with 16 states), or 16
// states of 16 bits, and goes through its sequences one by one. The next ones' states and token are loaded
// while this one is computed, and kept as they are in memory until then: what counts is how many bytes are on
// their way. A stays in registers; a warp reads states in whole sectors, a thread in whole words. y is summed
// over the lanes by shuffles.
//
// States are float, or of 16 bits like the activations: computed in float, and rounded when they are stored.
//
// Grid    (channels * kLanes / kThreads, as many sequences as fit at once). No shared memory, no barrier.
// Cost    per (sequence, channel) with 16 states: 64 bytes read, 64 written (32 and 32 in 16 bits), and a
//         token's activations. HBM is the bound.

#include "kernels/cuda/selective_scan_step.cuh"

#include "kernels/cuda/common/chained.cuh"
#include "kernels/cuda/common/element.cuh"
#include "kernels/cuda/common/fast_math.cuh"
#include "kernels/cuda/common/launch.h"
#include "kernels/cuda/common/steps.cuh"

namespace mixture_of_mamba {
namespace {

constexpr int kThreads = 128;
// Blocks of a multiprocessor. Threads with 16 states need more registers, and more of them without whole
// words.
template <int kQuads, bool kWide>
constexpr int kBlocks = kQuads <= 2 ? 7 : 4 + kWide;
constexpr int kQuad = 4;  // states of a token's B and C in a word
constexpr int kMostStates = 128;
constexpr int kBiases = 4;  // rows of dt_bias in registers; of more, each token loads its own

// Of a thread, with 16 states: of 16 bits all of them, so that as many bytes are under way in fewer threads.
template <typename State>
constexpr int kQuadsOf16 = sizeof(State) == sizeof(float) ? 2 : 4;

template <typename T>
__device__ __forceinline__ T element(const ConstRows& rows, int32_t row, int64_t column) {
  return static_cast<const T*>(rows.data)[row * rows.stride + column];
}

// One of the kLanes threads of a channel: it has kQuads quads of states. They are every kLanes-th one; with
// 16-bit states they are neighbours, so that a thread's states lie in whole words.
// State: their type in memory. kWide: all of them exist, and they, B and C lie in whole aligned words.
template <typename T, typename State, int kLanes, int kQuads, bool kWide>
struct Lane {
  static constexpr int kStates = kQuads * kQuad;
  static constexpr bool kNarrow = sizeof(State) == 2;
  using Matrix = Pack<T, kQuad>;
  using States = Pack<State, kStates>;  // as they are in memory
  const SelectiveScanForwardParams& p;
  const int64_t channel;
  const int lane;
  const bool exists;  // the channel
  const int32_t valid_rows;
  float A[kStates], skip, bias[kBiases];
  int32_t first_row[kBiases - 1];  // of modality 1, 2, 3

  __device__ Lane(const SelectiveScanForwardParams& p_, int64_t thread)
      : p(p_),
        channel(thread / kLanes),
        lane(thread % kLanes),
        exists(channel < p.channels),
        valid_rows(p.order.offsets != nullptr ? p.order.offsets[p.order.modalities] : INT32_MAX) {}

  __device__ void load_parameters() {
    load(p.A, channel * p.states, A);
    skip = p.D != nullptr && exists ? static_cast<const float*>(p.D)[channel] : 0.0f;
    const bool several = p.order.offsets != nullptr && p.bias_modalities > 1;
#pragma unroll
    for (int m = 0; m < kBiases; ++m) {
      const bool has = p.dt_bias != nullptr && exists && m < p.bias_modalities;
      bias[m] = has ? static_cast<const float*>(p.dt_bias)[m * p.channels + channel] : 0.0f;
      if (m > 0) first_row[m - 1] = several && m < p.bias_modalities ? p.order.offsets[m] : INT32_MAX;
    }
  }

  __device__ int state(int quad) const {
    return (kNarrow ? lane * kQuads + quad : quad * kLanes + lane) * kQuad;
  }
  // Of the channel's states of a sequence.
  __device__ int64_t offset(int64_t sequence) const { return (sequence * p.channels + channel) * p.states; }

  __device__ void load(const void* from, int64_t at, float (&to)[kStates]) const {
    const float* values = static_cast<const float*>(from) + at;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      if constexpr (kWide) {
        const bool has = from != nullptr && exists;
        const float4 four =
            has ? *reinterpret_cast<const float4*>(values + state(q)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        to[4 * q] = four.x, to[4 * q + 1] = four.y, to[4 * q + 2] = four.z, to[4 * q + 3] = four.w;
      } else {
#pragma unroll
        for (int s = 0; s < kQuad; ++s) {
          const bool has = from != nullptr && exists && state(q) + s < p.states;
          to[4 * q + s] = has ? values[state(q) + s] : 0.0f;
        }
      }
    }
  }

  __device__ void store(void* to, int64_t at, const float (&from)[kStates]) const {
    float* values = static_cast<float*>(to) + at;
    if (!exists) return;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      if constexpr (kWide) {
        *reinterpret_cast<float4*>(values + state(q)) =
            make_float4(from[4 * q], from[4 * q + 1], from[4 * q + 2], from[4 * q + 3]);
      } else {
#pragma unroll
        for (int s = 0; s < kQuad; ++s) {
          if (state(q) + s < p.states) values[state(q) + s] = from[4 * q + s];
        }
      }
    }
  }

  __device__ States load_states(int64_t sequence) const {
    States states;
    if constexpr (!kNarrow) {
      load(p.initial_state, offset(sequence), states.values);
    } else {
      const State* from = static_cast<const State*>(p.initial_state) + offset(sequence) + state(0);
      const bool has = p.initial_state != nullptr && exists;
      if constexpr (kWide) {
        states = has ? load_pack<State, kStates, true>(from) : States{};
      } else {
#pragma unroll
        for (int s = 0; s < kStates; ++s) {
          states.values[s] = has && state(0) + s < p.states ? from[s] : from_float<State>(0.0f);
        }
      }
    }
    return states;
  }

  __device__ void store_states(int64_t sequence, const float (&h)[kStates]) const {
    if constexpr (!kNarrow) {
      store(p.final_state, offset(sequence), h);
    } else {
      State* to = static_cast<State*>(p.final_state) + offset(sequence) + state(0);
      const States states = from_floats<State>(h);
      if (!exists) return;
      if constexpr (kWide) {
        store_pack<State, kStates, true>(to, states);
      } else {
#pragma unroll
        for (int s = 0; s < kStates; ++s) {
          if (state(0) + s < p.states) to[s] = states.values[s];
        }
      }
    }
  }

  __device__ Matrix load_quad(const ConstRows& rows, int32_t row, int quad) const {
    if constexpr (kWide) {
      return load_pack<T, kQuad, true>(static_cast<const T*>(rows.data) + row * rows.stride + state(quad));
    } else {
      Matrix four;
#pragma unroll
      for (int s = 0; s < kQuad; ++s) {
        const bool has = state(quad) + s < p.states;
        four.values[s] = has ? element<T>(rows, row, state(quad) + s) : from_float<T>(0.0f);
      }
      return four;
    }
  }

  // What a token brings, as it is in memory. Padding may hold anything; its values are loaded and not used.
  struct Token {
    int32_t row;
    T u, dt, z;
    Matrix B[kQuads], C[kQuads];
  };

  __device__ Token load_token(int64_t time) const {
    Token token;
    const int32_t row = token.row = p.order.row_of(time);
    const int64_t column = exists ? channel : 0;
    token.u = element<T>(p.u, row, column);
    token.dt = element<T>(p.dt, row, column);
    token.z = p.z.data != nullptr ? element<T>(p.z, row, column) : from_float<T>(0.0f);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) token.B[q] = load_quad(p.B, row, q), token.C[q] = load_quad(p.C, row, q);
    return token;
  }

  __device__ float bias_of(int32_t row) const {
    if (p.bias_modalities > kBiases && p.dt_bias != nullptr) {
      const int32_t modality = row < valid_rows ? p.order.modality_of_row(row) : 0;
      return static_cast<const float*>(p.dt_bias)[modality * p.channels + (exists ? channel : 0)];
    }
    float value = bias[0];
#pragma unroll
    for (int m = 1; m < kBiases; ++m) value = row >= first_row[m - 1] ? bias[m] : value;
    return value;
  }

  // All lanes of a channel come here together.
  __device__ void step(const Token& token, float (&h)[kStates]) const {
    const bool padding = token.row >= valid_rows;
    const float u = to_float(token.u), dt = to_float(token.dt) + bias_of(token.row);
    const float delta = p.softplus ? softplus2<T>(dt * kLog2E) : dt * kLog2E;
    const float input = delta * u * kLn2;
    float y = 0.0f;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      float B[kQuad], C[kQuad];
      to_floats(token.B[q], B);
      to_floats(token.C[q], C);
#pragma unroll
      for (int s = 0; s < kQuad; ++s) {
        float& state = h[4 * q + s];
        const float next = fmaf(ex2(delta * A[4 * q + s]), state, input * B[s]);
        state = padding ? state : next;
        y = fmaf(state, C[s], y);
      }
    }
#pragma unroll
    for (int other = kLanes / 2; other > 0; other /= 2) y += __shfl_xor_sync(~0u, y, other);
    if (lane != 0 || !exists) return;
    y = fmaf(skip, u, y);
    if (p.z.data != nullptr) y *= silu_fast<T>(to_float(token.z));
    static_cast<T*>(p.out.data)[token.row * p.out.stride + channel] = from_float<T>(padding ? 0.0f : y);
  }
};

// While a sequence is computed, the next one's states and first token are on their way; of 16-bit states two
// sequences', so as to have as many bytes under way.
template <typename T, typename State, int kLanes, int kQuads, bool kWide>
__global__ void __launch_bounds__(kThreads, (kBlocks<kQuads, kWide>))
    step_kernel(const __grid_constant__ SelectiveScanForwardParams p) {
  let_next_begin();
  if (!p.settled_state) wait_for_previous();
  using ThisLane = Lane<T, State, kLanes, kQuads, kWide>;
  constexpr int kAhead = kWide ? sizeof(float) / sizeof(State) : 1;
  ThisLane lane(p, blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x);
  const int64_t length = p.order.length, sequences = p.order.sequences;
  const auto load_token = [&](int64_t sequence, int64_t t) {
    return lane.load_token(sequence * length + (p.reverse ? length - 1 - t : t));
  };
  typename ThisLane::States states[kAhead + 1];  // of this sequence and of the next ones
  states[0] = lane.load_states(blockIdx.y);
#pragma unroll
  for (int i = 1; i < kAhead; ++i) {
    states[i] = lane.load_states(min(blockIdx.y + i * int64_t{gridDim.y}, sequences - 1));
  }
  wait_for_previous();
  lane.load_parameters();
  typename ThisLane::Token token = load_token(blockIdx.y, 0);
#pragma unroll 1
  for (int64_t sequence = blockIdx.y; sequence < sequences; sequence += gridDim.y) {
    states[kAhead] = lane.load_states(min(sequence + kAhead * gridDim.y, sequences - 1));
    const typename ThisLane::Token next = load_token(min(sequence + gridDim.y, sequences - 1), 0);
    float h[ThisLane::kStates];
    to_floats(states[0], h);
    lane.step(token, h);
#pragma unroll 1
    for (int64_t t = 1; t < length; ++t) lane.step(load_token(sequence, t), h);
    if (p.final_state != nullptr) lane.store_states(sequence, h);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) states[i] = states[i + 1];
    token = next;
  }
}

template <typename T, typename State, int kLanes, int kQuads, bool kWide>
int launch(const SelectiveScanForwardParams& p, CUstream_st* stream) {
  const dim3 grid =
      step_grid(grid_blocks(p.channels * kLanes, kThreads), p.order.sequences, kBlocks<kQuads, kWide>);
  return launch_chained({grid, kThreads, 0, stream}, step_kernel<T, State, kLanes, kQuads, kWide>, p);
}

template <typename T, typename State, int kLanes, int kQuads>
int launch(const SelectiveScanForwardParams& p, CUstream_st* stream) {
  const auto state = [](const void* data) { return is_aligned_to(data, 16); };
  const auto matrix = [](const ConstRows& rows) {
    return rows_in_words(rows.data, rows.stride, sizeof(T), kQuad * sizeof(T));
  };
  const bool wide = p.states == kLanes * kQuads * kQuad && state(p.A) && state(p.initial_state) &&
                    state(p.final_state) && matrix(p.B) && matrix(p.C);
  return wide ? launch<T, State, kLanes, kQuads, true>(p, stream)
              : launch<T, State, kLanes, kQuads, false>(p, stream);
}

template <typename T, typename State>
int launch_lanes(const SelectiveScanForwardParams& p, CUstream_st* stream) {
  if (p.states <= 4) return launch<T, State, 1, 1>(p, stream);
  if (p.states <= 8) return launch<T, State, 1, 2>(p, stream);
  if (p.states <= 16) return launch<T, State, 4 / kQuadsOf16<State>, kQuadsOf16<State>>(p, stream);
  if (p.states <= 32) return launch<T, State, 4, 2>(p, stream);
  if (p.states <= 64) return launch<T, State, 8, 2>(p, stream);
  return launch<T, State, 16, 2>(p, stream);
}

}  // namespace

bool scan_step_supports(const SelectiveScanForwardParams& p) {
  return is_step(p.order) && p.checkpoints == nullptr && !p.for_training && p.states >= 1 &&
         p.states <= kMostStates;
}

int launch_scan_step(const SelectiveScanForwardParams& p, CUstream_st* stream) {
  return dispatch_type(p.type, [&](auto type) {
    using T = typename decltype(type)::type;
    return p.narrow_state ? launch_lanes<T, T>(p, stream) : launch_lanes<T, float>(p, stream);
  });
}

}  // namespace mixture_of_mamba
