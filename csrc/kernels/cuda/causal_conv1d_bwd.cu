// SPDX-License-Identifier: Apache-2.0
//
// Depthwise causal convolution, backward. With dpre the gradient of a token's pre-activation:
//
//   grad_x of an input   = sum over the width tokens whose window it is in of weight[k] dpre
//   grad_weight[k]       = sum over tokens of dpre x[k-th of its window]        grad_bias = sum dpre
//
// Grid     as in forward; a thread walks its unit with the window of inputs and, beside it, what their
//          gradients have come to. An input's gradient is complete when it leaves the window, and is written
//          then: after its own tokens a thread walks on for the next width - 1 that are not padding. Inputs
//          that came from the unit before are that unit's; entries of initial_state are the first unit's.
// Sums     grad_weight and grad_bias of a walker are partial sums in workspace, added in a fixed order after.
// Cost     16-bit: 6 bytes a (token, channel) of HBM, and up to 2 * 3 tokens of a unit again. HBM is the
// bound.

#include <algorithm>

#include "kernels/cuda/causal_conv1d.cuh"
#include "kernels/cuda/common/chained.cuh"
#include "kernels/cuda/device_info.h"
#include "kernels/cuda/selective_scan_bwd.h"

namespace mixture_of_mamba {
namespace conv {
namespace {

constexpr int kGroup = 4;                                     // tokens that are computed in one straight run
constexpr int kBlocksPerProcessor = 4;                        // as many as fit
constexpr int64_t kShortestChunk = 64, kLongestChunk = 2048;  // tokens of a unit
constexpr int32_t kForeign = INT32_MIN;  // an input of the unit before: its gradient is written there

template <typename K>
struct BackwardWalk : Walk<K> {
  using Base = Walk<K>;
  using T = typename K::T;
  using Channels = typename Base::Channels;
  static constexpr int kVector = K::kVector;
  static constexpr int kTaps = K::kWidth > 0 ? K::kWidth - 1 : 0;
  using Base::taps;
  using Base::unit;
  using Base::window;

  const CausalConv1dBackwardParams& p;
  Values<kTaps, kVector> grad_window;
  Values<kTaps, 1> source;  // of each window entry: a row, -1 - j for entry j of the state, or kForeign
  Values<K::kWidth, kVector> grad_weight;
  float grad_bias[kVector] = {};

  __device__ __forceinline__ BackwardWalk(const CausalConv1dBackwardParams& p_, const ConvArgs& args,
                                          int64_t channel)
      : Base(p_, args, channel), p(p_) {
    grad_window.place(args, taps);
    source.place(args, 2 * taps);
    grad_weight.place(args, 3 * taps);
#pragma unroll
    for (int k = 0; k <= taps; ++k) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) grad_weight.at(k, v) = 0.0f;
    }
  }

  // The gradient of an input that leaves the window. kPlain: it is a row of this unit or foreign.
  template <bool kPlain>
  __device__ __forceinline__ void retire(int32_t from, const float (&grad)[kVector]) {
    if (from >= 0 && p.grad_x.data != nullptr) this->store(p.grad_x, from, grad);
    if constexpr (!kPlain) {
      if (from >= 0 || from == kForeign || p.grad_initial_state == nullptr) return;
      this->put_state(p.grad_initial_state, -1 - from, grad);
    }
  }

  __device__ __forceinline__ int32_t source_at(int j) { return __float_as_int(source.at(j, 0)); }
  __device__ __forceinline__ void set_source(int j, int32_t from) { source.at(j, 0) = __int_as_float(from); }

  // One token that is not padding; kOwn when it belongs to this unit.
  template <bool kOwn, bool kPlain>
  __device__ __forceinline__ void token(int32_t row, const Channels& x, const Channels& grad_y) {
    float grad[kVector], pre[kVector], now[kVector];
    to_floats(grad_y, grad);
    to_floats(x, now);
    this->pre_activation(x, pre);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float s = sigmoid_fast<T>(pre[v]), slope = s * fmaf(pre[v], 1.0f - s, 1.0f);
      grad[v] *= p.silu ? slope : 1.0f;  // a selection: a branch would cut the run of instructions
    }
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
#pragma unroll
      for (int j = 0; j < taps; ++j) {
        grad_window.at(j, v) = fmaf(this->tap(j, v), grad[v], grad_window.at(j, v));
        if (kOwn) grad_weight.at(j, v) = fmaf(window.at(j, v), grad[v], grad_weight.at(j, v));
      }
      if (kOwn) {
        grad_weight.at(taps, v) = fmaf(now[v], grad[v], grad_weight.at(taps, v));
        grad_bias[v] += grad[v];
      }
    }
    shift<kPlain>(kOwn ? row : kForeign, x, grad);
  }

  template <bool kPlain>
  __device__ __forceinline__ void shift(int32_t from, const Channels& x, float (&grad)[kVector]) {
    float leaving[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float own = this->tap(taps, v) * grad[v];
      leaving[v] = taps == 0 ? own : grad_window.at(0, v);
      grad[v] = own;
    }
    if (taps == 0) return retire<kPlain>(from, leaving);
    retire<kPlain>(source_at(0), leaving);
#pragma unroll
    for (int j = 0; j + 1 < taps; ++j) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) grad_window.at(j, v) = grad_window.at(j + 1, v);
      set_source(j, source_at(j + 1));
    }
#pragma unroll
    for (int v = 0; v < kVector; ++v) grad_window.at(taps - 1, v) = grad[v];
    set_source(taps - 1, from);
    this->push(x);
  }

  __device__ __forceinline__ void begin() {
    this->look_back();
#pragma unroll
    for (int j = 0; j < taps; ++j) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) grad_window.at(j, v) = 0.0f;
      set_source(j, unit.chunk == 0 ? -1 - j : kForeign);
    }
  }

  __device__ __forceinline__ void piece_of_tokens(const Piece& piece, Ring<2, kGroup>& ring, int32_t first) {
    const int32_t tokens = min(kPiece, unit.length - first);
    const auto fetch = [&](int group) {
      int32_t row[kGroup];
      piece.get_group(group * kGroup, row);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        ring.fetch(group, 0, i, this->at(p.x, row[i]));
        ring.fetch(group, 1, i, this->at(p.grad_y, row[i]));
      }
    };
    const auto body = [&](int group) {
      if (group == 0 && first == 0) begin();
      if (piece.is_full<kGroup>(group * kGroup) && !state_leaves_next()) {
        int32_t row[kGroup];
        Channels x[kGroup], grad_y[kGroup];
        piece.get_group(group * kGroup, row);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          x[i] = this->take(ring, group, 0, i, p.x, row[i]);
          grad_y[i] = this->take(ring, group, 1, i, p.grad_y, row[i]);
        }
#pragma unroll
        for (int i = 0; i < kGroup; ++i) token<true, true>(row[i], x[i], grad_y[i]);
        return;
      }
#pragma unroll 1
      for (int i = 0; i < kGroup && group * kGroup + i < tokens; ++i) {
        const int32_t row = piece.row[group * kGroup + i];
        if (piece.is_absent(group * kGroup + i)) {
          const float zero[kVector] = {};
          retire<true>(row, zero);
        } else {
          token<true, false>(row, this->take(ring, group, 0, i, p.x, row),
                             this->take(ring, group, 1, i, p.grad_y, row));
        }
      }
    };
    this->template for_each_group<kGroup>(tokens, fetch, body);
  }

  // Entries of the state are the oldest in the window.
  __device__ __forceinline__ bool state_leaves_next() {
    if (taps == 0 || p.grad_initial_state == nullptr) return false;
    const int32_t oldest = source_at(0);
    return oldest < 0 && oldest != kForeign;
  }

  // Tokens of later units that still see inputs of this one; at the sequence's end, the final state.
  __device__ __forceinline__ void look_ahead() {
    const int32_t end = static_cast<int32_t>(p.order.sequence_end(unit.sequence));
    int32_t time = unit.base + unit.length;
    if constexpr (K::kWidth > 1) {
      if (end - time >= taps) {
        int32_t row[K::kWidth - 1];
        this->find_rows(time, end - 1, row);
        if (!this->any_padding(row)) {  // the usual case: all loads at once
          Channels x[K::kWidth - 1], grad_y[K::kWidth - 1];
#pragma unroll
          for (int j = 0; j < taps; ++j) {
            x[j] = this->load(p.x, row[j]);
            grad_y[j] = this->load(p.grad_y, row[j]);
          }
#pragma unroll
          for (int j = 0; j < taps; ++j) token<false, false>(row[j], x[j], grad_y[j]);
          return;
        }
      }
    }
    int seen = 0;
#pragma unroll 1
    for (; time < end && seen < taps; ++time) {
      const int32_t row = p.order.row_of(time);
      if (this->is_padding(row)) continue;
      token<false, false>(row, this->load(p.x, row), this->load(p.grad_y, row));
      ++seen;
    }
    if (seen == taps) return;  // nothing of this unit is left in the window
#pragma unroll
    for (int j = 0; j < taps; ++j) {
      float grad[kVector];
      this->get_state(p.grad_final_state, j, grad);
#pragma unroll
      for (int v = 0; v < kVector; ++v) grad[v] += grad_window.at(j, v);
      retire<false>(source_at(j), grad);
    }
  }

  // partial_weight [walkers, channels, width], partial_bias [walkers, channels]
  __device__ __forceinline__ void put_sums(float* partial_weight, float* partial_bias, int64_t walker) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const int64_t place = walker * p.channels + this->channel + v;
#pragma unroll
      for (int k = 0; k <= taps; ++k) partial_weight[place * p.width + k] = grad_weight.at(k, v);
      partial_bias[place] = grad_bias[v];
    }
  }
};

template <typename K>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    backward_kernel(const __grid_constant__ CausalConv1dBackwardParams p,
                    const __grid_constant__ ConvArgs args, float* partial_weight, float* partial_bias) {
  __shared__ Piece piece;
  __shared__ Ring<2, kGroup> ring;
  follow_previous();
  const int64_t channel = channel_of_thread<K::kVector>(args, p.channels);
  const bool works = channel >= 0;  // who does not comes to the barriers
  BackwardWalk<K> walk(p, args, works ? channel : 0);
  const int walker = blockIdx.x / args.channel_blocks;
  for (int index = walker; get_unit(args.units, index, &walk.unit); index += args.walkers) {
    if (works && walk.unit.length == 0) walk.begin();
    for (int32_t first = 0; first < walk.unit.length; first += kPiece) {
      walk.look_up(piece, first);
      if (works) walk.piece_of_tokens(piece, ring, first);
    }
    if (works) walk.look_ahead();
  }
  if (works) walk.put_sums(partial_weight, partial_bias, walker);
}

struct Plan {
  ConvArgs args;
  bool aligned = false;
  size_t weight_offset = 0, bias_offset = 0, window_offset = 0, bytes = 0;
};

Plan plan(const CausalConv1dBackwardParams& p) {
  Plan plan;
  const int vector = static_cast<int>(kBytesOfThread / size_of(p.type));
  const bool usual = p.width >= 2 && p.width <= 4;
  plan.aligned = usual && p.channels % vector == 0 && rows_in_words(p.x.data, p.x.stride, p.type) &&
                 rows_in_words(p.grad_y.data, p.grad_y.stride, p.type) &&
                 rows_in_words(p.grad_x.data, p.grad_x.stride, p.type) && state_in_words(p.initial_state) &&
                 state_in_words(p.grad_final_state) && state_in_words(p.grad_initial_state);
  // Units as long as one round of blocks allows: at the ends of a unit tokens are walked twice.
  plan.args.channel_blocks = static_cast<int32_t>(channel_blocks_of(p.channels, plan.aligned ? vector : 1));
  const int64_t at_once = std::max<int64_t>(
      1, kBlocksPerProcessor * std::max(multiprocessors_cuda(), 1) / std::max(plan.args.channel_blocks, 1));
  plan.args.units = plan_scan_units(
      p.order, false, std::clamp(ceil_div(p.order.tokens, at_once), kShortestChunk, kLongestChunk));
  plan.args.walkers = static_cast<int32_t>(std::min<int64_t>(plan.args.units.max_units, at_once));
  const auto take = [&](int64_t floats) {
    const size_t offset = plan.bytes;
    plan.bytes += align_workspace(floats * sizeof(float));
    return offset;
  };
  plan.bytes = align_workspace(scan_units_workspace(plan.args.units));
  plan.weight_offset = take(plan.args.walkers * p.channels * p.width);
  plan.bias_offset = take(plan.args.walkers * p.channels);
  if (!usual) {
    plan.args.window_stride = static_cast<int64_t>(plan.args.channel_blocks) * plan.args.walkers * kThreads;
    plan.window_offset = take(plan.args.window_stride * (4 * p.width - 3));
  }
  return plan;
}

template <typename T, int kWidth>
int launch(const CausalConv1dBackwardParams& p, const Plan& plan, float* weight, float* bias,
           CUstream_st* stream) {
  const unsigned blocks = plan.args.channel_blocks * plan.args.walkers;
  if constexpr (kWidth > 0) {
    if (plan.aligned) {
      constexpr int kVector = kBytesOfThread / sizeof(T);
      return launch_chained({blocks, kThreads, 0, stream}, backward_kernel<Config<T, kWidth, kVector, true>>,
                            p, plan.args, weight, bias);
    }
  }
  return launch_chained({blocks, kThreads, 0, stream}, backward_kernel<Config<T, kWidth, 1, false>>, p,
                        plan.args, weight, bias);
}

}  // namespace
}  // namespace conv

size_t causal_conv1d_backward_workspace_cuda(const CausalConv1dBackwardParams& params) {
  return params.channels == 0 ? 0 : conv::plan(params).bytes;
}

int launch_causal_conv1d_backward_cuda(const CausalConv1dBackwardParams& params, void* workspace,
                                       CUstream_st* stream) {
  using namespace conv;
  if (params.channels == 0) return cudaSuccess;
  Plan made = plan(params);
  char* const memory = static_cast<char*>(workspace);
  float* const weight = reinterpret_cast<float*>(memory + made.weight_offset);
  float* const bias = reinterpret_cast<float*>(memory + made.bias_offset);
  if (made.args.walkers > 0) {
    if (const int error = build_scan_units(made.args.units, workspace, stream); error != 0) return error;
    made.args.windows = reinterpret_cast<float*>(memory + made.window_offset);
    const int error = dispatch_type(params.type, [&](auto type) -> int {
      using T = typename decltype(type)::type;
      switch (params.width) {
        case 2:
          return launch<T, 2>(params, made, weight, bias, stream);
        case 3:
          return launch<T, 3>(params, made, weight, bias, stream);
        case 4:
          return launch<T, 4>(params, made, weight, bias, stream);
        default:
          return launch<T, 0>(params, made, weight, bias, stream);
      }
    });
    if (error != 0) return error;
  }
  const int64_t walkers = made.args.walkers;
  return launch_column_sums({{weight, walkers, params.channels * params.width, params.grad_weight},
                             {bias, walkers, params.channels, params.grad_bias}},
                            stream);
}

}  // namespace mixture_of_mamba
