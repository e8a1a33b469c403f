// SPDX-License-Identifier: Apache-2.0
//
// Depthwise causal convolution, forward: kernels/causal_conv1d.h has the equations.
//
// Grid     channel blocks (fastest) x walkers; a walker takes every walkers-th unit of kChunk tokens.
// Thread   kVector channels (8 bytes of a row) of one unit, token by token, the window in registers; the rows
//          of the next kInFlight tokens are looked up while these are computed.
// Cost     16-bit: 4 bytes a (token, channel) of HBM, and 3 / kChunk of the reads again at chunk starts;
//          about 14 issue slots. HBM is the bound.
// Barriers none: threads share nothing.

#include "kernels/cuda/causal_conv1d.cuh"
#include "kernels/cuda/device_info.h"

namespace mixture_of_mamba {
namespace conv {
namespace {

constexpr int kInFlight = 8;  // tokens whose loads are issued together
constexpr int kBlocksPerProcessor = 16;

// One token that is not padding.
template <typename K>
__device__ __forceinline__ void forward_token(const CausalConv1dForwardParams& p, Walk<K>& walk, int32_t row,
                                              const typename Walk<K>::Channels& x) {
  float y[K::kVector];
  walk.pre_activation(x, y);
#pragma unroll
  for (int v = 0; v < K::kVector; ++v) {
    const float activated = silu_fast<typename K::T>(y[v]);
    y[v] = p.silu ? activated : y[v];  // a selection: a branch would cut the run of instructions
  }
  walk.push(x);
  walk.store(p.y, row, y);
}

template <typename K>
__device__ __forceinline__ void forward_unit(const CausalConv1dForwardParams& p, Walk<K>& walk) {
  using Channels = typename Walk<K>::Channels;
  const int32_t length = walk.unit.length, last = walk.unit.base + length - 1;
  int32_t next_row[kInFlight];
  if (length > 0) walk.find_rows(walk.unit.base, last, next_row);
  walk.look_back();
#pragma unroll 1
  for (int first = 0; first < length; first += kInFlight) {
    int32_t row[kInFlight];
    Channels x[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      row[i] = next_row[i];
      x[i] = walk.load(p.x, row[i]);
    }
    walk.find_rows(walk.unit.base + first + kInFlight, last, next_row);
    if (first + kInFlight <= length && !walk.any_padding(row)) {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) forward_token(p, walk, row[i], x[i]);
      continue;
    }
#pragma unroll 1
    for (int i = first; i < min(first + kInFlight, length); ++i) {
      const int32_t one = p.order.row_of(walk.unit.base + i);
      if (walk.is_padding(one)) {
        const float zero[K::kVector] = {};
        walk.store(p.y, one, zero);
      } else {
        forward_token(p, walk, one, walk.load(p.x, one));
      }
    }
  }
  if (p.final_state == nullptr || walk.unit.chunk != walk.unit.chunks - 1) return;
  auto* state = static_cast<typename K::T*>(p.final_state);
#pragma unroll
  for (int j = 0; j < walk.taps; ++j) {
#pragma unroll
    for (int v = 0; v < K::kVector; ++v) {
      state[walk.state_offset(j) + v] = from_float<typename K::T>(walk.window.at(j, v));
    }
  }
}

template <typename K>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ CausalConv1dForwardParams p,
                   const __grid_constant__ ConvArgs args) {
  const int64_t channel = channel_of_thread<K::kVector>(args, p.channels);
  if (channel < 0) return;
  Walk<K> walk(p, args, channel);
  for (int index = blockIdx.x / args.channel_blocks; get_unit(args.units, index, &walk.unit);
       index += args.walkers) {
    forward_unit(p, walk);
  }
}

struct Plan {
  ConvArgs args;
  int vector = 1;
  bool aligned = false;
  size_t window_offset = 0, bytes = 0;
};

Plan plan(const CausalConv1dForwardParams& p) {
  Plan plan;
  const int64_t element = size_of(p.type);
  const int vector = static_cast<int>(kBytesOfThread / element);
  const bool usual = p.width >= 2 && p.width <= 4;
  plan.aligned = usual && p.channels % vector == 0 &&
                 rows_in_words(p.x.data, p.x.stride, element, kBytesOfThread) &&
                 rows_in_words(p.y.data, p.y.stride, element, kBytesOfThread);
  plan.vector = plan.aligned ? vector : 1;
  // A state updated in place has one reader and one writer only when its sequence is one unit.
  const bool in_place = p.final_state != nullptr && p.final_state == p.initial_state;
  plan.args.units = plan_scan_units(p.order, false, in_place ? p.order.tokens : kChunk);
  plan.args.channel_blocks = static_cast<int32_t>(channel_blocks_of(p.channels, plan.vector));
  const int64_t wanted =
      ceil_div(kBlocksPerProcessor * std::max(multiprocessors_cuda(), 1), plan.args.channel_blocks);
  plan.args.walkers =
      static_cast<int32_t>(std::min<int64_t>(plan.args.units.max_units, std::max<int64_t>(wanted, 1)));
  plan.window_offset = align_workspace(scan_units_workspace(plan.args.units));
  plan.bytes = plan.window_offset;
  if (!usual) {
    plan.args.window_stride = static_cast<int64_t>(plan.args.channel_blocks) * plan.args.walkers * kThreads;
    plan.bytes +=
        align_workspace(plan.args.window_stride * std::max<int64_t>(p.width - 1, 1) * sizeof(float));
  }
  return plan;
}

template <typename K>
int launch(const CausalConv1dForwardParams& p, const ConvArgs& args, CUstream_st* stream) {
  forward_kernel<K><<<args.channel_blocks * args.walkers, kThreads, 0, stream>>>(p, args);
  return cudaGetLastError();
}

template <typename T, int kWidth>
int launch_width(const CausalConv1dForwardParams& p, const Plan& plan, CUstream_st* stream) {
  constexpr int kVector = kBytesOfThread / sizeof(T);
  return plan.aligned ? launch<Config<T, kWidth, kVector, true>>(p, plan.args, stream)
                      : launch<Config<T, kWidth, 1, false>>(p, plan.args, stream);
}

}  // namespace
}  // namespace conv

size_t causal_conv1d_forward_workspace_cuda(const CausalConv1dForwardParams& params) {
  return params.channels == 0 ? 0 : conv::plan(params).bytes;
}

int launch_causal_conv1d_forward_cuda(const CausalConv1dForwardParams& params, void* workspace,
                                      CUstream_st* stream) {
  using namespace conv;
  if (params.channels == 0 || params.order.sequences == 0) return cudaSuccess;
  Plan made = plan(params);
  if (const int error = build_scan_units(made.args.units, workspace, stream); error != 0) return error;
  made.args.windows = reinterpret_cast<float*>(static_cast<char*>(workspace) + made.window_offset);
  return dispatch_type(params.type, [&](auto type) -> int {
    using T = typename decltype(type)::type;
    switch (params.width) {
      case 2:
        return launch_width<T, 2>(params, made, stream);
      case 3:
        return launch_width<T, 3>(params, made, stream);
      case 4:
        return launch_width<T, 4>(params, made, stream);
      default:
        return launch<Config<T, 0, 1, false>>(params, made.args, stream);
    }
  });
}

}  // namespace mixture_of_mamba
