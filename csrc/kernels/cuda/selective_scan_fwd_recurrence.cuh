// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/common/chained.cuh"
#include "kernels/cuda/selective_scan_fwd.cuh"

namespace mixture_of_mamba::scan_forward {

// The recurrence role of the forward scan: kChannelsPerLane channels, kStatesPerLane states of each.
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
  __device__ bool exists(int c, int s) const {
    return K::kPlain || (channel + c < p.channels && state(s) < p.states);
  }
  __device__ int64_t offset(int64_t outer, int c, int s) const {
    return (outer * p.channels + channel + c) * p.states + state(s);
  }

  // The states before chunks are read here first, and all else that is read was there before their passes.
  __device__ void begin() {
    wait_for_previous();
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
        // ex2_polynomial() would lose it.
        if (K::kPolynomial > 0 && isnan(A[c][s]) && unit.length > 0) h[c][s] = A[c][s];
      }
    }
  }

  __device__ void put_states(float* to, int64_t outer) const {
    // Asked for at run time where it is not known: a state row of 16 bytes.
    const bool whole_words = K::kPlain || (K::kAligned && p.states % kS == 0);
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      if (whole_words) {
        if (!exists(c, 0)) continue;
        __stcs(reinterpret_cast<float4*>(to + offset(outer, c, 0)),
               make_float4(h[c][0], h[c][1], h[c][2], h[c][3]));
      } else {
#pragma unroll
        for (int s = 0; s < kS; ++s) {
          if (exists(c, s)) to[offset(outer, c, s)] = h[c][s];
        }
      }
    }
  }

  __device__ void load_inputs(const float* inputs, float (&delta)[kC], float (&drive)[kC]) const {
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
  }

  // The exponentials run a token ahead of the states that need them.
  __device__ void decays_of(const float (&delta)[kC], float (&decay)[kC][kS]) {
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

  __device__ float4 four_of_B(const float* matrices) const {
    return *reinterpret_cast<const float4*>(matrices + part * kS);
  }
  __device__ float4 four_of_C(const float* matrices) const {
    return *reinterpret_cast<const float4*>(matrices + K::kStates + part * kS);
  }

  // get_B and get_C give the token's four, from shared memory or from where they have been loaded to.
  template <typename GetB, typename GetC>
  __device__ void update(GetB&& get_B, GetC&& get_C, const float (&decay)[kC][kS], const float (&drive)[kC],
                         float* outputs) {
    const float4 B4 = get_B();
    const float B[kS] = {B4.x, B4.y, B4.z, B4.w};
#pragma unroll
    for (int s = 0; s < kS; ++s) {
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        h[c][s] = K::kAdjoint ? decay[c][s] * fmaf(drive[c], B[s], h[c][s])
                              : fmaf(decay[c][s], h[c][s], drive[c] * B[s]);
      }
    }
    if constexpr (!K::kPrepass) {
      const float4 C = get_C();
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

  __device__ void walk_tile(const float* inputs, const float* matrices, float* outputs) {
    float decay[2][kC][kS], delta[kC], drive[2][kC];
    load_inputs(inputs, delta, drive[0]);
    decays_of(delta, decay[0]);
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      if (t + 1 < kTile) {
        load_inputs(inputs + (t + 1) * K::kInputStride, delta, drive[(t + 1) & 1]);
        decays_of(delta, decay[(t + 1) & 1]);
      }
      const float* four = matrices + t * K::kMatrixStride;
      update([&] { return four_of_B(four); }, [&] { return four_of_C(four); }, decay[t & 1], drive[t & 1],
             outputs + t * K::kOutputStride);
    }
  }

  // One channel a lane is for when warps are few, and nobody else works while a load from shared memory is on
  // its way. So loads run two tokens ahead here; by itself the compiler moves none across a store.
  __device__ void walk_tile_of_few_warps(const float* inputs, const float* matrices, float* outputs) {
    constexpr int kSlots = 3;
    float decay[2][kC][kS], delta[kSlots][kC], drive[kSlots][kC];
    float4 B[kSlots], C[kSlots];
    const auto fetch = [&](int t) {
      load_inputs(inputs + t * K::kInputStride, delta[t % kSlots], drive[t % kSlots]);
      B[t % kSlots] = four_of_B(matrices + t * K::kMatrixStride);
      if (!K::kPrepass) C[t % kSlots] = four_of_C(matrices + t * K::kMatrixStride);
    };
    fetch(0);
    fetch(1);
    decays_of(delta[0], decay[0]);
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      if (t + 2 < kTile) fetch(t + 2);
      if (t + 1 < kTile) decays_of(delta[(t + 1) % kSlots], decay[(t + 1) & 1]);
      update([&] { return B[t % kSlots]; }, [&] { return C[t % kSlots]; }, decay[t & 1], drive[t % kSlots],
             outputs + t * K::kOutputStride);
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
      const int buffer = (tile & 1) * K::kBuffer;
      const float* inputs = shared.inputs + buffer;
      const float* matrices = shared.matrices + buffer;
      float* outputs = shared.outputs + buffer + output_offset;
      if (checkpoints != nullptr) put_states(checkpoints, unit.slot + tile);
      if constexpr (kC == 1) {
        walk_tile_of_few_warps(inputs, matrices, outputs);
      } else {
        walk_tile(inputs, matrices, outputs);
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
          args.unit_delta[unit_index * p.channels + channel + c] =
              K::kAdjoint ? delta_sum[c] * kLn2 : delta_sum[c];
      }
    } else if (p.final_state != nullptr && unit.chunk == unit.chunks - 1) {
      put_states(static_cast<float*>(p.final_state), unit.sequence);
    }
  }
};

}  // namespace mixture_of_mamba::scan_forward
