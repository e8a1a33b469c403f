// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/common/element.cuh"
#include "kernels/cuda/common/fast_math.cuh"
#include "kernels/cuda/common/scan_units.cuh"
#include "kernels/selective_scan.h"

// Selective scan, forward. With delta2 = log2(e) * softplus(dt + bias), per channel and state:
//
//   h = 2^(delta2 A) h + (delta2 u) (ln 2 B)        y = sum over states of C h + D u        out = y silu(z)
//
// Idea. Tokens are sequential and channels are not: a lane keeps a few channels' states in registers and
// walks. What surrounds the recurrence (loads through rows[], softplus, gate, stores) is done by other warps,
// one tile ahead and one behind, so that neither waits for the other.
//
// Grid     channel blocks (fastest) x units (scan_units.h). A block walks its unit tile by tile.
// Block    4 recurrence warps and 4 element-wise warps; tiles of kTile tokens in two buffers.
//          Recurrence lane: kChannelsPerLane channels, 4 states of each; kGroup = states / 4 lanes share
//          a channel. It reads (delta2, delta2 u) of its channels and B, C of its states, and stores its
//          part of y.
//          Element-wise thread: token threadIdx / 8 of the tile, an eighth of the block's channels (16
//          bytes at 64 channels of 16 bits: eight lanes make a full line of a row). It adds the parts
//          of y.
// Shared   per buffer: (delta2, delta2 u) pairs, parts of y, B and C in fp32; xor-swizzled or padded so
//          that every access takes the fewest wavefronts.
// Barriers one __syncthreads a tile: recurrence on tile i runs beside the input of tile i + 1 and the
//          output of tile i - 1. All threads reach it; tokens past the end and padding have delta2 = 0:
//          the state passes.
// Cost     per (token, channel) at 16 states: 19 special functions = 1.19 clk on an SM (the bound),
//          127-143 issue slots = 1.0-1.1 clk, 8 bytes of activations in 16 bits = 0.5 clk of HBM.
// No tensor cores: any use of them lowers the clock of the SM by 9 %.
//
// docs/kernels/selective_scan.md has the measurements and what was tried and lost.

namespace mixture_of_mamba::scan_forward {

constexpr int kTile = static_cast<int>(kCheckpointInterval);
constexpr int kWarp = 32;
constexpr int kRecurrenceWarps = 4;
constexpr int kThreads = 2 * kRecurrenceWarps * kWarp;
constexpr int kLanesOfRow = 8;
constexpr int kStatesPerLane = 4;
constexpr int kSharedModalities = 16;  // more than these read their dt bias from global memory

static_assert(kRecurrenceWarps * kWarp == kTile * kLanesOfRow,
              "an element-wise thread owns one token of a tile");

// Of one launch, beside the op's parameters.
struct ForwardArgs {
  SelectiveScanForwardParams params;
  ScanUnits units;
  int32_t channel_blocks = 0;
  int32_t first_state = 0;     // states beyond those of the kernel take several launches
  float* partial_y = nullptr;  // [tokens, channels]: y of the launches so far, null for a single one
  bool first_launch = true, last_launch = true;
  const float* unit_state = nullptr;  // [units, channels, states]: before each unit; null: initial_state
  float* unit_end_state = nullptr;    // pre-pass: state after the unit, started from zero
  float* unit_delta = nullptr;        // pre-pass: [units, channels], sum of delta2
};

// Rows of dt bias in shared memory; 0: too many, threads read them from global memory.
MOM_HOST_DEVICE int staged_modalities(const SelectiveScanForwardParams& p) {
  if (p.dt_bias == nullptr) return 1;
  return p.bias_modalities <= kSharedModalities ? p.bias_modalities : 0;
}

// T: element type. kGroup: lanes per channel. kAligned: rows can be read in wide words. kPrepass: only the
// end state and the sum of delta2. kPolynomial: exponentials of a lane and token that run on the FMA pipe.
template <typename T_, int kGroup_, int kChannelsPerLane_, int kMinBlocks_, int kPolynomial_, bool kAligned_,
          bool kPrepass_>
struct Config {
  using T = T_;
  static constexpr int kGroup = kGroup_, kChannelsPerLane = kChannelsPerLane_, kMinBlocks = kMinBlocks_;
  static constexpr int kPolynomial = kPolynomial_;
  static constexpr bool kAligned = kAligned_, kPrepass = kPrepass_;

  static constexpr int kStates = kGroup * kStatesPerLane;
  static constexpr int kWarpChannels = kChannelsPerLane * (kWarp / kGroup);
  static constexpr int kChannels = kWarpChannels * kRecurrenceWarps;  // of a block
  static constexpr int kVector = kChannels / kLanesOfRow;             // of an element-wise thread

  // Row strides in floats. The pads move the rows that lanes touch together to different banks.
  static constexpr int kInputStride = 2 * kChannels + (kChannels == 32 ? 8 : 0);
  static constexpr int kPartStride = kChannels + (kChannelsPerLane >= 2 ? 16 : 8);
  static constexpr int kOutputStride = kGroup * kPartStride;
  static constexpr int kMatrixStride = 2 * kStates + 4;
  static constexpr int kInputs = kTile * kInputStride;
  static constexpr int kOutputs = kPrepass ? 0 : kTile * kOutputStride;
  static constexpr int kMatrices = kTile * kMatrixStride;

  static int shared_bytes(int staged_modalities) {
    return 4 *
           (2 * (kInputs + kOutputs + kMatrices) + (staged_modalities + 1) * kChannels + kSharedModalities);
  }
  static_assert(kVector >= 2, "an element-wise thread moves channel pairs");
};

template <typename K>
struct Shared {
  float* inputs;        // [2][kTile][kInputStride]
  float* outputs;       // [2][kTile][kGroup][kPartStride]
  float* matrices;      // [2][kTile][kMatrixStride]: B ln 2, C
  float* bias;          // [staged modalities][kChannels], times log2(e); zeros when there is none
  float* skip;          // [kChannels]: D
  int32_t* boundaries;  // [staged modalities]: first row of each

  __device__ Shared(float* memory, int staged) {
    inputs = memory;
    outputs = inputs + 2 * K::kInputs;
    matrices = outputs + 2 * K::kOutputs;
    bias = matrices + 2 * K::kMatrices;
    skip = bias + staged * K::kChannels;
    boundaries = reinterpret_cast<int32_t*>(skip + K::kChannels);
  }
  // Float offset of channel pair `pair` in a row of inputs, of channel quad `quad` in a part of a row of
  // outputs.
  __device__ static int pair_offset(int pair) { return (pair ^ ((pair >> 3) & 3)) << 2; }
  __device__ static int quad_offset(int quad) { return (quad ^ ((quad >> 3) & 1)) << 2; }
};

// The element-wise role: one token of a tile, kVector channels.
template <typename K>
struct ElementWise {
  using T = typename K::T;
  using Channels = Pack<T, K::kVector>;

  const ForwardArgs& args;
  const SelectiveScanForwardParams& p;
  const ScanUnit unit;
  const Shared<K> shared;
  const int token, eighth, staged;
  int32_t valid_rows;
  int64_t channel;
  int channel_count;  // of this thread's channels, those that exist

  struct Row {
    int32_t row, modality;
    bool exists, valid;  // inside the unit; and not padding
  };
  Row input_row;
  Channels u, dt, z, output_u;
  Pack<T, K::kGroup> matrix;

  __device__ ElementWise(const ForwardArgs& args_, const ScanUnit& unit_, const Shared<K>& shared_,
                         int64_t block_channel, int staged_)
      : args(args_),
        p(args_.params),
        unit(unit_),
        shared(shared_),
        token((threadIdx.x - kRecurrenceWarps * kWarp) / kLanesOfRow),
        eighth(threadIdx.x % kLanesOfRow),
        staged(staged_),
        channel(block_channel + eighth * K::kVector) {
    const TokenOrder& order = p.order;
    valid_rows = order.offsets != nullptr ? order.offsets[order.modalities] : INT32_MAX;
    channel_count =
        static_cast<int>(min(static_cast<int64_t>(K::kVector), max(p.channels - channel, int64_t{0})));
    // Channels past the end are read from the last ones and never written.
    if (channel_count == 0) channel = max(p.channels - K::kVector, int64_t{0});
  }

  __device__ Row find_row(int tile) const {
    const int position = tile * kTile + token;
    Row found;
    found.exists = position < unit.length;
    const int last = min(position, unit.length - 1);
    found.row = p.order.row_of(p.reverse ? unit.base - last : unit.base + last);
    found.valid = found.exists && found.row < valid_rows;
    found.modality = 0;
#pragma unroll 1
    for (int m = 1; m < staged; ++m) found.modality += found.row >= shared.boundaries[m];
    if (!K::kAligned && staged == 0) {
      found.modality = min(p.order.modality_of_row(found.row), p.bias_modalities - 1);
    }
    return found;
  }

  __device__ Channels load_channels(const ConstRows& rows, int32_t row) const {
    const T* from = static_cast<const T*>(rows.data) + row * rows.stride + channel;
    if constexpr (K::kAligned) {
      return load_pack<T, K::kVector, true>(from);
    } else {
      Channels values;
#pragma unroll
      for (int i = 0; i < K::kVector; ++i) {
        values.values[i] = i < channel_count ? from[i] : from_float<T>(0.0f);
      }
      return values;
    }
  }

  __device__ void load_inputs(const Row& row) {
    input_row = row;
    dt = load_channels(p.dt, row.row);
    u = load_channels(p.u, row.row);
    const ConstRows& rows = eighth < 4 ? p.B : p.C;
    const int state = args.first_state + eighth % 4 * K::kGroup;
    const T* from = static_cast<const T*>(rows.data) + row.row * rows.stride + state;
    if constexpr (K::kAligned) {
      matrix = load_pack<T, K::kGroup, true>(from);
    } else {
#pragma unroll
      for (int i = 0; i < K::kGroup; ++i)
        matrix.values[i] = state + i < p.states ? from[i] : from_float<T>(0.0f);
    }
  }

  __device__ void load_outputs(const Row& row) {
    if constexpr (K::kPrepass) return;
    output_u = load_channels(p.u, row.row);  // again: a hit in L2 is cheaper than keeping it for two tiles
    if (p.z.data != nullptr) z = load_channels(p.z, row.row);
  }

  // dt + bias in log2 units. Branches are the same for all threads and stay outside of the loops over
  // channels: inside, they would cut the straight run of instructions that hides latencies.
  __device__ void scaled_dt(float (&delta)[K::kVector]) const {
    if (K::kAligned || staged > 0) {
      const float* bias = shared.bias + input_row.modality * K::kChannels + eighth * K::kVector;
#pragma unroll
      for (int i = 0; i < K::kVector; ++i) delta[i] = fmaf(to_float(dt.values[i]), kLog2E, bias[i]);
    } else {
      const float* bias = static_cast<const float*>(p.dt_bias) + input_row.modality * p.channels + channel;
#pragma unroll
      for (int i = 0; i < K::kVector; ++i) {
        delta[i] = kLog2E * (to_float(dt.values[i]) + (i < channel_count ? bias[i] : 0.0f));
      }
    }
    if (!p.softplus) return;
#pragma unroll
    for (int i = 0; i < K::kVector; ++i) delta[i] = softplus2<T>(delta[i]);
  }

  __device__ void put_inputs(int buffer) const {
    const bool valid = input_row.valid;
    float delta[K::kVector];
    scaled_dt(delta);
    float* inputs = shared.inputs + buffer * K::kInputs + token * K::kInputStride;
#pragma unroll
    for (int i = 0; i < K::kVector; i += 2) {
      // Selected after the arithmetic: padding and what lies past the end may hold anything, NaN too.
      const float delta0 = valid ? delta[i] : 0.0f, u0 = valid ? to_float(u.values[i]) : 0.0f;
      const float delta1 = valid ? delta[i + 1] : 0.0f, u1 = valid ? to_float(u.values[i + 1]) : 0.0f;
      *reinterpret_cast<float4*>(inputs + Shared<K>::pair_offset((eighth * K::kVector + i) / 2)) =
          make_float4(delta0, delta0 * u0, delta1, delta1 * u1);
    }
    const float scale = eighth < 4 ? kLn2 : 1.0f;
    float* matrices = shared.matrices + buffer * K::kMatrices + token * K::kMatrixStride + eighth * K::kGroup;
#pragma unroll
    for (int i = 0; i < K::kGroup; i += 4) {
      float values[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) values[k] = valid ? to_float(matrix.values[i + k]) * scale : 0.0f;
      *reinterpret_cast<float4*>(matrices + i) = make_float4(values[0], values[1], values[2], values[3]);
    }
  }

  __device__ void take_outputs(int buffer, float (&y)[K::kVector]) const {
    const float* outputs = shared.outputs + buffer * K::kOutputs + token * K::kOutputStride;
#pragma unroll
    for (int i = 0; i < K::kVector; ++i) y[i] = 0.0f;
#pragma unroll
    for (int part = 0; part < K::kGroup; ++part) {
#pragma unroll
      for (int i = 0; i < K::kVector; i += 4) {
        const int first = eighth * K::kVector + i;
        const float* from = outputs + part * K::kPartStride + Shared<K>::quad_offset(first / 4) + first % 4;
        if constexpr (K::kVector >= 4) {
          const float4 quad = *reinterpret_cast<const float4*>(from);
          y[i] += quad.x, y[i + 1] += quad.y, y[i + 2] += quad.z, y[i + 3] += quad.w;
        } else {
          const float2 pair = *reinterpret_cast<const float2*>(from);
          y[i] += pair.x, y[i + 1] += pair.y;
        }
      }
    }
  }

  __device__ void put_outputs(const Row& row, float (&y)[K::kVector]) const {
    if (!row.exists || channel_count == 0) return;
    if (args.partial_y != nullptr) {
      float* partial = args.partial_y + row.row * p.channels + channel;
#pragma unroll
      for (int i = 0; i < K::kVector; ++i) {
        if (i >= channel_count) continue;
        if (!args.first_launch) y[i] += partial[i];
        if (!args.last_launch) partial[i] = y[i];
      }
      if (!args.last_launch) return;
    }
#pragma unroll
    for (int i = 0; i < K::kVector; ++i) {
      y[i] = fmaf(shared.skip[eighth * K::kVector + i], to_float(output_u.values[i]), y[i]);
    }
    if (p.z.data != nullptr) {
#pragma unroll
      for (int i = 0; i < K::kVector; ++i) y[i] *= silu_fast<T>(to_float(z.values[i]));
    }
    Channels out;
#pragma unroll
    for (int i = 0; i < K::kVector; ++i) out.values[i] = from_float<T>(row.valid ? y[i] : 0.0f);
    T* to = static_cast<T*>(p.out.data) + row.row * p.out.stride + channel;
    if constexpr (K::kAligned) {
      store_pack<T, K::kVector, true>(to, out);
    } else {
#pragma unroll
      for (int i = 0; i < K::kVector; ++i) {
        if (i < channel_count) to[i] = out.values[i];
      }
    }
  }

  __device__ void run(int tiles) {
    if (tiles == 0) return;
    Row done{}, current = find_row(0), next = find_row(1), after = find_row(2);
    float y[K::kVector];
    load_inputs(current);
    put_inputs(0);
    load_inputs(next);
    load_outputs(current);
    __syncthreads();
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int other = (tile & 1) ^ 1;
      put_inputs(other);
      if (!K::kPrepass && tile > 0) {
        take_outputs(other, y);
        put_outputs(done, y);
        load_outputs(current);
      }
      done = current, current = next, next = after, after = find_row(tile + 3);
      load_inputs(next);
      __syncthreads();
    }
    if (K::kPrepass) return;
    take_outputs((tiles - 1) & 1, y);
    put_outputs(done, y);
  }
};

// The recurrence role: kChannelsPerLane channels, kStatesPerLane states of each.
template <typename K>
struct Recurrence {
  static constexpr int kC = K::kChannelsPerLane, kS = kStatesPerLane;

  const ForwardArgs& args;
  const SelectiveScanForwardParams& p;
  const ScanUnit unit;
  const Shared<K> shared;
  const int unit_index, part, local_channel;
  const int64_t channel;
  float A[kC][kS], h[kC][kS], delta_sum[kC];

  __device__ Recurrence(const ForwardArgs& args_, const ScanUnit& unit_, int unit_index_,
                        const Shared<K>& shared_, int64_t block_channel)
      : args(args_),
        p(args_.params),
        unit(unit_),
        shared(shared_),
        unit_index(unit_index_),
        part(threadIdx.x % kWarp / (kWarp / K::kGroup)),
        local_channel(threadIdx.x / kWarp * K::kWarpChannels + threadIdx.x % (kWarp / K::kGroup) * kC),
        channel(block_channel + local_channel) {}

  __device__ int state(int s) const { return args.first_state + part * kS + s; }
  __device__ bool exists(int c, int s) const { return channel + c < p.channels && state(s) < p.states; }
  __device__ int64_t offset(int64_t outer, int c, int s) const {
    return (outer * p.channels + channel + c) * p.states + state(s);
  }

  __device__ void begin() {
    const float* start = args.unit_state != nullptr ? args.unit_state
                         : K::kPrepass              ? nullptr
                                                    : static_cast<const float*>(p.initial_state);
    const int64_t outer = args.unit_state != nullptr ? unit_index : unit.sequence;
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      delta_sum[c] = 0.0f;
#pragma unroll
      for (int s = 0; s < kS; ++s) {
        A[c][s] = exists(c, s) ? static_cast<const float*>(p.A)[(channel + c) * p.states + state(s)] : 0.0f;
        h[c][s] = start != nullptr && exists(c, s) ? start[offset(outer, c, s)] : 0.0f;
      }
    }
  }

  __device__ void put_states(float* to, int64_t outer) const {
    if (K::kAligned && p.states % kS == 0) {
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        if (exists(c, 0)) {
          *reinterpret_cast<float4*>(to + offset(outer, c, 0)) =
              make_float4(h[c][0], h[c][1], h[c][2], h[c][3]);
        }
      }
      return;
    }
#pragma unroll
    for (int c = 0; c < kC; ++c) {
#pragma unroll
      for (int s = 0; s < kS; ++s) {
        if (exists(c, s)) to[offset(outer, c, s)] = h[c][s];
      }
    }
  }

  // Decays and drives of one token. The exponentials run a token ahead of the states that need them.
  __device__ void load_token(const float* inputs, float (&decay)[kC][kS], float (&drive)[kC]) {
    float delta[kC];
    if constexpr (kC == 1) {
      const float2 pair = *reinterpret_cast<const float2*>(
          inputs + Shared<K>::pair_offset(local_channel / 2) + local_channel % 2 * 2);
      delta[0] = pair.x, drive[0] = pair.y;
    } else {
#pragma unroll
      for (int c = 0; c < kC; c += 2) {
        const float4 two =
            *reinterpret_cast<const float4*>(inputs + Shared<K>::pair_offset((local_channel + c) / 2));
        delta[c] = two.x, drive[c] = two.y, delta[c + 1] = two.z, drive[c + 1] = two.w;
      }
    }
#pragma unroll
    for (int s = 0; s < kS; ++s) {
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        const float x = delta[c] * A[c][s];
        decay[c][s] = s * kC + c < K::kPolynomial ? ex2_polynomial(x) : ex2(x);
      }
    }
    if constexpr (K::kPrepass) {
#pragma unroll
      for (int c = 0; c < kC; ++c) delta_sum[c] += delta[c];
    }
  }

  __device__ void update(const float* matrices, const float (&decay)[kC][kS], const float (&drive)[kC],
                         float* outputs) {
    const float4 B4 = *reinterpret_cast<const float4*>(matrices + part * kS);
    const float B[kS] = {B4.x, B4.y, B4.z, B4.w};
#pragma unroll
    for (int s = 0; s < kS; ++s) {
#pragma unroll
      for (int c = 0; c < kC; ++c) h[c][s] = fmaf(decay[c][s], h[c][s], drive[c] * B[s]);
    }
    if constexpr (!K::kPrepass) {
      const float4 C = *reinterpret_cast<const float4*>(matrices + K::kStates + part * kS);
      float y[kC];
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        y[c] = fmaf(h[c][3], C.w, fmaf(h[c][2], C.z, fmaf(h[c][1], C.y, h[c][0] * C.x)));
      }
      if constexpr (kC == 1) {
        *outputs = y[0];
      } else {
#pragma unroll
        for (int c = 0; c < kC; c += 2) *reinterpret_cast<float2*>(outputs + c) = make_float2(y[c], y[c + 1]);
      }
    }
  }

  __device__ void run(int tiles) {
    begin();
    float* const checkpoints = K::kPrepass ? nullptr : static_cast<float*>(p.checkpoints);
    const int output_offset =
        part * K::kPartStride + Shared<K>::quad_offset(local_channel / 4) + local_channel % 4;
    if (tiles > 0) __syncthreads();
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int buffer = tile & 1;
      const float* inputs = shared.inputs + buffer * K::kInputs;
      const float* matrices = shared.matrices + buffer * K::kMatrices;
      float* outputs = shared.outputs + buffer * K::kOutputs + output_offset;
      if (checkpoints != nullptr) put_states(checkpoints, unit.slot + tile);
      float decay[2][kC][kS], drive[2][kC];
      load_token(inputs, decay[0], drive[0]);
#pragma unroll
      for (int t = 0; t < kTile; ++t) {
        if (t + 1 < kTile)
          load_token(inputs + (t + 1) * K::kInputStride, decay[(t + 1) & 1], drive[(t + 1) & 1]);
        update(matrices + t * K::kMatrixStride, decay[t & 1], drive[t & 1], outputs + t * K::kOutputStride);
      }
      __syncthreads();
    }
    end();
  }

  __device__ void end() const {
    if constexpr (K::kPrepass) {
      put_states(args.unit_end_state, unit_index);
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        if (part == 0 && channel + c < p.channels)
          args.unit_delta[unit_index * p.channels + channel + c] = delta_sum[c];
      }
    } else if (p.final_state != nullptr && unit.chunk == unit.chunks - 1) {
      put_states(static_cast<float*>(p.final_state), unit.sequence);
    }
  }
};

template <typename K>
__global__ void __launch_bounds__(kThreads, K::kMinBlocks)
    scan_kernel(const __grid_constant__ ForwardArgs args) {
  extern __shared__ __align__(16) float memory[];
  const SelectiveScanForwardParams& p = args.params;
  const int unit_index = blockIdx.x / args.channel_blocks;
  const int64_t block_channel = static_cast<int64_t>(blockIdx.x % args.channel_blocks) * K::kChannels;
  ScanUnit unit;
  if (!get_unit(args.units, unit_index, &unit)) return;
  if (K::kPrepass && unit.chunk == unit.chunks - 1) return;  // nobody needs the end state of the last chunk

  const int staged = staged_modalities(p);
  const Shared<K> shared(memory, staged);
  for (int i = threadIdx.x; i < staged * K::kChannels; i += kThreads) {
    const int64_t channel = block_channel + i % K::kChannels;
    const int64_t row = i / K::kChannels * p.channels;
    const bool exists = p.dt_bias != nullptr && channel < p.channels;
    shared.bias[i] = exists ? static_cast<const float*>(p.dt_bias)[row + channel] * kLog2E : 0.0f;
  }
  if (threadIdx.x < staged && p.order.offsets != nullptr) {
    shared.boundaries[threadIdx.x] = p.order.offsets[threadIdx.x];
  }
  for (int i = threadIdx.x; i < K::kChannels; i += kThreads) {
    const bool has_skip = p.D != nullptr && block_channel + i < p.channels;
    shared.skip[i] = has_skip ? static_cast<const float*>(p.D)[block_channel + i] : 0.0f;
  }
  __syncthreads();
  const int tiles = (unit.length + kTile - 1) / kTile;
  if (threadIdx.x < kRecurrenceWarps * kWarp) {
    Recurrence<K>(args, unit, unit_index, shared, block_channel).run(tiles);
  } else {
    ElementWise<K>(args, unit, shared, block_channel, staged).run(tiles);
  }
}

template <typename K>
int launch(const ForwardArgs& base, CUstream_st* stream) {
  ForwardArgs args = base;
  args.channel_blocks = static_cast<int32_t>((args.params.channels + K::kChannels - 1) / K::kChannels);
  const int64_t blocks = static_cast<int64_t>(args.channel_blocks) * args.units.max_units;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int bytes = K::shared_bytes(staged_modalities(args.params));
  const cudaError_t error =
      cudaFuncSetAttribute(scan_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  scan_kernel<K><<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(args);
  return cudaGetLastError();
}

// Kernels of one element type; the variants are chosen in selective_scan_fwd.cu.
enum class Tile { kWide, kWideThree, kNarrow };  // 64 channels at 2 or 3 blocks an SM; 32 channels

template <typename T>
int launch_main(const ForwardArgs& args, Tile tile, int group, bool aligned, CUstream_st* stream);
template <typename T>
int launch_prepass(const ForwardArgs& args, int group, bool aligned, CUstream_st* stream);

}  // namespace mixture_of_mamba::scan_forward
