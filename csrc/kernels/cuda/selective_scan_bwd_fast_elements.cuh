// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/selective_scan_bwd_fast.cuh"

// The element-wise phases of a tile: inputs to shared memory before the sweeps, gradients to global
// memory after them. A warp owns the four tokens of a group, a lane four channels.

namespace mixture_of_mamba::fast_backward {

__device__ __forceinline__ uint2 load_quad(const Args& args, const Quads& from, uint32_t row, uint32_t quad) {
  uint2 v;
  asm volatile("{\n.reg .b64 a;\nmad.wide.u32 a, %2, %4, %3;\nld.global.nc.v2.b32 {%0, %1}, [a];\n}"
               : "=r"(v.x), "=r"(v.y)
               : "r"(row * from.stride + quad), "l"(from.data), "r"(args.quad_bytes));
  return v;
}

__device__ __forceinline__ void store_quad(const Args& args, const Quads& to, uint32_t row, uint32_t quad,
                                           uint2 v, bool wanted) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b64 a;\nmad.wide.u32 a, %0, %4, %1;\nsetp.ne.s32 p, %5, 0;\n"
      "@p st.global.v2.b32 [a], {%2, %3};\n}" ::"r"(row * to.stride + quad),
      "l"(to.data), "r"(v.x), "r"(v.y), "r"(args.quad_bytes), "r"(static_cast<int>(wanted))
      : "memory");
}

__device__ __forceinline__ void prefetch(const Quads& from, uint32_t row, uint32_t quad) {
  const char* at =
      static_cast<const char*>(from.data) + kQuadBytes * (static_cast<uint64_t>(row) * from.stride + quad);
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

struct Step {
  float delta, slope;  // softplus and its derivative
};

__device__ __forceinline__ Step softplus_step(float x) {
  const float e = ex2(lesser(x * kLog2E, 100.0f)), one_and_e = 1.0f + e;
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(one_and_e));
  const float series = e * fmaf(-e, fmaf(-e, 0.33333333f, 0.5f), 1.0f);
  const float y = e < 0.015625f ? series : kLn2 * lg2(one_and_e);
  return {greater(y, x), e * reciprocal};
}

template <typename T, int kBiases, bool kAll, typename BlockShared>
struct ElementWise {
  static constexpr int kPairs = kQuad / 2;
  const Args& args;
  const BlockShared& block;
  TeamShared& shared;
  const int thread = threadIdx.x % kThreads;
  const int lane = thread % kWarp, group = thread / kWarp;
  const int matrix_token = thread / 8;  // of whose B and C the thread stages a quad
  uint32_t quad = blockIdx.x * (kChannels / kQuad) + lane;

  // Of the tile at work, or of the next one once they have been read: loads overlap the stores.
  uint32_t raw_u[kPairs][kGroup], raw_dt[kPairs][kGroup], raw_z[kPairs][kGroup], raw_grad[kPairs][kGroup];
  uint2 raw_BC;
  // Kept from begin_tile() to end_tile(): two channels a word; slopes of softplus as fp16.
  uint32_t u[kPairs][kGroup], grad_out[kPairs][kGroup], z[kPairs][kGroup], step_slope[kPairs][kGroup];
  float grad_D[kQuad] = {}, grad_bias[kBiases][kQuad] = {};

  __device__ ElementWise(const Args& a, const BlockShared& b, TeamShared& s) : args(a), block(b), shared(s) {
    opaque(quad);
  }

  // Row of a token, -1 where there is none. Half a warp works, a token a lane.
  __device__ __forceinline__ int32_t find_row(int tile) const {
    const int position = tile * kTokens + thread;
    if (thread >= kTokens || tile < 0 || position >= block.unit.length) return -1;
    const int32_t base = block.unit.base;
    return args.units.order.row_of(args.units.reverse ? base - position : base + position);
  }

  __device__ __forceinline__ void put_token(int buffer, int32_t row) {
    if (thread >= kTokens) return;
    int32_t modality = 0;
#pragma unroll
    for (int m = 0; m < kBiases - 1; ++m) modality += row >= block.first_row[m];
    const bool active = row >= 0 && row < block.first_row[kBiases - 1];
    reinterpret_cast<int32_t*>(shared.row[buffer])[thread] = max(row, 0);
    if (kBiases > 1) {
      reinterpret_cast<int32_t*>(shared.modality[buffer])[thread] = modality;
      shared.weight[buffer][thread] = make_float4(modality == 0, modality == 1, modality == 2, modality == 3);
    }
    const uint32_t inactive = __ballot_sync((1u << kTokens) - 1, !active);
    if (thread == 0) shared.inactive[buffer] = inactive;
  }

  __device__ __forceinline__ void prefetch_token(int32_t row) const {
    if (row < 0) return;
    constexpr int kLineQuads = 128 / (kQuad * sizeof(T));
    const uint32_t first = blockIdx.x * (kChannels / kQuad);
#pragma unroll
    for (int line = 0; line < kChannels / kQuad; line += kLineQuads) {
      prefetch(args.u, row, first + line);
      prefetch(args.dt, row, first + line);
      prefetch(args.grad_out, row, first + line);
      prefetch(args.z, row, first + line);
    }
    prefetch(args.B, row, 0);
    prefetch(args.C, row, 0);
  }

  __device__ __forceinline__ void get_rows(int buffer, int (&rows)[kGroup]) const {
    const int4 four = shared.row[buffer][group];
    rows[0] = four.x, rows[1] = four.y, rows[2] = four.z, rows[3] = four.w;
  }

  __device__ __forceinline__ void load(int buffer) {
    int rows[kGroup];
    get_rows(buffer, rows);
    const auto get = [&](const Quads& from, uint32_t(&to)[kPairs][kGroup], int i) {
      const uint2 v = load_quad(args, from, rows[i], quad);
      to[0][i] = v.x;
      to[1][i] = v.y;
    };
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      get(args.u, raw_u, i);
      get(args.dt, raw_dt, i);
      get(args.grad_out, raw_grad, i);
      get(args.z, raw_z, i);
    }
    const int row = reinterpret_cast<const int32_t*>(shared.row[buffer])[matrix_token];
    raw_BC = load_quad(args, thread & 4 ? args.C : args.B, row, has_states(thread & 3) ? thread & 3 : 0);
    if (!has_states(thread & 3)) raw_BC = make_uint2(0, 0);
  }

  // Whether the states of this quarter exist.
  __device__ bool has_states(int quarter) const { return kAll || quarter * kLaneStates < args.states; }

  // Padding, and places beyond the sequence's end: delta, its slope, u, grad_out, B and C become 0
  // whatever is in memory, so that h and g pass unchanged and every gradient is 0.
  __device__ __forceinline__ void silence(uint32_t inactive) {
    constexpr uint32_t kMinusInfinities = std::is_same_v<T, __half> ? 0xfc00fc00u : 0xff80ff80u;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if ((inactive >> (group * kGroup + i) & 1) == 0) continue;
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        raw_dt[k][i] = kMinusInfinities;
        raw_u[k][i] = raw_z[k][i] = raw_grad[k][i] = 0;
      }
    }
    if (inactive >> matrix_token & 1) raw_BC = make_uint2(0, 0);
  }

  __device__ __forceinline__ void begin_tile(int buffer) {
    const uint32_t inactive = shared.inactive[buffer];
    if (inactive != 0) silence(inactive);
    const float2 first = unpack_pair<T>(raw_BC.x), second = unpack_pair<T>(raw_BC.y);
    shared.BC[matrix_token][thread % 8] = make_float4(first.x, first.y, second.x, second.y);

    float bias[kGroup][kQuad];
    if constexpr (kBiases == 1) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) unpack(block.bias[0][lane], bias[i]);
    } else {
      const int4 modality = shared.modality[buffer][group];
      unpack(block.bias[modality.x][lane], bias[0]);
      unpack(block.bias[modality.y][lane], bias[1]);
      unpack(block.bias[modality.z][lane], bias[2]);
      unpack(block.bias[modality.w][lane], bias[3]);
    }
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      float delta[2][kGroup], input[2][kGroup], grad_y[2][kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float2 x2 = unpack_pair<T>(raw_dt[k][i]), u2 = unpack_pair<T>(raw_u[k][i]);
        const float2 z2 = unpack_pair<T>(raw_z[k][i]), grad2 = unpack_pair<T>(raw_grad[k][i]);
        float step[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float ut = c ? u2.y : u2.x, zt = c ? z2.y : z2.x, grad = c ? grad2.y : grad2.x;
          const Step s = softplus_step((c ? x2.y : x2.x) + bias[i][2 * k + c]);
          delta[c][i] = s.delta;
          input[c][i] = s.delta * ut;
          grad_y[c][i] = grad * silu_fast<T>(zt);
          grad_D[2 * k + c] = fmaf(grad_y[c][i], ut, grad_D[2 * k + c]);
          step[c] = s.slope;
        }
        u[k][i] = raw_u[k][i];
        grad_out[k][i] = raw_grad[k][i];
        z[k][i] = raw_z[k][i];
        step_slope[k][i] = pack_pair<__half>(step[0], step[1]);
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int at = swizzle(lane * kQuad + 2 * k + c);
        shared.planes[kDelta][group][at] = pack(delta[c]);
        shared.planes[kInput][group][at] = pack(input[c]);
        shared.planes[kGradY][group][at] = pack(grad_y[c]);
      }
    }
  }

  __device__ __forceinline__ void end_tile(int buffer, int tokens_left) {
    int rows[kGroup];
    get_rows(buffer, rows);
    float skip[kQuad];
    unpack(block.skip[lane], skip);
    uint32_t to_u[kPairs][kGroup], to_dt[kPairs][kGroup], to_z[kPairs][kGroup], to_out[kPairs][kGroup];
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      float delta[2][kGroup], grad_y[2][kGroup], y[2][kGroup], grad_input[2][kGroup], grad_rate[2][kGroup];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int at = swizzle(lane * kQuad + 2 * k + c);
        const float4* sums = reinterpret_cast<const float4*>(&shared.layers[group * kGroupLayers][at]);
        unpack(shared.planes[kDelta][group][at], delta[c]);
        unpack(shared.planes[kGradY][group][at], grad_y[c]);
        unpack(shared.planes[kY][group][at], y[c]);
        unpack(sums[kGradInputLayer * kThreads], grad_input[c]);
        unpack(sums[kGradRateLayer * kThreads], grad_rate[c]);
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float2 u2 = unpack_pair<T>(u[k][i]), grad2 = unpack_pair<T>(grad_out[k][i]);
        const float2 z2 = unpack_pair<T>(z[k][i]), step2 = unpack_pair<__half>(step_slope[k][i]);
        float grad_u[2], grad_dt[2], grad_z[2], out[2], weight[4] = {1.0f};
        if (kBiases > 1) unpack(shared.weight[buffer][group * kGroup + i], weight);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float ut = c ? u2.y : u2.x, d = skip[2 * k + c];
          grad_u[c] = fmaf(grad_input[c][i], delta[c][i], grad_y[c][i] * d);
          grad_dt[c] = fmaf(grad_input[c][i], ut, grad_rate[c][i] * kLn2) * (c ? step2.y : step2.x);
          const float zt = c ? z2.y : z2.x, open = sigmoid_fast<T>(zt), gated = zt * open;
          const float yt = fmaf(d, ut, y[c][i]);
          grad_z[c] = (c ? grad2.y : grad2.x) * fmaf(gated, 1.0f - open, open) * yt;
          out[c] = gated * yt;
#pragma unroll
          for (int m = 0; m < kBiases; ++m) {
            grad_bias[m][2 * k + c] = fmaf(weight[m], grad_dt[c], grad_bias[m][2 * k + c]);
          }
        }
        to_u[k][i] = pack_pair<T>(grad_u[0], grad_u[1]);
        to_dt[k][i] = pack_pair<T>(grad_dt[0], grad_dt[1]);
        to_z[k][i] = pack_pair<T>(grad_z[0], grad_z[1]);
        to_out[k][i] = pack_pair<T>(out[0], out[1]);
      }
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const bool exists = group * kGroup + i < tokens_left;
      store_quad(args, args.grad_z, rows[i], quad, make_uint2(to_z[0][i], to_z[1][i]), exists);
      store_quad(args, args.grad_u, rows[i], quad, make_uint2(to_u[0][i], to_u[1][i]), exists);
      store_quad(args, args.grad_dt, rows[i], quad, make_uint2(to_dt[0][i], to_dt[1][i]), exists);
      store_quad(args, args.out, rows[i], quad, make_uint2(to_out[0][i], to_out[1][i]),
                 exists && args.out.data != nullptr);
    }
  }

  // grad_B and grad_C of four states of a token over the block's channels: two threads add half of the
  // warps each, then the even one completes grad_B and the odd one grad_C.
  __device__ __forceinline__ void store_state_gradients(int buffer) {
    const int token = thread >> 3, four = thread >> 1 & 3, half = thread & 1;
    constexpr int kHalf = kWarps / 2;
    const float4* products =
        reinterpret_cast<const float4*>(&shared.layers[token / kGroup * kGroupLayers + kGradBLayer +
                                                       token % kGroup][half * kHalf * kWarp + four * 8]);
    float4 grad_B = make_float4(0, 0, 0, 0), grad_C = grad_B;
    const auto add = [](float4& to, const float4& v) { to.x += v.x, to.y += v.y, to.z += v.z, to.w += v.w; };
#pragma unroll
    for (int w = 0; w < kHalf; ++w) {
#pragma unroll
      for (int k = 0; k < 8; ++k) add(grad_B, products[w * kWarp + (k ^ (thread & 7))]);
      add(grad_C, shared.grad_C[half * kHalf + w][token][four]);
    }
    float4 mine = half ? grad_C : grad_B;
    const float4 others = half ? grad_B : grad_C;
    mine.x += __shfl_xor_sync(~0u, others.x, 1);
    mine.y += __shfl_xor_sync(~0u, others.y, 1);
    mine.z += __shfl_xor_sync(~0u, others.z, 1);
    mine.w += __shfl_xor_sync(~0u, others.w, 1);
    if (shared.inactive[buffer] >> token & 1 || !has_states(four)) return;
    const int row = reinterpret_cast<const int32_t*>(shared.row[buffer])[token];
    const int64_t at = blockIdx.x * args.units.order.tokens + row;
    const int states = kAll ? kStates : args.states;
    *reinterpret_cast<float4*>(args.grad_BC + at * (2 * states) + half * states + four * 4) = mine;
  }

  __device__ void finish(int64_t walk) {
    const int64_t row = walk * kGroups + group;
    reinterpret_cast<float4*>(args.grad_D + row * args.channels)[quad] = pack(grad_D);
#pragma unroll
    for (int m = 0; m < kBiases; ++m) {
      if (m >= args.biases) continue;
      reinterpret_cast<float4*>(args.grad_dt_bias + (row * args.biases + m) * args.channels)[quad] =
          pack(grad_bias[m]);
    }
  }
};

}  // namespace mixture_of_mamba::fast_backward
