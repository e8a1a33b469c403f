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
constexpr int kPlainModalities = 4;    // their boundaries stay in registers

static_assert(kRecurrenceWarps * kWarp == kTile * kLanesOfRow,
              "an element-wise thread owns one token of a tile");

struct RowBytes {
  int32_t u, dt, z, out, B, C;
};

// Of one launch, beside the op's parameters.
struct ForwardArgs {
  SelectiveScanForwardParams params;
  RowBytes row_bytes;  // between rows, for plain access
  ScanUnits units;
  int32_t channel_blocks = 0;
  int32_t first_state = 0;     // states beyond those of the kernel take several launches
  float* partial_y = nullptr;  // [tokens, channels]: y of the launches so far, null for a single one
  bool first_launch = true, last_launch = true;
  const float* unit_state = nullptr;  // [units, channels, states]: before each unit; null: initial_state
  float* unit_end_state = nullptr;    // pre-pass: state after the unit, started from zero
  float* unit_delta = nullptr;        // pre-pass: [units, channels], sum of delta2; adjoint: of delta
};

// Rows of dt bias in shared memory; 0: too many, threads read them from global memory.
MOM_HOST_DEVICE int staged_modalities(const SelectiveScanForwardParams& p) {
  if (p.dt_bias == nullptr) return 1;
  return p.bias_modalities <= kSharedModalities ? p.bias_modalities : 0;
}

// What a kernel may take for granted. kAligned: rows can be read in wide words. kPlain, moreover: softplus
// and gate present, whole blocks of channels, all states in one launch, few modalities. Each question that
// need not be asked is a branch less in a loop that wants to be one straight run of instructions.
enum class Access { kAny, kAligned, kPlain };

// kPrepass: only the end state and the sum of delta2, from a start of zero. kAdjoint: the same of backward,
// whose recurrence has this form too, with C in the place of B, the gradient of y in the place of delta u,
// and the decay after the addition; tokens are walked last to first (selective_scan_bwd_fast.cu).
enum class Pass { kMain, kPrepass, kAdjoint };

// T: element type. kGroup: lanes per channel.
// kPolynomial: exponentials of a lane and token that run on the FMA pipe.
template <typename T_, int kGroup_, int kChannelsPerLane_, int kMinBlocks_, int kPolynomial_, Access kAccess_,
          Pass kPass_>
struct Config {
  using T = T_;
  static constexpr int kGroup = kGroup_, kChannelsPerLane = kChannelsPerLane_, kMinBlocks = kMinBlocks_;
  static constexpr int kPolynomial = kPolynomial_;
  static constexpr bool kAligned = kAccess_ != Access::kAny, kPlain = kAccess_ == Access::kPlain;
  static constexpr bool kAdjoint = kPass_ == Pass::kAdjoint, kPrepass = kPass_ != Pass::kMain;

  static constexpr int kStates = kGroup * kStatesPerLane;
  static constexpr int kWarpChannels = kChannelsPerLane * (kWarp / kGroup);
  static constexpr int kChannels = kWarpChannels * kRecurrenceWarps;  // of a block
  static constexpr int kVector = kChannels / kLanesOfRow;             // of an element-wise thread
  // Loads come a tile earlier where registers for them pay: 16 bits, 16 states in two blocks, or 8 states.
  static constexpr bool kAhead =
      kAligned && !kPrepass && sizeof(T) == 2 && ((kGroup == 4 && kMinBlocks == 2) || kGroup == 2);

  // Row strides in floats. The pads move the rows that lanes touch together to different banks.
  static constexpr int kInputStride = 2 * kChannels + (kChannels == 32 ? 8 : 0);
  static constexpr int kPartStride = kChannels + (kChannelsPerLane >= 2 || kGroup == 2 ? 16 : 8);
  static constexpr int kOutputStride = kGroup * kPartStride;
  static constexpr int kMatrixStride = 2 * kStates + 4;
  static constexpr int kInputs = kTile * kInputStride;
  static constexpr int kOutputs = kPrepass ? 0 : kTile * kOutputStride;
  static constexpr int kMatrices = kTile * kMatrixStride;
  static constexpr int kBuffer = kInputs + kOutputs + kMatrices;  // one of two
  static constexpr uint32_t kBufferBytes = kBuffer * sizeof(float);
  static_assert(kBufferBytes % 64 == 0 && kInputStride % 8 == 0 && kPartStride % 8 == 0,
                "the places of a thread's values in a row differ by xor");

  static int shared_bytes(int staged_modalities) {
    return 4 * (2 * kBuffer + (staged_modalities + 1) * kChannels + kSharedModalities);
  }
  static_assert(kVector >= 2, "an element-wise thread moves channel pairs");
  static_assert(!kAdjoint || kPlain, "the gate is there");
};

template <typename K>
struct Shared {
  // Of the first buffer; the second is kBuffer floats further.
  float* inputs;        // [kTile][kInputStride]
  float* outputs;       // [kTile][kGroup][kPartStride]
  float* matrices;      // [kTile][kMatrixStride]: B ln 2, C
  float* bias;          // [staged modalities][kChannels], times log2(e); zeros when there is none
  float* skip;          // [kChannels]: D
  int32_t* boundaries;  // [staged modalities]: first row of each

  __device__ Shared(float* memory, int staged) {
    inputs = memory;
    outputs = inputs + K::kInputs;
    matrices = outputs + K::kOutputs;
    bias = memory + 2 * K::kBuffer;
    skip = bias + staged * K::kChannels;
    boundaries = reinterpret_cast<int32_t*>(skip + K::kChannels);
  }
  // Float offset of channel pair `pair` in a row of inputs, of channel quad `quad` in a part of a row of
  // outputs.
  __device__ static int pair_offset(int pair) { return (pair ^ ((pair >> 3) & 3)) << 2; }
  __device__ static int quad_offset(int quad) { return (quad ^ ((quad >> 3) & 1)) << 2; }
};

// Kernels of one element type; the variants are chosen in selective_scan_fwd.cu.
enum class Tile { kWide, kWideThree, kNarrow };  // 64 channels at 2 or 3 blocks an SM; 32 channels

template <typename T>
int launch_main(const ForwardArgs& args, Tile tile, int group, Access access, CUstream_st* stream);
template <typename T>
int launch_prepass(const ForwardArgs& args, int group, Access access, CUstream_st* stream);
// 16 states, and what plain access takes for granted but for alignment: of 4 elements. In params, u is
// grad_out and B is C; D, out and the states are not looked at.
template <typename T>
int launch_adjoint(const ForwardArgs& args, CUstream_st* stream);

}  // namespace mixture_of_mamba::scan_forward
