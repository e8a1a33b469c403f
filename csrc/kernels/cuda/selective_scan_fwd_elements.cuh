// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/selective_scan_fwd.cuh"

// The element-wise role of the forward scan: one token of a tile, kVector channels. Global loads are issued a
// tile before their values are needed and row indices two tiles before, so that no value is waited for.

namespace mixture_of_mamba::scan_forward {

template <typename K>
struct ElementWise {
  using T = typename K::T;
  using Channels = Pack<T, K::kVector>;

  const ForwardArgs& args;
  const SelectiveScanForwardParams& p;
  const ScanUnit unit;
  const Shared<K> shared;
  const int token, eighth, staged;
  const ConstRows matrix_rows;  // B or C, of which the thread stages a few states
  const int32_t matrix_row_bytes;
  int32_t valid_rows;
  int32_t boundary[kPlainModalities - 1];  // first rows of modalities 1 .. 3, where there are so few
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
        matrix_rows(eighth < 4 ? p.B : p.C),
        matrix_row_bytes(eighth < 4 ? args.row_bytes.B : args.row_bytes.C),
        channel(block_channel + eighth * K::kVector) {
    const TokenOrder& order = p.order;
    valid_rows = order.offsets != nullptr ? order.offsets[order.modalities] : INT32_MAX;
#pragma unroll
    for (int m = 1; m < kPlainModalities; ++m) {
      boundary[m - 1] = m < staged && order.offsets != nullptr ? shared.boundaries[m] : INT32_MAX;
    }
    channel_count =
        static_cast<int>(min(static_cast<int64_t>(K::kVector), max(p.channels - channel, int64_t{0})));
    // Channels past the end are read from the last ones and never written.
    if (channel_count == 0) channel = max(p.channels - K::kVector, int64_t{0});
  }

  // The index as it stands in rows[], for read_row() a tile later.
  __device__ int32_t load_row(int tile) const {
    const int last = min(tile * kTile + token, unit.length - 1);
    const int32_t time = p.reverse ? unit.base - last : unit.base + last;
    return p.order.rows != nullptr ? p.order.rows[time] : time;
  }

  __device__ Row read_row(int tile, int32_t raw) const {
    Row row;
    row.row = p.order.clamp_row(raw);
    row.exists = tile * kTile + token < unit.length;
    row.valid = row.exists && row.row < valid_rows;
    row.modality = 0;
#pragma unroll
    for (int m = 0; m < kPlainModalities - 1; ++m) row.modality += row.row >= boundary[m];
    if constexpr (!K::kPlain) {
#pragma unroll 1
      for (int m = kPlainModalities; m < staged; ++m) row.modality += row.row >= shared.boundaries[m];
      if (!K::kAligned && staged == 0) {
        row.modality = min(p.order.modality_of_row(row.row), p.bias_modalities - 1);
      }
    }
    return row;
  }

  // Element `column` of a row. Plain rows are less than 2^31 bytes apart: one multiply-add.
  __device__ const T* at(const ConstRows& rows, int32_t row_bytes, int32_t row, int64_t column) const {
    const T* first = static_cast<const T*>(rows.data) + column;
    if constexpr (!K::kPlain) return first + row * rows.stride;
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(first) +
                                      static_cast<int64_t>(row) * row_bytes);
  }

  __device__ Channels load_channels(const ConstRows& rows, int32_t row_bytes, int32_t row) const {
    const T* from = at(rows, row_bytes, row, channel);
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
    const RowBytes& bytes = args.row_bytes;
    dt = load_channels(p.dt, bytes.dt, row.row);
    u = load_channels(p.u, bytes.u, row.row);
    const int state = args.first_state + eighth % 4 * K::kGroup;
    const T* from = at(matrix_rows, matrix_row_bytes, row.row, state);
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
    const RowBytes& bytes = args.row_bytes;
    output_u =
        load_channels(p.u, bytes.u, row.row);  // again: a hit in L2 is cheaper than registers for two tiles
    if (K::kPlain || p.z.data != nullptr) z = load_channels(p.z, bytes.z, row.row);
  }

  // dt + bias in log2 units. Branches are the same for all threads and stay outside of the loops over
  // channels: inside, they would cut the straight run of instructions that hides latencies.
  __device__ void scaled_dt(float (&delta)[K::kVector]) const {
    to_floats(dt, delta);
    if (K::kAligned || staged > 0) {
      const float* bias = shared.bias + input_row.modality * K::kChannels + eighth * K::kVector;
#pragma unroll
      for (int i = 0; i < K::kVector; ++i) delta[i] = fmaf(delta[i], kLog2E, bias[i]);
    } else {
      const float* bias = static_cast<const float*>(p.dt_bias) + input_row.modality * p.channels + channel;
#pragma unroll
      for (int i = 0; i < K::kVector; ++i) {
        delta[i] = kLog2E * (delta[i] + (i < channel_count ? bias[i] : 0.0f));
      }
    }
    if (!K::kPlain && !p.softplus) return;
#pragma unroll
    for (int i = 0; i < K::kVector; ++i) delta[i] = softplus2<T>(delta[i]);
  }

  // Padding and what lies past the end may hold anything, NaN too: it gets delta 0, u 0, B 0 and C 0, and the
  // state passes.
  __device__ void put_inputs(int buffer) {
    const bool valid = input_row.valid;
    keep_if(valid, u, 0u);
    keep_if(valid, matrix, 0u);
    // In front of the softplus where there is one: fewer words, and softplus(-inf) is 0.
    if constexpr (K::kPlain) keep_if(valid, dt, minus_infinities<T>());
    float delta[K::kVector], input[K::kVector];
    scaled_dt(delta);
    to_floats(u, input);
    if constexpr (!K::kPlain) {
#pragma unroll
      for (int i = 0; i < K::kVector; ++i) delta[i] = valid ? delta[i] : 0.0f;
    }
    float* inputs = shared.inputs + buffer * K::kInputs + token * K::kInputStride;
#pragma unroll
    for (int i = 0; i < K::kVector; i += 2) {
      *reinterpret_cast<float4*>(inputs + Shared<K>::pair_offset((eighth * K::kVector + i) / 2)) =
          make_float4(delta[i], delta[i] * input[i], delta[i + 1], delta[i + 1] * input[i + 1]);
    }
    const float scale = eighth < 4 ? kLn2 : 1.0f;
    float values[K::kGroup];
    to_floats(matrix, values);
    float* matrices = shared.matrices + buffer * K::kMatrices + token * K::kMatrixStride + eighth * K::kGroup;
    if constexpr (K::kGroup == 2) {
      *reinterpret_cast<float2*>(matrices) = make_float2(values[0] * scale, values[1] * scale);
    } else {
#pragma unroll
      for (int i = 0; i < K::kGroup; i += 4) {
        *reinterpret_cast<float4*>(matrices + i) = make_float4(values[i] * scale, values[i + 1] * scale,
                                                               values[i + 2] * scale, values[i + 3] * scale);
      }
    }
  }

  __device__ void take_outputs(int buffer, float (&y)[K::kVector]) const {
    const float* outputs = shared.outputs + buffer * K::kOutputs + token * K::kOutputStride;
#pragma unroll
    for (int part = 0; part < K::kGroup; ++part) {
#pragma unroll
      for (int i = 0; i < K::kVector; i += 4) {
        const int first = eighth * K::kVector + i;
        const float* from = outputs + part * K::kPartStride + Shared<K>::quad_offset(first / 4) + first % 4;
        if constexpr (K::kVector >= 4) {
          const float4 quad = *reinterpret_cast<const float4*>(from);
          y[i] = part == 0 ? quad.x : y[i] + quad.x, y[i + 1] = part == 0 ? quad.y : y[i + 1] + quad.y;
          y[i + 2] = part == 0 ? quad.z : y[i + 2] + quad.z,
                y[i + 3] = part == 0 ? quad.w : y[i + 3] + quad.w;
        } else {
          const float2 pair = *reinterpret_cast<const float2*>(from);
          y[i] = part == 0 ? pair.x : y[i] + pair.x, y[i + 1] = part == 0 ? pair.y : y[i + 1] + pair.y;
        }
      }
    }
  }

  // Adds the launches' parts of y; false while more are to come.
  __device__ bool add_launches(const Row& row, float (&y)[K::kVector]) const {
    if (args.partial_y == nullptr) return true;
    float* partial = args.partial_y + row.row * p.channels + channel;
#pragma unroll
    for (int i = 0; i < K::kVector; ++i) {
      if (i >= channel_count) continue;
      if (!args.first_launch) y[i] += partial[i];
      if (!args.last_launch) partial[i] = y[i];
    }
    return args.last_launch;
  }

  __device__ void put_outputs(const Row& row, float (&y)[K::kVector]) const {
    if constexpr (!K::kPlain) {
      if (!row.exists || channel_count == 0 || !add_launches(row, y)) return;
    }
    float factor[K::kVector];
    to_floats(output_u, factor);
#pragma unroll
    for (int i = 0; i < K::kVector; ++i) y[i] = fmaf(shared.skip[eighth * K::kVector + i], factor[i], y[i]);
    if (K::kPlain || p.z.data != nullptr) {
      to_floats(z, factor);
#pragma unroll
      for (int i = 0; i < K::kVector; ++i) y[i] *= silu_fast<T>(factor[i]);
    }
    Channels out = from_floats<T>(y);
    keep_if(row.valid, out, 0u);
    T* to = const_cast<T*>(at({p.out.data, p.out.stride}, args.row_bytes.out, row.row, channel));
    if constexpr (K::kPlain) {
      if (row.exists) store_pack<T, K::kVector, true>(to, out);
    } else if constexpr (K::kAligned) {
      store_pack<T, K::kVector, true>(to, out);
    } else {
#pragma unroll
      for (int i = 0; i < K::kVector; ++i) {
        if (i < channel_count) to[i] = out.values[i];
      }
    }
  }

  // Where blocks are few, a tile takes less time than a load from memory: lines are asked for two tiles
  // before they are loaded.
  __device__ void prefetch(int32_t raw) const {
    const int32_t row = p.order.clamp_row(raw);
    const auto line = [](const T* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); };
    line(at(p.dt, args.row_bytes.dt, row, channel));
    line(at(p.u, args.row_bytes.u, row, channel));
    if (!K::kPrepass && (K::kPlain || p.z.data != nullptr)) line(at(p.z, args.row_bytes.z, row, channel));
    if (eighth % 4 == 0) line(at(matrix_rows, matrix_row_bytes, row, args.first_state));
  }

  // Iteration i: inputs of tile i + 1, outputs of tile i - 1, loads for tile i + 2.
  __device__ void run(int tiles) {
    if (tiles == 0) return;
    Row done{}, current = read_row(0, load_row(0)), next = read_row(1, load_row(1));
    int32_t raw_next = load_row(2), raw_after = load_row(3);
    float y[K::kVector];
    load_inputs(current);
    put_inputs(0);
    load_inputs(next);
    if constexpr (!K::kPrepass) output_u = z = Channels{};
    __syncthreads();
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int other = (tile & 1) ^ 1;
      put_inputs(other);
      if constexpr (!K::kPrepass) {
        // Of the first tile there is nothing yet, and nothing is stored.
        take_outputs(other, y);
        put_outputs(done, y);
      }
      done = current, current = next, next = read_row(tile + 2, raw_next);
      raw_next = raw_after, raw_after = load_row(tile + 4);
      if constexpr (K::kChannelsPerLane == 1) prefetch(raw_next);
      load_inputs(next);
      load_outputs(done);
      __syncthreads();
    }
    if (K::kPrepass) return;
    take_outputs((tiles - 1) & 1, y);
    put_outputs(done, y);
  }
};

}  // namespace mixture_of_mamba::scan_forward
