// SPDX-License-Identifier: Apache-2.0
//
// Selective scan, backward, fast path: bf16 or fp16, 16 states (or 4, 8, 12), gate and softplus present,
// channels a multiple of 128, rows aligned to 4 elements, at most 4 rows of dt_bias. The equations are those
// of selective_scan_bwd_general.cu; delta, g and all sums are fp32, states between the two sweeps bf16.
//
// A checkpoint gives h before every tile of 16 tokens, so tiles are walked last to first, in phases:
//
//   begin_tile   element-wise: delta, delta * u, dy to shared memory; slopes stay in registers
//   rebuild      h forward over the tile: y = sum(C h), products dy h for grad_C, h itself as bf16
//   sweep_back   g backward: sum(g B), sum(q A), grad_A, products delta u g for grad_B
//   end_tile     grad_B and grad_C of the tile, grad_u, grad_dt, grad_z; meanwhile the next tile's loads
//
// Grid    (channels / 128, walkers). A walker takes units walker, walker + walkers, ...; a unit is a
//         sequence, or a chunk of one whose incoming g a pre-pass has made: the forward scan's kernel in
//         its adjoint form (with fewer states the general path's), and the general path's combination.
// Block   128 channels, one or two teams of 128 threads. Two teams walk alternate tiles of the same
//         unit and only sweep_back() waits for the other: for when blocks are too few to put two on
//         every multiprocessor. In the sweeps a lane owns 4 channels x 4 states, a warp 32 channels;
//         element-wise a lane owns 4 channels, a warp 4 tokens.
// Sums    over states: three shuffles for four channels. Over channels: four in the lane, then products
//         meet in shared memory, in layers whose states are not written yet or not needed any more,
//         then the blocks' in launch_reduce_state_gradients(). Over tokens: registers, then
//         launch_column_sums(). Every order is fixed. No tensor cores: they would lower the clock.
// Cost    per (token, channel): about 400 issue slots, 36 special functions (45 % of their pipe's time),
//         7 elements + 4 bytes of checkpoint + 2 of partials. Issue slots bind: registers and shared
//         memory allow two warps a scheduler, which fill not quite 60 % of them.
// Barriers  three a tile, of a team: inputs in shared memory | sums in shared memory | both read.

#include <algorithm>

#include "kernels/cuda/common/launch.h"
#include "kernels/cuda/device_info.h"
#include "kernels/cuda/selective_scan_bwd.h"
#include "kernels/cuda/selective_scan_bwd_fast.cuh"
#include "kernels/cuda/selective_scan_bwd_general.cuh"
#include "kernels/cuda/selective_scan_fwd.cuh"

namespace mixture_of_mamba {
namespace fast_backward {
namespace {

constexpr int64_t kShortestChunk = 2 * kTokens;
constexpr int64_t kRounds = 8;  // walkers are so many that blocks of uneven work even out
constexpr int64_t kMostWalkers = 65535;

int shared_memory_of_block() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess
             ? bytes
             : 0;
}

// Whether all elements are whole quads whose offsets fit 32 bits.
bool is_quads(const void* data, int64_t stride, int64_t tokens) {
  return data != nullptr && is_aligned_to(data, kQuadBytes) && stride % kQuad == 0 && stride >= 0 &&
         tokens * (stride / kQuad) < int64_t{1} << 32;
}

int64_t channel_blocks(const SelectiveScanBackwardParams& p) { return p.channels / kChannels; }
int64_t multiprocessors() { return std::max(multiprocessors_cuda(), 1); }

Quads quads(const ConstRows& rows) {
  return {const_cast<void*>(rows.data), static_cast<uint32_t>(rows.stride / kQuad)};
}
Quads quads(const Rows& rows) { return {rows.data, static_cast<uint32_t>(rows.stride / kQuad)}; }

struct Plan {
  Args args;
  int teams = 1;
  bool cut = false;             // some sequence may have several units
  float* unit_carry = nullptr;  // [units, channels, states], only when cut
  float* delta_sum = nullptr;   // [units, channels], only when cut
  void* units = nullptr;        // workspace of the unit table
  size_t bytes = 0;
};

// One block a multiprocessor with two teams, or two with one team each. Equal sequences are left whole
// where that fills three quarters of the device, and else cut into as many chunks as fill it once.
// Packed sequences may be of any length: chunks of half a round.
int64_t chunk_length(const SelectiveScanBackwardParams& p, int* teams) {
  const TokenOrder& order = p.order;
  const int64_t blocks = order.sequences * channel_blocks(p), one_round = 2 * multiprocessors();
  *teams = 1;
  if (order.cu_seqlens != nullptr) {
    return std::max(order.tokens * channel_blocks(p) / (2 * one_round), kShortestChunk);
  }
  if (blocks * 8 >= one_round * 3) {
    if (blocks * 2 <= one_round) *teams = 2;
    return order.length;
  }
  return std::max(ceil_div(order.length, one_round / blocks), kShortestChunk);
}

// Workspace pointers are counted from `base`.
Plan make_plan(const SelectiveScanBackwardParams& p, void* base) {
  Plan plan;
  Args& args = plan.args;
  args.units = plan_scan_units(p.order, p.reverse, chunk_length(p, &plan.teams));
  const int64_t units = args.units.max_units, size = p.channels * p.states;
  const int64_t most_walkers = kRounds * 2 * multiprocessors() / channel_blocks(p);
  const int64_t walkers = std::min({units, std::max<int64_t>(most_walkers, 1), kMostWalkers});
  args.u = quads(p.u);
  args.dt = quads(p.dt);
  args.z = quads(p.z);
  args.grad_out = quads(p.grad_out);
  args.B = quads(p.B);
  args.C = quads(p.C);
  args.grad_u = quads(p.grad_u);
  args.grad_dt = quads(p.grad_dt);
  args.grad_z = quads(p.grad_z);
  args.out = quads(p.out);
  args.A = static_cast<const float*>(p.A);
  args.D = static_cast<const float*>(p.D);
  args.dt_bias = static_cast<const float*>(p.dt_bias);
  args.checkpoints = static_cast<const float*>(p.checkpoints);
  args.grad_final_state = static_cast<const float*>(p.grad_final_state);
  args.grad_initial_state = static_cast<float*>(p.grad_initial_state);
  args.channels = static_cast<int32_t>(p.channels);
  args.states = static_cast<int32_t>(p.states);
  args.walkers = static_cast<int32_t>(walkers);
  args.biases = p.dt_bias != nullptr ? p.bias_modalities : 0;

  const auto take_bytes = [&](size_t bytes) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(base) + plan.bytes;
    plan.bytes += align_workspace(bytes);
    return address;
  };
  const auto take = [&](int64_t count) {
    return reinterpret_cast<float*>(take_bytes(count * sizeof(float)));
  };
  plan.units = reinterpret_cast<void*>(take_bytes(scan_units_workspace(args.units)));
  plan.cut = (p.order.cu_seqlens == nullptr ? p.order.length : p.order.tokens) > args.units.chunk_length;
  if (plan.cut) plan.unit_carry = take(units * size);
  if (plan.cut) plan.delta_sum = take(units * p.channels);
  args.unit_carry = plan.unit_carry;
  const int64_t walks = walkers * plan.teams;
  args.grad_A = take(walks * size);
  args.grad_D = take(walks * kGroups * p.channels);
  args.grad_dt_bias = take(walks * kGroups * args.biases * p.channels);
  args.grad_BC = take(channel_blocks(p) * p.order.tokens * 2 * p.states);
  return plan;
}

// What leaves each chunk when nothing enters it: the forward kernel's walk in its adjoint form.
template <typename T>
int make_adjoints(const SelectiveScanBackwardParams& p, const Plan& plan, CUstream_st* stream) {
  scan_forward::ForwardArgs args;
  static_cast<SelectiveScanParams&>(args.params) = p;
  args.params.u = p.grad_out;
  args.params.B = p.C;
  args.params.D = nullptr;
  const auto bytes = [](int64_t stride) { return static_cast<int32_t>(stride * sizeof(T)); };
  args.row_bytes = {.u = bytes(p.grad_out.stride), .dt = bytes(p.dt.stride), .z = bytes(p.z.stride)};
  args.row_bytes.B = args.row_bytes.C = bytes(p.C.stride);
  args.units = plan.args.units;
  args.unit_end_state = plan.unit_carry;
  args.unit_delta = plan.delta_sum;
  return scan_forward::launch_adjoint<T>(args, stream);
}

bool adjoint_supports(const SelectiveScanBackwardParams& p) {
  const int64_t widest = std::max({p.grad_out.stride, p.dt.stride, p.z.stride, p.C.stride});
  return p.states == kStates && widest * size_of(p.type) <= INT32_MAX;
}

int make_unit_carries(const SelectiveScanBackwardParams& p, const Plan& plan, CUstream_st* stream) {
  general_backward::Args args;
  args.params = p;
  args.units = plan.args.units;
  args.cut = true;
  args.unit_carry = plan.unit_carry;
  args.delta_sum = plan.delta_sum;
  if (!adjoint_supports(p)) return general_backward::launch_unit_carries(args, stream);
  const int error = p.type == ScalarType::kBFloat16 ? make_adjoints<__nv_bfloat16>(p, plan, stream)
                                                    : make_adjoints<__half>(p, plan, stream);
  return error != 0 ? error : general_backward::launch_combine(args, stream);
}

}  // namespace
}  // namespace fast_backward

bool fast_backward_supports(const SelectiveScanBackwardParams& p) {
  using namespace fast_backward;
  const int64_t tokens = p.order.tokens;
  const auto fits = [&](const auto& rows) { return is_quads(rows.data, rows.stride, tokens); };
  return (p.type == ScalarType::kBFloat16 || p.type == ScalarType::kFloat16) && p.states > 0 &&
         p.states <= kStates && p.states % kLaneStates == 0 && p.channels > 0 &&
         p.channels % kChannels == 0 && p.channels < int64_t{1} << 24 && tokens > 0 && p.softplus &&
         (p.dt_bias == nullptr || p.bias_modalities <= kMostBiases) && fits(p.u) && fits(p.dt) && fits(p.z) &&
         fits(p.B) && fits(p.C) && fits(p.grad_out) && fits(p.grad_u) && fits(p.grad_dt) && fits(p.grad_z) &&
         (p.out.data == nullptr || fits(p.out)) && is_aligned_to(p.checkpoints, sizeof(float4)) &&
         shared_memory_of_block() >= kSharedOfOne;
}

size_t fast_backward_workspace(const SelectiveScanBackwardParams& p) {
  return fast_backward::make_plan(p, nullptr).bytes;
}

int launch_fast_backward(const SelectiveScanBackwardParams& p, void* workspace, CUstream_st* stream) {
  using namespace fast_backward;
  Plan plan = make_plan(p, workspace);
  Args& args = plan.args;
  int error = build_scan_units(args.units, plan.units, stream);
  if (error == 0 && plan.cut) error = make_unit_carries(p, plan, stream);
  if (error == 0) {
    error = p.type == ScalarType::kBFloat16 ? launch_main<__nv_bfloat16>(args, plan.teams, stream)
                                            : launch_main<__half>(args, plan.teams, stream);
  }
  const int64_t walks = int64_t{args.walkers} * plan.teams;
  if (error == 0) error = launch_reduce_state_gradients(p, args.grad_BC, channel_blocks(p), stream);
  if (error != 0) return error;
  return launch_column_sums({{args.grad_A, walks, p.channels * p.states, p.grad_A},
                             {args.grad_D, walks * kGroups, p.channels, p.grad_D},
                             {args.grad_dt_bias, walks * kGroups, args.biases * p.channels, p.grad_dt_bias}},
                            stream);
}

}  // namespace mixture_of_mamba
