// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "kernels/causal_conv1d.h"
#include "kernels/cuda/causal_conv1d_ring.cuh"
#include "kernels/cuda/common/element.cuh"
#include "kernels/cuda/common/fast_math.cuh"
#include "kernels/cuda/common/launch.h"
#include "kernels/cuda/common/scan_units.cuh"

// What forward and backward of the convolution share: a thread's walk over the tokens of a unit
// (scan_units.h) with the last width - 1 inputs in a window.
//
// A thread owns kVector neighbouring channels, a warp reads whole lines of a row. The window of the
// usual widths (2, 3, 4) is in registers; any other width keeps it in workspace memory (kWidth 0).

namespace mixture_of_mamba::conv {

struct ConvArgs {
  ScanUnits units;
  int32_t channel_blocks = 0;
  int32_t walkers = 0;        // blocks that share the units of one channel block
  float* windows = nullptr;   // kWidth 0: [values][threads of the grid]
  int64_t window_stride = 0;  // threads of the grid
};

// kCount x kVector floats: registers, or a strided piece of workspace when kCount is 0.
template <int kCount, int kVector>
struct Values {
  float registers[kCount > 0 ? kCount : 1][kVector];
  __device__ __forceinline__ void place(const ConvArgs&, int) {}
  __device__ __forceinline__ float& at(int j, int v) { return registers[j][v]; }
};

template <int kVector>
struct Values<0, kVector> {
  float* memory;
  int64_t stride;
  __device__ __forceinline__ void place(const ConvArgs& args, int first) {
    stride = args.window_stride;
    memory =
        args.windows + first * kVector * stride + blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  }
  __device__ __forceinline__ float& at(int j, int v) {
    return memory[(static_cast<int64_t>(j) * kVector + v) * stride];
  }
};

template <typename T_, int kWidth_, int kVector_, bool kAligned_>
struct Config {
  using T = T_;
  static constexpr int kWidth = kWidth_, kVector = kVector_;
  static constexpr bool kAligned = kAligned_;
};

// taps = width - 1: a constant for the usual widths, so that loops over the window unroll.
template <int kWidth>
struct Taps {
  static constexpr int taps = kWidth - 1;
  __device__ __forceinline__ explicit Taps(const CausalConv1dParams&) {}
};
template <>
struct Taps<0> {
  const int taps;
  __device__ __forceinline__ explicit Taps(const CausalConv1dParams& p)
      : taps(static_cast<int>(p.width) - 1) {}
};

template <typename K>
struct Walk : Taps<K::kWidth> {
  using Taps<K::kWidth>::taps;
  using T = typename K::T;
  static constexpr int kVector = K::kVector;
  using Channels = Pack<T, kVector>;

  const CausalConv1dParams& p;
  const ConvArgs& args;
  const int64_t channel;
  const int32_t valid_rows;  // rows from here on are padding
  ScanUnit unit;
  Values<K::kWidth == 1 ? 1 : (K::kWidth > 0 ? K::kWidth - 1 : 0), kVector> window;
  float weight[K::kWidth > 0 ? K::kWidth : 1][kVector];
  float bias[kVector];

  // The parameters may be loaded later, by load_parameters().
  __device__ __forceinline__ Walk(const CausalConv1dParams& p_, const ConvArgs& args_, int64_t channel_,
                                  bool with_parameters = true)
      : Taps<K::kWidth>(p_),
        p(p_),
        args(args_),
        channel(channel_),
        valid_rows(p.order.offsets != nullptr ? p.order.offsets[p.order.modalities] : INT32_MAX) {
    window.place(args, 0);
    if (with_parameters) load_parameters();
  }

  __device__ __forceinline__ void load_parameters() {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      bias[v] = p.bias != nullptr ? static_cast<const float*>(p.bias)[channel + v] : 0.0f;
      if constexpr (K::kWidth == 4) {
        const float4* words = static_cast<const float4*>(p.weight);
        if (reinterpret_cast<uintptr_t>(words) % sizeof(float4) == 0) {
          const float4 four = words[channel + v];
          weight[0][v] = four.x, weight[1][v] = four.y, weight[2][v] = four.z, weight[3][v] = four.w;
          continue;
        }
      }
      if constexpr (K::kWidth > 0) {
#pragma unroll
        for (int k = 0; k < K::kWidth; ++k) weight[k][v] = load_weight(k, v);
      }
    }
  }

  __device__ __forceinline__ float load_weight(int k, int v) const {
    return static_cast<const float*>(p.weight)[(channel + v) * p.width + k];
  }
  __device__ __forceinline__ float tap(int k, int v) const {
    if constexpr (K::kWidth > 0) return weight[k][v];
    return load_weight(k, v);
  }
  __device__ __forceinline__ bool is_padding(int32_t row) const { return row >= valid_rows; }
  // Aligned rows are less than 2^31 elements apart: one multiply-add.
  __device__ __forceinline__ int64_t element(int64_t stride, int32_t row) const {
    return (K::kAligned ? static_cast<int64_t>(row) * static_cast<int32_t>(stride) : row * stride) + channel;
  }
  __device__ __forceinline__ const T* at(const ConstRows& rows, int32_t row) const {
    return static_cast<const T*>(rows.data) + element(rows.stride, row);
  }
  __device__ __forceinline__ Channels load(const ConstRows& rows, int32_t row) const {
    return load_pack<T, kVector, K::kAligned>(at(rows, row));
  }
  // Token i of a group: from the ring, or where rows are not aligned from global memory.
  template <int kStreams, int kGroup>
  __device__ __forceinline__ Channels take(const Ring<kStreams, kGroup>& ring, int group, int stream, int i,
                                           const ConstRows& rows, int32_t row) const {
    if constexpr (K::kAligned) {
      return ring.template take<Channels>(group, stream, i);
    } else {
      return load(rows, row);
    }
  }
  __device__ __forceinline__ void store(const Rows& rows, int32_t row, const float (&values)[kVector]) const {
    store_pack<T, kVector, K::kAligned>(static_cast<T*>(rows.data) + element(rows.stride, row),
                                        from_floats<T>(values));
  }
  __device__ __forceinline__ int64_t state_offset(int j) const {
    return (static_cast<int64_t>(unit.sequence) * taps + j) * p.channels + channel;
  }
  // Entry j of a state, zero where there is none.
  __device__ __forceinline__ Channels load_state(const void* state, int j) const {
    const T* from = static_cast<const T*>(state) + state_offset(j);
    return state != nullptr ? load_pack<T, kVector, K::kAligned>(from) : Channels{};
  }
  __device__ __forceinline__ void get_state(const void* state, int j, float (&to)[kVector]) const {
    to_floats(load_state(state, j), to);
  }
  __device__ __forceinline__ void put_state(void* state, int j, const float (&from)[kVector]) const {
    store_pack<T, kVector, K::kAligned>(static_cast<T*>(state) + state_offset(j), from_floats<T>(from));
  }

  __device__ __forceinline__ void set_window(int j, const Channels& entry) {
    float values[kVector];
    to_floats(entry, values);
#pragma unroll
    for (int v = 0; v < kVector; ++v) window.at(j, v) = values[v];
  }
  __device__ __forceinline__ void put_window(void* state) {
#pragma unroll
    for (int j = 0; j < taps; ++j) {
      float entry[kVector];
#pragma unroll
      for (int v = 0; v < kVector; ++v) entry[v] = window.at(j, v);
      put_state(state, j, entry);
    }
  }

  // Rows of the tokens from the `first` of the unit on, for the whole block.
  __device__ __forceinline__ void look_up(Piece& piece, int32_t first) const {
    __syncthreads();  // nobody reads the rows before any more
    if (threadIdx.x < kPiece) {
      const int32_t token = first + static_cast<int32_t>(threadIdx.x);
      const int32_t row = p.order.row_of(unit.base + min(token, unit.length - 1));
      piece.row[threadIdx.x] = row;
      const uint32_t absent = __ballot_sync(~0u, token >= unit.length || is_padding(row));
      if (threadIdx.x % 32 == 0) piece.absent[threadIdx.x / 32] = absent;
    }
    __syncthreads();
  }

  // Calls body(group of the piece) for each, while fetch(group) runs kStages - 1 groups ahead.
  template <int kGroup, typename Fetch, typename Body>
  __device__ __forceinline__ void for_each_group(int32_t tokens, Fetch&& fetch, Body&& body) const {
    const int groups = (tokens + kGroup - 1) / kGroup;
    for (int group = 0; group < kStages - 1; ++group) {
      if (K::kAligned && group < groups) fetch(group);
      end_fetches();
    }
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      if (K::kAligned && group + kStages - 1 < groups) fetch(group + kStages - 1);
      end_fetches();
      await_fetches();
      body(group);
    }
  }

  // Rows of the kCount times from `time` on; times past `last` repeat it.
  template <int kCount>
  __device__ __forceinline__ void find_rows(int32_t time, int32_t last, int32_t (&row)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) row[i] = p.order.row_of(min(time + i, last));
  }
  template <int kCount>
  __device__ __forceinline__ bool any_padding(const int32_t (&row)[kCount]) const {
    bool any = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i) any = any || is_padding(row[i]);
    return any;
  }

  // The window before the unit: initial_state, then the last inputs of the sequence that are not padding.
  // Every index of the window is a constant, which keeps it in registers.
  __device__ __forceinline__ void look_back() {
    const int32_t begin = unit.base - unit.chunk * args.units.chunk_length;
    if constexpr (K::kWidth > 1) {
      if (unit.base - begin >= taps) {
        int32_t row[K::kWidth - 1];
        find_rows(unit.base - taps, unit.base, row);
        if (!any_padding(row)) {  // the usual case: all loads at once
          Channels x[K::kWidth - 1];
#pragma unroll
          for (int j = 0; j < taps; ++j) x[j] = load(p.x, row[j]);
#pragma unroll
          for (int j = 0; j < taps; ++j) push(x[j]);
          return;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < taps; ++j) set_window(j, load_state(p.initial_state, j));
    int32_t time = unit.base;
    for (int found = 0; time > begin && found < taps;) {
      found += !is_padding(p.order.row_of(--time));
    }
#pragma unroll 1
    for (; time < unit.base; ++time) {
      const int32_t row = p.order.row_of(time);
      if (!is_padding(row)) push(load(p.x, row));
    }
  }

  __device__ __forceinline__ void pre_activation(const Channels& x, float (&pre)[kVector]) {
    float now[kVector];
    to_floats(x, now);
#pragma unroll
    for (int v = 0; v < kVector; ++v) pre[v] = fmaf(tap(taps, v), now[v], bias[v]);
#pragma unroll
    for (int j = 0; j < taps; ++j) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) pre[v] = fmaf(tap(j, v), window.at(j, v), pre[v]);
    }
  }

  __device__ __forceinline__ void push(const Channels& x) {
    if (taps == 0) return;
#pragma unroll
    for (int j = 0; j + 1 < taps; ++j) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) window.at(j, v) = window.at(j + 1, v);
    }
    float now[kVector];
    to_floats(x, now);
#pragma unroll
    for (int v = 0; v < kVector; ++v) window.at(taps - 1, v) = now[v];
  }
};

// Where a block of the grid works: channel vector of this thread, or -1 past the last; and the walker.
template <int kVector>
__device__ __forceinline__ int64_t channel_of_thread(const ConvArgs& args, int64_t channels) {
  const int64_t channel =
      (static_cast<int64_t>(blockIdx.x % args.channel_blocks) * kThreads + threadIdx.x) * kVector;
  return channel < channels ? channel : -1;
}

inline int64_t channel_blocks_of(int64_t channels, int vector) {
  return ceil_div(channels, static_cast<int64_t>(kThreads) * vector);
}

// Whether a thread's share of a row is one word wherever it lies.
inline bool rows_in_words(const void* data, int64_t stride, ScalarType type) {
  return mixture_of_mamba::rows_in_words(data, stride, size_of(type), kBytesOfThread) && stride <= INT32_MAX;
}
inline bool state_in_words(const void* data) { return is_aligned_to(data, kBytesOfThread); }

}  // namespace mixture_of_mamba::conv
