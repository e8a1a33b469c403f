// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/selective_scan_bwd_general.cuh"

// The two recurrences over a tile whose element-wise inputs lie in shared memory. A lane owns 2
// channels x 4 states, a warp 16 channels x 16 states.

namespace mixture_of_mamba::general_backward {

constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kLaneChannels = 2;
constexpr int kLaneStates = 4;
static_assert(kWarps * kWarpSize / (kStates / kLaneStates) * kLaneChannels == kChannels,
              "lanes cover a block");

struct Shared {
  TileValues delta, input, grad_y;      // input = delta * u
  TileValues y, grad_input, grad_rate;  // sum(C h), sum(g B), sum(q A log2(e))
  float u[kItems][kThreads];            // from here to slope: private to a thread
  float gate[kItems][kThreads];         // silu(z)
  float grad_gate[kItems][kThreads];    // grad_out * silu'(z)
  float slope[kItems][kThreads];        // d delta / d dt
  float4 snapshot[kGroups - 1][kLaneChannels][kThreads];
  float4 products[kWarps][2][kGroup][kWarpSize];  // a lane's grad_B, then its grad_C
  float warp_sums[kWarps][kTokens][2 * kStates];
  float BC[kTokens][2 * kStates];
  TileTokens tokens[2];
};

struct Sweep {
  const Args& args;
  Shared& shared;

  // Lanes 8 apart hold the same two channels in exchanged order, so that channel 0 of each is the
  // one whose sum over states it ends up with.
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int quarter = lane / 8;
  int lane_channel[kLaneChannels];
  float rate[kLaneChannels][kLaneStates];   // A * log2(e)
  float carry[kLaneChannels][kLaneStates];  // a * g of the token walked before
  float grad_A[kLaneChannels][kLaneStates];
  float h[kLaneChannels][kLaneStates];

  __device__ Sweep(const Args& a, Shared& s) : args(a), shared(s) {
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) lane_channel[c] = warp * 16 + lane % 8 * 2 + (c ^ (quarter & 1));
    for (int block = 0; block < state_blocks(args.params); ++block) {
      for_each_state(block, [&](int c, int s, int64_t i) {
        rate[c][s] = i < 0 ? 0.0f : static_cast<const float*>(args.params.A)[i] * kLog2E;
        grad_A[c][s] = 0.0f;
        if (i >= 0 && many_blocks()) args.grad_A[walker_offset() + i] = 0.0f;
      });
    }
  }

  __device__ bool many_blocks() const { return args.params.states > kStates; }
  __device__ int64_t state_size() const { return args.params.channels * args.params.states; }
  __device__ int64_t walker_offset() const { return blockIdx.y * state_size(); }

  // visit(c, s, index in a [channels, states] matrix, or -1 where the matrix has no such element)
  template <typename Visit>
  __device__ __forceinline__ void for_each_state(int block, Visit&& visit) const {
    const int64_t states = args.params.states, first = block * kStates + quarter * kLaneStates;
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      const int64_t row = int64_t(blockIdx.x) * kChannels + lane_channel[c];
#pragma unroll
      for (int s = 0; s < kLaneStates; ++s) {
        visit(c, s, row < args.params.channels && first + s < states ? row * states + first + s : -1);
      }
    }
  }

  __device__ void begin_unit(const ScanUnit& unit, int index) {
    const bool last = unit.chunk == unit.chunks - 1;
    const float* from = last ? static_cast<const float*>(args.params.grad_final_state) : args.unit_carry;
    const int64_t offset = (last ? unit.sequence : index) * state_size();
    for (int block = 0; block < state_blocks(args.params); ++block) {
      for_each_state(block, [&](int c, int s, int64_t i) {
        carry[c][s] = i < 0 || from == nullptr ? 0.0f : from[offset + i];
        if (i >= 0 && many_blocks()) args.walk_carry[walker_offset() + i] = carry[c][s];
      });
    }
  }

  __device__ void end_unit(const ScanUnit& unit) {
    float* to = static_cast<float*>(args.params.grad_initial_state);
    if (unit.chunk != 0 || to == nullptr) return;
    for (int block = 0; block < state_blocks(args.params); ++block) {
      for_each_state(block, [&](int c, int s, int64_t i) {
        if (i < 0) return;
        to[unit.sequence * state_size() + i] =
            many_blocks() ? args.walk_carry[walker_offset() + i] : carry[c][s];
      });
    }
  }

  __device__ void finish() {
    if (many_blocks()) return;
    for_each_state(0, [&](int c, int s, int64_t i) {
      if (i >= 0) args.grad_A[walker_offset() + i] = grad_A[c][s];
    });
  }

  // With many state blocks, what one keeps between tiles rests in global memory.
  __device__ void open_block(int block) {
    for_each_state(block, [&](int c, int s, int64_t i) {
      rate[c][s] = i < 0 ? 0.0f : static_cast<const float*>(args.params.A)[i] * kLog2E;
      carry[c][s] = i < 0 ? 0.0f : args.walk_carry[walker_offset() + i];
      grad_A[c][s] = i < 0 ? 0.0f : args.grad_A[walker_offset() + i];
    });
  }

  __device__ void close_block(int block) {
    for_each_state(block, [&](int c, int s, int64_t i) {
      if (i < 0) return;
      args.walk_carry[walker_offset() + i] = carry[c][s];
      args.grad_A[walker_offset() + i] = grad_A[c][s];
    });
  }

  __device__ void load_checkpoint(int64_t slot, int block) {
    const float* checkpoint = static_cast<const float*>(args.params.checkpoints) + slot * state_size();
    for_each_state(block, [&](int c, int s, int64_t i) { h[c][s] = i < 0 ? 0.0f : checkpoint[i]; });
  }

  // Sum of both lanes' channels over the 16 states; lanes of one channel end with the same value.
  static __device__ float over_states(const float (&v)[kLaneChannels]) {
    const float half = v[0] + __shfl_xor_sync(~0u, v[1], 8);
    return half + __shfl_xor_sync(~0u, half, 16);
  }

  __device__ void run(bool first_block) {
#pragma unroll 1
    for (int group = 0; group < kGroups - 1; ++group) {
      float delta[kLaneChannels][kGroup], input[kLaneChannels][kGroup];
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        shared.snapshot[group][c][threadIdx.x] = make_float4(h[c][0], h[c][1], h[c][2], h[c][3]);
        unpack(shared.delta.at(group, lane_channel[c]), delta[c]);
        unpack(shared.input.at(group, lane_channel[c]), input[c]);
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        float B[kLaneStates];
        unpack(four_states(group * kGroup + i, 0), B);
#pragma unroll
        for (int c = 0; c < kLaneChannels; ++c) {
#pragma unroll
          for (int s = 0; s < kLaneStates; ++s) {
            h[c][s] = fmaf(exp2_fast(delta[c][i] * rate[c][s]), h[c][s], input[c][i] * B[s]);
          }
        }
      }
    }
#pragma unroll 1
    for (int group = kGroups - 1; group >= 0; --group) {
      if (group < kGroups - 1) {
#pragma unroll
        for (int c = 0; c < kLaneChannels; ++c) unpack(shared.snapshot[group][c][threadIdx.x], h[c]);
      }
      sweep_group(group, first_block);
    }
  }

  __device__ __forceinline__ void sweep_group(int group, bool first_block) {
    float delta[kLaneChannels][kGroup], input[kLaneChannels][kGroup], grad_y[kLaneChannels][kGroup];
    float decay[kGroup][kLaneChannels][kLaneStates], before[kGroup][kLaneChannels][kLaneStates];
    float y[kGroup], grad_input[kGroup], grad_rate[kGroup];
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      unpack(shared.delta.at(group, lane_channel[c]), delta[c]);
      unpack(shared.input.at(group, lane_channel[c]), input[c]);
      unpack(shared.grad_y.at(group, lane_channel[c]), grad_y[c]);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float B[kLaneStates], C[kLaneStates], sum[kLaneChannels] = {}, grad_C[kLaneStates] = {};
      unpack(four_states(group * kGroup + i, 0), B);
      unpack(four_states(group * kGroup + i, kStates), C);
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
#pragma unroll
        for (int s = 0; s < kLaneStates; ++s) {
          decay[i][c][s] = exp2_fast(delta[c][i] * rate[c][s]);
          before[i][c][s] = h[c][s];
          h[c][s] = fmaf(decay[i][c][s], h[c][s], input[c][i] * B[s]);
          sum[c] = fmaf(h[c][s], C[s], sum[c]);
          grad_C[s] = fmaf(h[c][s], grad_y[c][i], grad_C[s]);
        }
      }
      shared.products[warp][1][i][lane] = make_float4(grad_C[0], grad_C[1], grad_C[2], grad_C[3]);
      y[i] = over_states(sum);
    }
#pragma unroll
    for (int i = kGroup - 1; i >= 0; --i) {
      float B[kLaneStates], C[kLaneStates], grad_B[kLaneStates] = {};
      float sum_B[kLaneChannels] = {}, sum_A[kLaneChannels] = {};
      unpack(four_states(group * kGroup + i, 0), B);
      unpack(four_states(group * kGroup + i, kStates), C);
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
#pragma unroll
        for (int s = 0; s < kLaneStates; ++s) {
          const float g = fmaf(C[s], grad_y[c][i], carry[c][s]);
          sum_B[c] = fmaf(g, B[s], sum_B[c]);
          grad_B[s] = fmaf(g, input[c][i], grad_B[s]);
          carry[c][s] = decay[i][c][s] * g;
          const float q = carry[c][s] * before[i][c][s];
          sum_A[c] = fmaf(q, rate[c][s], sum_A[c]);
          grad_A[c][s] = fmaf(q, delta[c][i], grad_A[c][s]);
        }
      }
      shared.products[warp][0][i][lane] = make_float4(grad_B[0], grad_B[1], grad_B[2], grad_B[3]);
      grad_input[i] = over_states(sum_B);
      grad_rate[i] = over_states(sum_A);
    }
    __syncwarp();
    if (quarter < 2) {
      put_sums(shared.y.at(group, lane_channel[0]), y, first_block);
      put_sums(shared.grad_input.at(group, lane_channel[0]), grad_input, first_block);
      put_sums(shared.grad_rate.at(group, lane_channel[0]), grad_rate, first_block);
    }
    add_products(group);
    __syncwarp();
  }

  // The warp's sums over its channels: a lane adds two states of one token. Lanes start at different
  // addends, so that they meet different banks.
  __device__ __forceinline__ void add_products(int group) {
    const int pair = lane & 1, states = lane >> 1 & 3, token = lane >> 3;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float2* from =
          reinterpret_cast<const float2*>(&shared.products[warp][k][token][states * 8]) + pair;
      float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float2 value = from[2 * (i ^ (states + 4 * (token & 1)))];
        sum.x += value.x;
        sum.y += value.y;
      }
      float* to =
          &shared.warp_sums[warp][group * kGroup + token][k * kStates + states * kLaneStates + 2 * pair];
      *reinterpret_cast<float2*>(to) = sum;
    }
  }

  __device__ __forceinline__ const float4& four_states(int token, int column) const {
    return *reinterpret_cast<const float4*>(&shared.BC[token][column + quarter * kLaneStates]);
  }

  static __device__ __forceinline__ void put_sums(float4& to, const float (&sums)[kGroup], bool first_block) {
    float4 value = make_float4(sums[0], sums[1], sums[2], sums[3]);
    if (!first_block) {
      value.x += to.x;
      value.y += to.y;
      value.z += to.z;
      value.w += to.w;
    }
    to = value;
  }
};

}  // namespace mixture_of_mamba::general_backward
