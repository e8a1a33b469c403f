// SPDX-License-Identifier: Apache-2.0
//
// Depthwise causal convolution, forward: kernels/causal_conv1d.h has the equations.
//
// Grid     channel blocks (fastest) x walkers; a walker takes every walkers-th unit of kChunk tokens.
// Thread   kVector channels (8 bytes of a row) of one unit, token by token, the window in registers.
// Cost     16-bit: 4 bytes a (token, channel) of HBM, and 3 / kChunk of the reads again at chunk starts;
//          about 14 issue slots. HBM is the bound.
// Barriers two a piece of kPiece tokens, around the look-up of its rows; all threads reach them.

#include "kernels/cuda/causal_conv1d_step.cuh"
#include "kernels/cuda/device_info.h"

namespace mixture_of_mamba {
namespace conv {
namespace {

constexpr int kGroup = 16;      // tokens that are computed in one straight run
constexpr int64_t kChunk = 64;  // tokens of a unit
constexpr int kBlocksPerProcessor = 16;

template <typename K>
__device__ __forceinline__ void forward_piece(const CausalConv1dForwardParams& p, Walk<K>& walk,
                                              const Piece& piece, Ring<1, kGroup>& ring, int32_t first) {
  using Channels = typename Walk<K>::Channels;
  const int32_t tokens = min(kPiece, walk.unit.length - first);
  const auto fetch = [&](int group) {
    int32_t row[kGroup];
    piece.get_group(group * kGroup, row);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) ring.fetch(group, 0, i, walk.at(p.x, row[i]));
  };
  const auto body = [&](int group) {
    if (group == 0 && first == 0) walk.look_back();
    if (piece.is_full<kGroup>(group * kGroup)) {
      int32_t row[kGroup];
      Channels x[kGroup];
      piece.get_group(group * kGroup, row);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) x[i] = walk.take(ring, group, 0, i, p.x, row[i]);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) forward_token(p, walk, row[i], x[i]);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kGroup && group * kGroup + i < tokens; ++i) {
      const int32_t row = piece.row[group * kGroup + i];
      if (piece.is_absent(group * kGroup + i)) {
        const float zero[K::kVector] = {};
        walk.store(p.y, row, zero);
      } else {
        forward_token(p, walk, row, walk.take(ring, group, 0, i, p.x, row));
      }
    }
  };
  walk.template for_each_group<kGroup>(tokens, fetch, body);
}

template <typename K>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ CausalConv1dForwardParams p,
                   const __grid_constant__ ConvArgs args) {
  __shared__ Piece piece;
  __shared__ Ring<1, kGroup> ring;
  follow_previous();
  const int64_t channel = channel_of_thread<K::kVector>(args, p.channels);
  const bool works = channel >= 0;  // who does not comes to the barriers
  Walk<K> walk(p, args, works ? channel : 0);
  for (int index = blockIdx.x / args.channel_blocks; get_unit(args.units, index, &walk.unit);
       index += args.walkers) {
    if (works && walk.unit.length == 0) walk.look_back();
    for (int32_t first = 0; first < walk.unit.length; first += kPiece) {
      walk.look_up(piece, first);
      if (works) forward_piece(p, walk, piece, ring, first);
    }
    const bool last = walk.unit.chunk == walk.unit.chunks - 1;
    if (works && last && p.final_state != nullptr) walk.put_window(p.final_state);
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
  const int vector = static_cast<int>(kBytesOfThread / size_of(p.type));
  const bool usual = p.width >= 2 && p.width <= 4;
  plan.aligned = usual && p.channels % vector == 0 && rows_in_words(p.x.data, p.x.stride, p.type) &&
                 rows_in_words(p.y.data, p.y.stride, p.type) && state_in_words(p.initial_state) &&
                 state_in_words(p.final_state);
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
  const unsigned blocks = args.channel_blocks * args.walkers;
  return launch_chained({blocks, kThreads, 0, stream}, forward_kernel<K>, p, args);
}

template <typename T, int kWidth>
int launch_width(const CausalConv1dForwardParams& p, const Plan& plan, CUstream_st* stream) {
  constexpr int kVector = kBytesOfThread / sizeof(T);
  if (plan.aligned && is_step(p.order)) return launch_step<Config<T, kWidth, kVector, true>>(p, stream);
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
