// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/selective_scan_bwd_fast.cuh"

// The two recurrences over a tile whose element-wise inputs lie in shared memory. A lane owns 4
// channels x 4 states, a warp 32 channels x 16 states.

namespace mixture_of_mamba::fast_backward {

// kAll: there are 16 states. Otherwise some quarters have none: theirs are 0 and stay 0.
template <bool kAll>
struct Sweep {
  const Args& args;
  TeamShared& shared;

  // Lanes 8 apart hold the same four channels, each in an order that begins with the channel whose
  // sums over states it ends up with.
  const int thread = threadIdx.x % kThreads;
  const int lane = thread % kWarp, warp = thread / kWarp;
  const int quarter = lane / 8;
  int lane_channel[kLaneChannels];
  float rate[kLaneChannels][kLaneStates];   // A * log2(e)
  float carry[kLaneChannels][kLaneStates];  // a * g of the token after
  float grad_A[kLaneChannels][kLaneStates];
  float h[kLaneChannels][kLaneStates];

  // Walk along the groups of a tile, up in rebuild() and down in sweep_back().
  float4* plane[kLaneChannels];  // delta of the group at lane_channel
  const float4* B;               // four states of B of the group's first token
  uint4* layer;                  // first layer of the group
  float4* sums;                  // layer 0 of the group, by channel

  __device__ Sweep(const Args& a, TeamShared& s) : args(a), shared(s) {
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      lane_channel[c] = warp * kWarp + lane % 8 * kLaneChannels + (c ^ quarter);
      plane[c] = &shared.planes[kDelta][0][swizzle(lane_channel[c])];
#pragma unroll
      for (int s = 0; s < kLaneStates; ++s) {
        rate[c][s] = has_states() ? args.A[state_offset(c) + s] * kLog2E : 0.0f;
        grad_A[c][s] = 0.0f;
      }
    }
    B = &shared.BC[0][quarter];
    layer = &shared.layers[0][thread];
    sums = reinterpret_cast<float4*>(&shared.layers[0][swizzle(lane_channel[0])]);
  }

  // Of a lane's first state in a [channels, states] matrix.
  __device__ int state_offset(int c) const {
    return (static_cast<int>(blockIdx.x) * kChannels + lane_channel[c]) * states() + quarter * kLaneStates;
  }
  __device__ int states() const { return kAll ? kStates : args.states; }
  __device__ bool has_states() const { return kAll || quarter * kLaneStates < args.states; }
  __device__ int64_t matrix_size() const { return static_cast<int64_t>(args.channels) * states(); }

  __device__ void begin_unit(const ScanUnit& unit, int index) {
    const bool last = unit.chunk == unit.chunks - 1;
    const float* from = last ? args.grad_final_state : args.unit_carry;
    const int64_t offset = (last ? unit.sequence : index) * matrix_size();
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
#pragma unroll
      for (int s = 0; s < kLaneStates; ++s) {
        carry[c][s] = from == nullptr || !has_states() ? 0.0f : from[offset + state_offset(c) + s];
      }
    }
  }

  // One by one: the matrix may be a view of any alignment.
  __device__ void store(float* to, const float (&values)[kLaneChannels][kLaneStates]) const {
    if (!has_states()) return;
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
#pragma unroll
      for (int s = 0; s < kLaneStates; ++s) to[state_offset(c) + s] = values[c][s];
    }
  }

  __device__ __forceinline__ void load_checkpoint(int slot) {
    const float* from = args.checkpoints + slot * matrix_size();
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      const float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      unpack(has_states() ? __ldg(reinterpret_cast<const float4*>(from + state_offset(c))) : none, h[c]);
    }
  }

  // Two channels' states.
  __device__ __forceinline__ uint4 pack_states(int k) const {
    return make_uint4(pack_pair<__nv_bfloat16>(h[2 * k][0], h[2 * k][1]),
                      pack_pair<__nv_bfloat16>(h[2 * k][2], h[2 * k][3]),
                      pack_pair<__nv_bfloat16>(h[2 * k + 1][0], h[2 * k + 1][1]),
                      pack_pair<__nv_bfloat16>(h[2 * k + 1][2], h[2 * k + 1][3]));
  }

  __device__ __forceinline__ void load_plane(int which, float (&to)[kLaneChannels][kGroup]) const {
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) unpack(plane[c][which * kGroups * kChannels], to[c]);
  }

  // Sum over the 16 states of lane_channel[0].
  static __device__ __forceinline__ float over_states(const float (&v)[kLaneChannels]) {
    const float even = v[0] + __shfl_xor_sync(~0u, v[2], 16), odd = v[1] + __shfl_xor_sync(~0u, v[3], 16);
    return even + __shfl_xor_sync(~0u, odd, 8);
  }

  static __device__ __forceinline__ float2 load_two(uint32_t address) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
    return v;
  }

  // Adds the products of 8 lanes, 32 channels, for two states of one token: `address` is that of the
  // lane's first addend, and lanes begin at different ones so that they meet different banks.
  static __device__ __forceinline__ float2 add_products(uint32_t address) {
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float2 product = load_two(address ^ (k * 16));
      sum.x += product.x;
      sum.y += product.y;
    }
    return sum;
  }

  // h forward from the checkpoint; leaves states, y and grad_C.
  __device__ __forceinline__ void rebuild() {
    const uint4 before_tile[2] = {pack_states(0), pack_states(1)};
    const int pair = lane & 1, four = lane >> 1 & 3, token = lane >> 3;
    const int first = warp * kWarp + four * 8 + four + 4 * (token & 1);
    // The products of the group before; of the first group's there are none, and its sum is overwritten.
    uint32_t products =
        shared_address(&shared.layers[kGradCLayer - kGroupLayers + token][first]) + pair * sizeof(float2);
    float2* const grad_C = reinterpret_cast<float2*>(&shared.grad_C[warp][token][four]) + pair;
    constexpr int kGroupOfGradC = kGroup * kStates / 2;
    float2* to = grad_C;
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      float delta[kLaneChannels][kGroup], input[kLaneChannels][kGroup], grad_y[kLaneChannels][kGroup];
      float y[kGroup];
      load_plane(kDelta, delta);
      load_plane(kInput, input);
      load_plane(kGradY, grad_y);
      float4* const own_products = reinterpret_cast<float4*>(
          group < kGroups - 1 ? layer + kGradCLayer * kThreads : &shared.layers[kLastGradCLayer][thread]);
      *to = add_products(products);
      to = grad_C + group * kGroupOfGradC;
      __syncwarp();  // the products of the group before make room for states
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        float b[kLaneStates], c_[kLaneStates], sum[kLaneChannels], product[kLaneStates];
        unpack(B[i * (2 * kStates / 4)], b);
        unpack(B[i * (2 * kStates / 4) + kStates / 4], c_);
#pragma unroll
        for (int c = 0; c < kLaneChannels; ++c) {
#pragma unroll
          for (int s = 0; s < kLaneStates; ++s) {
            h[c][s] = fmaf(ex2(delta[c][i] * rate[c][s]), h[c][s], input[c][i] * b[s]);
            sum[c] = s == 0 ? h[c][s] * c_[s] : fmaf(h[c][s], c_[s], sum[c]);
            product[s] = c == 0 ? h[c][s] * grad_y[c][i] : fmaf(h[c][s], grad_y[c][i], product[s]);
          }
        }
        put_states(i, group);
        own_products[i * kThreads] = pack(product);
        y[i] = over_states(sum);
      }
      plane[0][kY * kGroups * kChannels] = pack(y);
      __syncwarp();
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) plane[c] += kChannels;
      B += kGroup * (2 * kStates / 4);
      layer += kGroupLayers * kThreads;
      products += kGroupLayers * kLayerBytes;
    }
    constexpr int kMoved = kGradCLayer + (kGroups - 1) * kGroupLayers - kLastGradCLayer;
    *to = add_products(products - kMoved * kLayerBytes);
    __syncwarp();
#pragma unroll
    for (int k = 0; k < 2; ++k) shared.layers[kCheckpointLayer + k][thread] = before_tile[k];
  }

  // The last token's states are not needed, and their layers are taken: a predicated store, since a
  // branch would split the loop body.
  __device__ __forceinline__ void put_states(int i, int group) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint4 v = pack_states(k);
      uint4* const to = layer + (2 * i + k) * kThreads;
      if (i < kGroup - 1) {
        *to = v;
      } else {
        asm volatile(
            "{\n.reg .pred p;\nsetp.lt.s32 p, %5, %6;\n@p st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n}" ::"r"(
                shared_address(to)),
            "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(group), "n"(kGroups - 1)
            : "memory");
      }
    }
  }

  // States before token i of the group, as bf16.
  __device__ __forceinline__ void get_states(int i, int group, uint32_t (&to)[kLaneChannels][2]) const {
    const uint4* const before_group =
        group > 0 ? layer - 2 * kThreads : &shared.layers[kCheckpointLayer][thread];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint4 four = i > 0 ? layer[(2 * (i - 1) + k) * kThreads] : before_group[k * kThreads];
      to[2 * k][0] = four.x;
      to[2 * k][1] = four.y;
      to[2 * k + 1][0] = four.z;
      to[2 * k + 1][1] = four.w;
    }
  }

  // g backward; leaves the products of grad_B and the sums that grad_u and grad_dt are made of.
  __device__ __forceinline__ void sweep_back() {
    sums += kGroups * kGroupLayers * kThreads;
#pragma unroll 1
    for (int group = kGroups - 1; group >= 0; --group) {
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) plane[c] -= kChannels;
      B -= kGroup * (2 * kStates / 4);
      layer -= kGroupLayers * kThreads;
      sums -= kGroupLayers * kThreads;
      float delta[kLaneChannels][kGroup], input[kLaneChannels][kGroup], grad_y[kLaneChannels][kGroup];
      float grad_input[kGroup], grad_rate[kGroup];
      load_plane(kDelta, delta);
      load_plane(kInput, input);
      load_plane(kGradY, grad_y);
#pragma unroll
      for (int i = kGroup - 1; i >= 0; --i) {
        float b[kLaneStates], c_[kLaneStates];
        uint32_t before[kLaneChannels][2];
        unpack(B[i * (2 * kStates / 4)], b);
        unpack(B[i * (2 * kStates / 4) + kStates / 4], c_);
        get_states(i, group, before);
        float sum_B[kLaneChannels], sum_A[kLaneChannels], product[kLaneStates];
#pragma unroll
        for (int c = 0; c < kLaneChannels; ++c) {
#pragma unroll
          for (int s = 0; s < kLaneStates; ++s) {
            const float g = fmaf(c_[s], grad_y[c][i], carry[c][s]);
            sum_B[c] = s == 0 ? g * b[s] : fmaf(g, b[s], sum_B[c]);
            carry[c][s] = ex2(delta[c][i] * rate[c][s]) * g;
            const float2 two_before = unpack_pair<__nv_bfloat16>(before[c][s / 2]);
            const float q = carry[c][s] * (s % 2 ? two_before.y : two_before.x);
            sum_A[c] = s == 0 ? q * rate[c][s] : fmaf(q, rate[c][s], sum_A[c]);
            grad_A[c][s] = fmaf(q, delta[c][i], grad_A[c][s]);
            product[s] = c == 0 ? g * input[c][i] : fmaf(g, input[c][i], product[s]);
          }
        }
        reinterpret_cast<float4*>(layer)[(kGradBLayer + i) * kThreads] = pack(product);
        grad_input[i] = over_states(sum_B);
        grad_rate[i] = over_states(sum_A);
      }
      __syncwarp();  // other lanes have read their states of these layers
      sums[kGradInputLayer * kThreads] = pack(grad_input);
      sums[kGradRateLayer * kThreads] = pack(grad_rate);
    }
  }
};

}  // namespace mixture_of_mamba::fast_backward
