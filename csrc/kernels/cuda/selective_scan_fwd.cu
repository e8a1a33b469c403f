// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/selective_scan_fwd.cuh"

#include <algorithm>

#include "kernels/cuda/common/chained.cuh"
#include "kernels/cuda/common/launch.h"
#include "kernels/cuda/device_info.h"
#include "kernels/cuda/selective_scan_step.cuh"

// Host side of the forward scan: which variant, how long a chunk, in how many launches; and the small
// kernel that hands states from chunk to chunk.

namespace mixture_of_mamba {
namespace scan_forward {
namespace {

constexpr int kMaxGroup = 32;      // lanes a channel: 128 states in one launch
constexpr int kWideChannels = 64;  // of a block
// Tokens of a sequence; of fewer, two more launches cost more than they spread. The first holds where all
// chunks run at once.
constexpr int64_t kShortestCutAtOnce = 384, kShortestCut = 512;
constexpr int64_t kShortestChunk = 64;  // tokens
constexpr int64_t kFewestChunks = 3;    // two passes over halves take as long as one over the whole
constexpr int64_t kPackedChunk = 2048;  // tokens of a packed document that one block walks
constexpr int kCombineThreads = 128;
constexpr int kCombinedAtOnce = 8;  // units whose loads are in flight together

// State before each unit from the end states of the units before it, in place:
//   before[c + 1] = 2^(A sum of delta2 over c) before[c] + end[c]
// One thread a (channel, state) of a sequence.
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __grid_constant__ ForwardArgs args, float* unit_state, const float* unit_delta) {
  follow_previous();
  const SelectiveScanForwardParams& p = args.params;
  const int64_t size = p.channels * p.states;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kCombineThreads) + threadIdx.x;
       i < size * p.order.sequences; i += static_cast<int64_t>(gridDim.x) * kCombineThreads) {
    const int32_t sequence = static_cast<int32_t>(i / size);
    const int64_t element = i % size, channel = element / p.states;
    const int32_t first = first_unit_of(args.units, sequence);
    ScanUnit unit;
    if (!get_unit(args.units, first, &unit)) continue;
    const float A = static_cast<const float*>(p.A)[element];
    float h = p.initial_state != nullptr ? static_cast<const float*>(p.initial_state)[i] : 0.0f;
    const int32_t last = min(first + unit.chunks, args.units.max_units) - 1;
    for (int32_t index = first; index < last; index += kCombinedAtOnce) {
      float end[kCombinedAtOnce], delta[kCombinedAtOnce];
#pragma unroll
      for (int k = 0; k < kCombinedAtOnce; ++k) {
        const bool exists = index + k < last;
        end[k] = exists ? unit_state[(index + k) * size + element] : 0.0f;
        delta[k] = exists ? unit_delta[(index + k) * p.channels + channel] : 0.0f;
      }
#pragma unroll
      for (int k = 0; k < kCombinedAtOnce; ++k) {
        if (index + k >= last) break;
        unit_state[(index + k) * size + element] = h;
        // A growing decay may be infinite, and infinity times an empty state is not a number.
        h = h == 0.0f ? end[k] : fmaf(ex2(A * delta[k]), h, end[k]);
      }
    }
    unit_state[last * size + element] = h;
  }
}

int group_of(int64_t states) {
  int group = 2;
  while (group < kMaxGroup && group * kStatesPerLane < states) group *= 2;
  return group;
}

// Whether every access of the wide variants is a whole aligned word. 16 bytes serve all of them.
bool is_aligned(const SelectiveScanForwardParams& p, int group) {
  const int64_t bytes = size_of(p.type);
  const auto wide = [&](const ConstRows& rows) {
    return rows.data == nullptr || rows_in_words(rows.data, rows.stride, bytes, 16);
  };
  const int64_t matrix_word = std::min<int64_t>(16, group * bytes);
  const auto matrix = [&](const ConstRows& rows) {
    return rows_in_words(rows.data, rows.stride, bytes, matrix_word);
  };
  const auto states = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return staged_modalities(p) > 0 && p.channels % 8 == 0 && p.states > 0 &&
         p.states % (group * kStatesPerLane) == 0 && wide(p.u) && wide(p.dt) && wide(p.z) &&
         wide({p.out.data, p.out.stride}) && matrix(p.B) && matrix(p.C) && states(p.final_state) &&
         states(p.checkpoints);
}

Access access_of(const SelectiveScanForwardParams& p, int group) {
  if (!is_aligned(p, group)) return Access::kAny;
  const int64_t widest =
      std::max({p.u.stride, p.dt.stride, p.z.stride, p.out.stride, p.B.stride, p.C.stride});
  const bool plain = widest * size_of(p.type) <= INT32_MAX && p.softplus && p.z.data != nullptr &&
                     p.channels % kWideChannels == 0 && p.states == group * kStatesPerLane &&
                     staged_modalities(p) <= kPlainModalities;
  return plain ? Access::kPlain : Access::kAligned;
}

// Of a block: with more states, more lanes share a channel. With 16 states there are blocks of two sizes.
int64_t block_channels(int group) { return group <= 4 ? kWideChannels : group == 8 ? 32 : 16; }
int64_t narrow_block_channels(int group) { return group == 4 ? kWideChannels / 2 : block_channels(group); }

struct Plan {
  Tile tile = Tile::kNarrow;
  int group = 4;
  int launches = 1;
  Access access = Access::kAny;
  ScanUnits units;
  bool chunked = false;
  size_t units_bytes = 0, partial_offset = 0, state_offset = 0, delta_offset = 0, bytes = 0;
};

// Tokens of a chunk; at least the longest sequence when nothing is to be cut. Looks at sizes alone.
int64_t chunk_length(const SelectiveScanForwardParams& p, int group) {
  const TokenOrder& order = p.order;
  const int64_t longest = order.cu_seqlens == nullptr ? order.length : order.tokens;
  const int64_t processors = std::max(multiprocessors_cuda(), 1);
  const bool packed = order.cu_seqlens != nullptr;
  const int64_t blocks = std::max<int64_t>(1, ceil_div(p.channels, block_channels(group)) * order.sequences);
  if (packed && blocks >= processors) return kPackedChunk;
  // One pass of narrow blocks on three quarters of the SMs beats two passes over chunks on all of them. Of
  // packed documents one may have nearly all tokens.
  const int64_t abreast = packed ? 1 : order.sequences;
  const int64_t narrow_blocks = ceil_div(p.channels, narrow_block_channels(group)) * abreast;
  if (narrow_blocks * 4 >= processors * 3) return longest;
  const bool at_once = narrow_blocks * ceil_div(longest, kShortestChunk) <= 2 * processors;
  if (longest <= (at_once ? kShortestCutAtOnce : kShortestCut)) return longest;
  const int64_t chunks = std::max<int64_t>(2, 2 * processors / blocks);
  if (chunks < kFewestChunks && !packed) return longest;
  return std::max(kShortestChunk, ceil_div(longest, chunks));
}

Plan plan(const SelectiveScanForwardParams& p) {
  Plan plan;
  plan.group = group_of(p.states);
  const int64_t states_of_launch = plan.group * kStatesPerLane;
  plan.launches = static_cast<int>(std::max<int64_t>(1, ceil_div(p.states, states_of_launch)));
  plan.access = access_of(p, plan.group);
  plan.units = plan_scan_units(p.order, p.reverse, chunk_length(p, plan.group));
  plan.chunked = plan.units.max_units > p.order.sequences;
  const int64_t blocks = ceil_div(p.channels, kWideChannels) * plan.units.max_units;
  const int64_t processors = std::max(multiprocessors_cuda(), 1);
  plan.tile = blocks * 10 >= processors * 25  ? Tile::kWideThree
              : blocks * 10 >= processors * 9 ? Tile::kWide
                                              : Tile::kNarrow;
  const auto take = [&](size_t bytes) {
    const size_t offset = plan.bytes;
    plan.bytes += align_workspace(bytes);
    return offset;
  };
  take(scan_units_workspace(plan.units));
  if (plan.launches > 1) plan.partial_offset = take(p.order.tokens * p.channels * sizeof(float));
  if (plan.chunked) {
    plan.state_offset = take(plan.units.max_units * p.channels * p.states * sizeof(float));
    plan.delta_offset = take(plan.units.max_units * p.channels * sizeof(float));
  }
  return plan;
}

template <typename T>
int run(const SelectiveScanForwardParams& p, Plan plan, char* workspace, CUstream_st* stream) {
  if (const int error = build_scan_units(plan.units, workspace, stream); error != 0) return error;
  ForwardArgs args;
  args.params = p;
  const auto bytes = [&](int64_t stride) { return static_cast<int32_t>(stride * size_of(p.type)); };
  args.row_bytes = {bytes(p.u.stride),   bytes(p.dt.stride), bytes(p.z.stride),
                    bytes(p.out.stride), bytes(p.B.stride),  bytes(p.C.stride)};
  args.units = plan.units;
  args.partial_y = plan.launches > 1 ? reinterpret_cast<float*>(workspace + plan.partial_offset) : nullptr;
  float* const unit_state = reinterpret_cast<float*>(workspace + plan.state_offset);
  float* const unit_delta = reinterpret_cast<float*>(workspace + plan.delta_offset);
  const int states_of_launch = plan.group * kStatesPerLane;
  if (plan.chunked) {
    for (int i = 0; i < plan.launches; ++i) {
      ForwardArgs prepass = args;
      prepass.first_state = i * states_of_launch;
      prepass.unit_end_state = unit_state;
      prepass.unit_delta = unit_delta;
      if (const int error = launch_prepass<T>(prepass, plan.group, plan.access, stream); error != 0)
        return error;
    }
    const int64_t elements = p.channels * p.states * p.order.sequences;
    if (elements > 0) {
      const unsigned blocks = grid_blocks(elements, kCombineThreads);
      const int error = launch_chained({blocks, kCombineThreads, 0, stream}, combine_kernel, args, unit_state,
                                       static_cast<const float*>(unit_delta));
      if (error != cudaSuccess) return error;
    }
    args.unit_state = unit_state;
  }
  for (int i = 0; i < plan.launches; ++i) {
    args.first_state = i * states_of_launch;
    args.first_launch = i == 0;
    args.last_launch = i == plan.launches - 1;
    if (const int error = launch_main<T>(args, plan.tile, plan.group, plan.access, stream); error != 0)
      return error;
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace scan_forward

bool selective_scan_takes_narrow_state_cuda(const SelectiveScanForwardParams& params) {
  return scan_step_supports(params);
}

size_t selective_scan_forward_workspace_cuda(const SelectiveScanForwardParams& params) {
  return scan_step_supports(params) ? 0 : scan_forward::plan(params).bytes;
}

int launch_selective_scan_forward_cuda(const SelectiveScanForwardParams& params, void* workspace,
                                       CUstream_st* stream) {
  if (params.channels == 0 || params.order.sequences == 0) return cudaSuccess;
  if (scan_step_supports(params)) return launch_scan_step(params, stream);
  if (params.narrow_state) return cudaErrorInvalidValue;
  const scan_forward::Plan plan = scan_forward::plan(params);
  char* const memory = static_cast<char*>(workspace);
  switch (params.type) {
    case ScalarType::kFloat32:
      return scan_forward::run<float>(params, plan, memory, stream);
    case ScalarType::kBFloat16:
      return scan_forward::run<__nv_bfloat16>(params, plan, memory, stream);
    case ScalarType::kFloat16:
      return scan_forward::run<__half>(params, plan, memory, stream);
    case ScalarType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace mixture_of_mamba
