// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/common/shared_memory.cuh"
#include "kernels/cuda/selective_scan_fwd.cuh"

// The element-wise role of the forward scan: one token of a tile, kVector channels. Global loads are issued a
// tile before their values are needed and row indices two tiles before, so that no value is waited for.
//
// What a thread needs of its place (addresses in shared memory, the first channels of its rows) is made
// opaque once: the compiler would otherwise compute it again in every tile, about a fifth of the loop.

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
  int32_t matrix_row_bytes;
  int32_t valid_rows;
  int32_t boundary[kPlainModalities - 1];  // first rows of modalities 1 .. 3, where there are so few
  int64_t channel;
  int channel_count;  // of this thread's channels, those that exist
  // Shared addresses of this thread's first float4 of inputs and of outputs, its B or C, its bias and D.
  uint32_t input_at, output_at, matrix_at, bias_at, skip_at;
  float matrix_scale;
  const T *u_at, *dt_at, *z_at, *matrix_from;  // of row 0
  T* out_at;

  struct Row {
    int32_t row, modality;
    uint32_t keep;  // all bits while the row is in the unit and not padding
  };
  struct Inputs {
    Row row;
    Channels u, dt, z;
    Pack<T, K::kGroup> matrix;
  };
  struct Outputs {
    Channels u, z;
  };

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
    if (!K::kPlain && channel_count == 0) channel = max(p.channels - K::kVector, int64_t{0});
    const int first = eighth * K::kVector;
    input_at = shared_address(shared.inputs + token * K::kInputStride + Shared<K>::pair_offset(first / 2));
    output_at = shared_address(shared.outputs + token * K::kOutputStride + Shared<K>::quad_offset(first / 4) +
                               first % 4);
    matrix_at = shared_address(shared.matrices + token * K::kMatrixStride + eighth * K::kGroup);
    bias_at = shared_address(shared.bias + first);
    skip_at = shared_address(shared.skip + first);
    matrix_scale = eighth < 4 && !K::kAdjoint ? kLn2 : 1.0f;
    u_at = static_cast<const T*>(p.u.data) + channel;
    dt_at = static_cast<const T*>(p.dt.data) + channel;
    z_at = static_cast<const T*>(p.z.data) + channel;
    out_at = static_cast<T*>(p.out.data) + channel;
    matrix_from = static_cast<const T*>(matrix_rows.data) + args.first_state + eighth % 4 * K::kGroup;
    opaque(input_at), opaque(output_at), opaque(matrix_at), opaque(bias_at), opaque(skip_at);
    opaque(u_at), opaque(dt_at), opaque(z_at), opaque(out_at), opaque(matrix_from);
    opaque(matrix_scale), opaque(matrix_row_bytes);
  }

  // Whether this thread's token of a tile is inside the unit.
  __device__ bool exists(int tile) const { return tile * kTile + token < unit.length; }

  // The index as it stands in rows[], for read_row() a tile later.
  __device__ int32_t load_row(int tile) const {
    const int walked = min(tile * kTile + token, unit.length - 1);
    const int position = K::kAdjoint ? unit.length - 1 - walked : walked;
    const int32_t time = p.reverse ? unit.base - position : unit.base + position;
    return p.order.rows != nullptr ? p.order.rows[time] : time;
  }

  __device__ Row read_row(int tile, int32_t raw) const {
    Row row;
    row.row = p.order.clamp_row(raw);
    row.keep = exists(tile) && row.row < valid_rows ? ~0u : 0u;
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

  // In a row, from its place in row 0. Plain rows are less than 2^31 bytes apart: one multiply-add.
  template <typename Element>
  __device__ static Element* at(Element* in_row_0, int64_t stride, int32_t row_bytes, int32_t row) {
    if constexpr (!K::kPlain) return in_row_0 + row * stride;
    using Byte = std::conditional_t<std::is_const_v<Element>, const char, char>;
    return reinterpret_cast<Element*>(reinterpret_cast<Byte*>(in_row_0) +
                                      static_cast<int64_t>(row) * row_bytes);
  }
  __device__ const T* u_of(int32_t row) const { return at(u_at, p.u.stride, args.row_bytes.u, row); }
  __device__ const T* dt_of(int32_t row) const { return at(dt_at, p.dt.stride, args.row_bytes.dt, row); }
  __device__ const T* z_of(int32_t row) const { return at(z_at, p.z.stride, args.row_bytes.z, row); }
  __device__ T* out_of(int32_t row) const { return at(out_at, p.out.stride, args.row_bytes.out, row); }
  __device__ const T* matrix_of(int32_t row) const {
    return at(matrix_from, matrix_rows.stride, matrix_row_bytes, row);
  }

  __device__ Channels load_channels(const T* from) const {
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

  __device__ Inputs load_inputs(const Row& row) const {
    Inputs inputs;
    inputs.row = row;
    inputs.dt = load_channels(dt_of(row.row));
    inputs.u = load_channels(u_of(row.row));
    if constexpr (K::kAdjoint) inputs.z = load_channels(z_of(row.row));
    const T* from = matrix_of(row.row);
    if constexpr (K::kAligned) {
      inputs.matrix = load_pack<T, K::kGroup, true>(from);
    } else {
      const int state = args.first_state + eighth % 4 * K::kGroup;
#pragma unroll
      for (int i = 0; i < K::kGroup; ++i)
        inputs.matrix.values[i] = state + i < p.states ? from[i] : from_float<T>(0.0f);
    }
    return inputs;
  }

  __device__ Outputs load_outputs(const Row& row) const {
    Outputs outputs{};
    if constexpr (K::kPrepass) return outputs;
    // u again: a hit in L2 is cheaper than registers for two tiles.
    outputs.u = load_channels(u_of(row.row));
    if (K::kPlain || p.z.data != nullptr) outputs.z = load_channels(z_of(row.row));
    return outputs;
  }

  // dt + bias in log2 units. Branches are the same for all threads and stay outside of the loops over
  // channels: inside, they would cut the straight run of instructions that hides latencies.
  __device__ void scaled_dt(const Inputs& in, float (&delta)[K::kVector]) const {
    to_floats(in.dt, delta);
    if (K::kAligned || staged > 0) {
      float bias[K::kVector];
      load_shared(bias_at + in.row.modality * static_cast<int>(K::kChannels * sizeof(float)), bias);
#pragma unroll
      for (int i = 0; i < K::kVector; ++i) delta[i] = fmaf(delta[i], kLog2E, bias[i]);
    } else {
      const float* bias = static_cast<const float*>(p.dt_bias) + in.row.modality * p.channels + channel;
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
  // state passes. `buffer` is the byte offset of the buffer.
  __device__ void put_inputs(uint32_t buffer, Inputs in) const {
    const uint32_t keep = in.row.keep;
    keep_bits(keep, in.u, 0u);
    keep_bits(keep, in.matrix, 0u);
    // In front of the softplus where there is one: fewer words, and softplus(-inf) is 0.
    if constexpr (K::kPlain) keep_bits(keep, in.dt, minus_infinities<T>());
    float delta[K::kVector], input[K::kVector], gate[K::kVector];
    scaled_dt(in, delta);
    to_floats(in.u, input);
    if constexpr (K::kAdjoint) {
      keep_bits(keep, in.z, 0u);
      to_floats(in.z, gate);
    }
    if constexpr (!K::kPlain) {
#pragma unroll
      for (int i = 0; i < K::kVector; ++i) delta[i] = keep != 0 ? delta[i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < K::kVector; ++i) input[i] *= K::kAdjoint ? silu_fast<T>(gate[i]) : delta[i];
    const uint32_t inputs = input_at + buffer;
#pragma unroll
    for (int i = 0; i < K::kVector; i += 2) {
      // Pairs of a thread differ in the low bits of their place, which the swizzle's bits are added to by
      // xor.
      store_shared(inputs ^ (i / 2 * 16), make_float4(delta[i], input[i], delta[i + 1], input[i + 1]));
    }
    float values[K::kGroup];
    to_floats(in.matrix, values);
#pragma unroll
    for (int i = 0; i < K::kGroup; ++i) values[i] *= matrix_scale;
    store_shared(matrix_at + buffer, values);
  }

  __device__ void take_outputs(uint32_t buffer, float (&y)[K::kVector]) const {
    const uint32_t outputs = output_at + buffer;
#pragma unroll
    for (int part = 0; part < K::kGroup; ++part) {
#pragma unroll
      for (int i = 0; i < K::kVector; i += 4) {
        constexpr int kWidth = K::kVector < 4 ? K::kVector : 4;
        float values[kWidth];
        load_shared((outputs ^ (i / 4 * 16)) + part * static_cast<int>(K::kPartStride * sizeof(float)),
                    values);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) y[i + k] = part == 0 ? values[k] : y[i + k] + values[k];
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

  __device__ void put_outputs(int tile, const Row& row, const Outputs& of, float (&y)[K::kVector]) const {
    const bool wanted = tile >= 0 && exists(tile);
    if constexpr (!K::kPlain) {
      if (!wanted || channel_count == 0 || !add_launches(row, y)) return;
    }
    float factor[K::kVector], skip[K::kVector];
    to_floats(of.u, factor);
    load_shared(skip_at, skip);
#pragma unroll
    for (int i = 0; i < K::kVector; ++i) y[i] = fmaf(skip[i], factor[i], y[i]);
    if (K::kPlain || p.z.data != nullptr) {
      to_floats(of.z, factor);
#pragma unroll
      for (int i = 0; i < K::kVector; ++i) y[i] *= silu_fast<T>(factor[i]);
    }
    Channels out = from_floats<T>(y);
    keep_bits(row.keep, out, 0u);
    T* to = out_of(row.row);
    if constexpr (K::kPlain) {
      if (wanted) store_pack<T, K::kVector, true>(to, out);
    } else if constexpr (K::kAligned) {
      store_pack<T, K::kVector, true>(to, out);
    } else {
#pragma unroll
      for (int i = 0; i < K::kVector; ++i) {
        if (i < channel_count) to[i] = out.values[i];
      }
    }
  }

  // Where blocks are few, a tile takes less time than a load from memory: lines are asked for an iteration
  // before they are loaded.
  __device__ void prefetch(int32_t raw) const {
    const int32_t row = p.order.clamp_row(raw);
    const auto line = [](const T* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); };
    line(dt_of(row));
    line(u_of(row));
    if (K::kAdjoint || (!K::kPrepass && (K::kPlain || p.z.data != nullptr))) line(z_of(row));
    if (eighth % 4 == 0) line(matrix_of(row));
  }

  // Iteration i: the input of tile i + 1, the output of i - 1, loads for the input of i + 2 and the output of
  // i. The loads come first where there are registers for what is on its way meanwhile.
  __device__ void run(int tiles) {
    constexpr int kRows = K::kAhead ? 3 : 2;  // that are known, from this tile's on
    if (tiles == 0) return;
    Row done{}, current = read_row(0, load_row(0)), next = read_row(1, load_row(1)), after{};
    if constexpr (K::kAhead) after = read_row(2, load_row(2));
    int32_t raw = load_row(kRows), raw_after = load_row(kRows + 1);
    put_inputs(0, load_inputs(current));
    Inputs inputs = load_inputs(next), coming;
    Outputs outputs{}, finishing;
    float y[K::kVector];
    __syncthreads();
    uint32_t other = 0;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      other = K::kBufferBytes - other;
      if constexpr (K::kAhead) coming = load_inputs(after), finishing = load_outputs(current);
      put_inputs(other, inputs);
      if constexpr (!K::kPrepass) {
        // Of the first tile there is nothing yet, and nothing is stored.
        take_outputs(other, y);
        put_outputs(tile - 1, done, outputs, y);
      }
      done = current, current = next, next = after;
      (K::kAhead ? after : next) = read_row(tile + kRows, raw);
      raw = raw_after, raw_after = load_row(tile + kRows + 2);
      if constexpr (K::kChannelsPerLane == 1) prefetch(raw);
      if constexpr (!K::kAhead) coming = load_inputs(next), finishing = load_outputs(done);
      inputs = coming, outputs = finishing;
      __syncthreads();
    }
    if (K::kPrepass) return;
    take_outputs(K::kBufferBytes - other, y);
    put_outputs(tiles - 1, done, outputs, y);
  }
};

}  // namespace mixture_of_mamba::scan_forward
