// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "kernels/cuda/common/element.cuh"
#include "kernels/cuda/common/fast_math.cuh"
#include "kernels/cuda/common/scan_units.cuh"
#include "kernels/cuda/common/shared_memory.cuh"
#include "kernels/selective_scan.h"

// What the phases of the fast backward share: tile sizes, arguments, the layout of shared memory.
// selective_scan_bwd_fast.cu tells how they are used.

namespace mixture_of_mamba::fast_backward {

constexpr int kTokens = kCheckpointInterval;  // of a tile
constexpr int kGroup = 4;                     // tokens that a loop body handles
constexpr int kGroups = kTokens / kGroup;
constexpr int kStates = 16;     // fewer, a multiple of 4, leave lanes idle
constexpr int kChannels = 128;  // of a block
constexpr int kThreads = 128;   // of a team, the threads that work on one tile
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kQuad = 4;  // channels of one global access
constexpr int kQuadBytes = 8;
constexpr int kLaneChannels = 4;  // of a lane in the sweeps
constexpr int kLaneStates = 4;
constexpr int kMostBiases = 4;  // rows of dt_bias
static_assert(kWarps == kGroups && kWarp * kQuad == kChannels,
              "element-wise: a warp owns a group, all channels");
static_assert(kWarps * 8 * kLaneChannels == kChannels && 4 * kLaneStates == kStates,
              "sweeps: 8 lanes cover a warp's channels, 4 cover the states");

// A matrix of 16-bit elements, counted in quads: no offset exceeds 32 bits.
struct Quads {
  void* data = nullptr;
  uint32_t stride = 0;  // quads between rows
};

struct Args {
  ScanUnits units;
  Quads u, dt, z, grad_out, B, C, grad_u, grad_dt, grad_z, out;  // out: or null
  const float* A = nullptr;
  const float* D = nullptr;                 // or null
  const float* dt_bias = nullptr;           // or null
  const float* checkpoints = nullptr;       // [slots, channels, states]
  const float* grad_final_state = nullptr;  // or null
  const float* unit_carry = nullptr;        // [units, channels, states]: g that enters a unit from the next
  float* grad_initial_state = nullptr;      // or null
  float* grad_A = nullptr;                  // [walkers * teams, channels, states]
  float* grad_D = nullptr;                  // [walkers * teams * groups, channels]
  float* grad_dt_bias = nullptr;            // [walkers * teams * groups, biases, channels]
  float* grad_BC = nullptr;                 // [channel blocks, tokens, 2 * states]
  int32_t channels = 0, states = kStates, walkers = 0, biases = 0;
  // Times an argument, an offset becomes an address in one multiply-add; times a literal, in two.
  uint32_t quad_bytes = kQuadBytes;
};

// Floats of every channel and token of a tile, four tokens of a channel in a float4. Eight lanes that
// read every fourth channel must meet different banks, hence the xor.
enum Plane { kDelta, kInput, kGradY, kY, kPlanes };  // input = delta * u
__device__ __forceinline__ int swizzle(int channel) { return channel ^ ((channel >> 3) & 3); }

// States and products are kept in layers, one uint4 a thread. Layers 2t and 2t + 1 hold the thread's
// states after token t (bf16, two channels a layer); those of the last token are never needed. The
// other uses take layers whose states are not written yet or not needed any more. Of group k:
constexpr int kLayers = 2 * (kTokens + 1);
constexpr int kGroupLayers = 2 * kGroup;
constexpr int kLayerBytes = kThreads * static_cast<int>(sizeof(uint4));
constexpr int kGradCLayer = 12;       // 8k + 12 ..: products of grad_C, a token each, one group long;
constexpr int kLastGradCLayer = 30;   //             the last group's lie behind the states
constexpr int kGradInputLayer = 2;    // 8k + 2: sum(g B) by channel, until the tile's end
constexpr int kGradRateLayer = 3;     // 8k + 3: sum(q A log2(e)) by channel, until the tile's end
constexpr int kGradBLayer = 4;        // 8k + 4 ..: products of grad_B, a token each, until the tile's end
constexpr int kCheckpointLayer = 32;  // the states before the tile, from the end of rebuild() on

struct alignas(128) TeamShared {
  uint4 layers[kLayers][kThreads];
  float4 planes[kPlanes][kGroups][kChannels];
  float4 grad_C[kWarps][kTokens][kStates / 4];
  float4 BC[kTokens][2 * kStates / 4];
  int4 row[2][kGroups];  // 0 where there is no token
  int4 modality[2][kGroups];
  float4 weight[2][kTokens];  // i-th component: 1 where the modality is i, else 0
  uint32_t inactive[2];       // bit t: token t is padding, or there is none
};

// Shared memory of one block that fills a multiprocessor, and of each of two that share it.
constexpr int kSharedOfOne = 227 * 1024;
constexpr int kSharedOfTwo = 2 * (228 / 2 - 1) * 1024;

__device__ __forceinline__ void unpack(const float4& from, float (&to)[4]) {
  to[0] = from.x;
  to[1] = from.y;
  to[2] = from.z;
  to[3] = from.w;
}

__device__ __forceinline__ float4 pack(const float (&from)[4]) {
  return make_float4(from[0], from[1], from[2], from[3]);
}

// The main kernel of one element type.
template <typename T>
int launch_main(const Args& args, int teams, CUstream_st* stream);

}  // namespace mixture_of_mamba::fast_backward
