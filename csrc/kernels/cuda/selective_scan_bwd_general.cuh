// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/common/element.cuh"
#include "kernels/cuda/common/scan_units.cuh"
#include "kernels/selective_scan.h"

// What the two kernels of the general backward share: tile sizes, the tokens of a tile and the
// element-wise part of its inputs. selective_scan_bwd_general.cu tells how they are used.

namespace mixture_of_mamba::general_backward {

constexpr int kTokens = kCheckpointInterval;  // of a tile
constexpr int kGroup = 4;                     // tokens whose states are in registers at a time
constexpr int kGroups = kTokens / kGroup;
constexpr int kChannels = 64;  // of a block
constexpr int kStates = 16;    // of a state block
constexpr int kThreads = 128;
constexpr int kTokenHalves = kThreads / kChannels;  // element-wise threads of a channel
constexpr int kItems = kTokens / kTokenHalves;      // tokens of an element-wise thread
// Up to here, sums of grad_dt_bias are kept in shared memory.
constexpr int kSharedModalities = 8;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
static_assert(kItems % kGroup == 0, "an element-wise thread stores whole groups");

// A float of every channel and token of a tile. One thread reads kGroup tokens of a channel as a
// float4; eight lanes that read every second channel must meet different banks, hence the xor.
struct TileValues {
  float4 values[kGroups][kChannels];

  __device__ float4& at(int group, int channel) { return values[group][channel ^ ((channel >> 3) & 3)]; }
};

struct TileTokens {
  int32_t row[kTokens];       // -1: no token
  int32_t modality[kTokens];  // -1: padding or no token
};

struct Args {
  SelectiveScanBackwardParams params;
  ScanUnits units;
  int32_t walkers = 0;  // blocks that share the units of one channel block
  bool cut = false;     // some sequence may have several units

  float* unit_carry = nullptr;    // [units, channels, states], only when cut
  float* delta_sum = nullptr;     // [units, channels], only when cut
  float* walk_carry = nullptr;    // [walkers, channels, states], only with many state blocks
  float* grad_A = nullptr;        // [walkers, channels, states]
  float* grad_D = nullptr;        // [walkers * kTokenHalves, channels]
  float* grad_dt_bias = nullptr;  // [walkers * kTokenHalves, bias_modalities, channels]
  float* grad_BC = nullptr;       // [channel blocks, tokens, 2 * states]
};

MOM_HOST_DEVICE int state_blocks(const SelectiveScanBackwardParams& p) {
  return p.states <= kStates ? 1 : static_cast<int>((p.states + kStates - 1) / kStates);
}

__device__ __forceinline__ void unpack(const float4& from, float (&to)[4]) {
  to[0] = from.x;
  to[1] = from.y;
  to[2] = from.z;
  to[3] = from.w;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float sigmoid_fast(float x) { return reciprocal(1.0f + exp2_fast(-kLog2E * x)); }

struct Softplus {
  float value, slope;
};

// Without branches, to a few ulp everywhere: max(x, 0) + log1p(e), e = exp(-|x|) in (0, 1], where
// log1p(e) = 2 atanh(e / (2 + e)) has an argument of at most 1/3 and so a short series.
__device__ __forceinline__ Softplus softplus_fast(float x) {
  const float e = exp2_fast(-kLog2E * fabsf(x)), s = e * reciprocal(2.0f + e), s2 = s * s;
  float series = 1.0f / 13;
  series = fmaf(series, s2, 1.0f / 11);
  series = fmaf(series, s2, 1.0f / 9);
  series = fmaf(series, s2, 1.0f / 7);
  series = fmaf(series, s2, 1.0f / 5);
  series = fmaf(series, s2, 1.0f / 3);
  series = fmaf(series, s2, 1.0f);
  return {fmaf(2.0f * s, series, fmaxf(x, 0.0f)), (x < 0.0f ? e : 1.0f) * reciprocal(1.0f + e)};
}

// Row of a walk position, -1 outside the unit. Padding is told apart in put_token(), so that the
// load of rows[] can be in flight meanwhile.
__device__ __forceinline__ int32_t find_row(const Args& args, const ScanUnit& unit, int position) {
  if (position < 0 || position >= unit.length) return -1;
  return args.params.order.row_of(args.params.reverse ? unit.base - position : unit.base + position);
}

__device__ __forceinline__ void put_token(const Args& args, int32_t row, TileTokens& tokens, int slot) {
  const TokenOrder& order = args.params.order;
  tokens.row[slot] = row;
  tokens.modality[slot] = row < 0 || order.is_padding(row) ? -1 : order.modality_of_row(row);
}

// Element (row, column), or 0 where `wanted` is false; then memory is not touched.
template <typename T>
__device__ __forceinline__ T load_element(const ConstRows& rows, int32_t row, int64_t column, bool wanted) {
  return wanted ? static_cast<const T*>(rows.data)[row * rows.stride + column] : from_float<T>(0.0f);
}

template <typename T>
__device__ __forceinline__ void store_element(const Rows& rows, int32_t row, int64_t column, float value) {
  if (rows.data != nullptr) static_cast<T*>(rows.data)[row * rows.stride + column] = from_float<T>(value);
}

// dt_bias of a token, or 0 where there is none.
__device__ __forceinline__ float load_bias(const SelectiveScanBackwardParams& p, int32_t modality,
                                           int64_t channel, bool wanted) {
  if (p.dt_bias == nullptr || !wanted) return 0.0f;
  return static_cast<const float*>(p.dt_bias)[(p.bias_modalities == 1 ? 0 : modality) * p.channels + channel];
}

// Fills args.unit_carry: the g that enters each chunk of a cut sequence from the chunks after it. The first
// makes what leaves each chunk when nothing enters it, and delta_sum; the second makes the carries of that.
int launch_unit_carries(const Args& args, CUstream_st* stream);
int launch_combine(const Args& args, CUstream_st* stream);

}  // namespace mixture_of_mamba::general_backward
