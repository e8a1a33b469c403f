// SPDX-License-Identifier: Apache-2.0
//
// Selective scan, backward, general path: any states, strides, alignment and element type.
// Per sequence and channel, tokens in walk order; g, h, q have `states` entries:
//
//   a_t  = exp(delta_t * A)         h_t = a_t * h_{t-1} + delta_t * u_t * B_t
//   dy_t = grad_out_t * silu(z_t)   g_t = C_t * dy_t + a_{t+1} * g_{t+1}, from grad_final_state on
//   q_t  = g_t * a_t * h_{t-1}      never h_t - delta_t * u_t * B_t for a_t * h_{t-1}: that cancels
//
//   grad_B  += delta u g  and  grad_C += dy h        summed over channels
//   grad_A  += delta q,   grad_D += dy u             summed over tokens
//   grad_u   = delta sum(g B) + D dy
//   grad_dt  = (u sum(g B) + sum(q A)) * sigmoid(dt + dt_bias)
//   grad_z   = grad_out silu'(z) (sum(C h) + D u)
//
// Two recurrences, h forward and g backward. A checkpoint gives h before every tile of 16 tokens, so
// tiles are walked last to first; inside a tile, h before every fourth token goes to shared memory,
// then the four tokens of a group are rebuilt into registers and swept backward, all in fp32.
//
// Grid    (channels / 64, walkers). A walker takes units walker, walker + walkers, ...; a unit is a
//         sequence, or a chunk of one whose incoming g the carry kernels have made beforehand.
// Block   128 threads, 64 channels. Element-wise phases: a thread owns one channel and 8 of the 16
//         tokens. Sweeps: a lane owns 2 channels x 4 states, a warp 16 channels x 16 states. More
//         states are taken 16 at a time; then g and grad_A rest in global memory between tiles.
// Sums    over states: two shuffles. Over channels: the lanes' products meet in shared memory, then
//         the warps', then the blocks' in launch_reduce_state_gradients(). Over tokens: registers,
//         then launch_column_sums(). Every order is fixed.
// Cost    per (token, channel), 16 states: 650 issue slots, of which 33 exponentials; memory
//         is 7 elements + 4 bytes of checkpoint + 4 of partials. Issue slots bind.
// Barriers  two a tile and state block: inputs in shared memory | sums in shared memory.

#include <algorithm>

#include "kernels/cuda/common/chained.cuh"
#include "kernels/cuda/device_info.h"
#include "kernels/cuda/selective_scan_bwd.h"
#include "kernels/cuda/selective_scan_bwd_general_sweep.cuh"

namespace mixture_of_mamba {
namespace general_backward {
namespace {

constexpr int kStaged = kTokens * 2 * kStates / kThreads;  // elements of B and C that a thread stages
constexpr int64_t kResident = 2;                           // blocks of a multiprocessor at once
constexpr int64_t kShortestChunk = 4 * kTokens;
constexpr int64_t kRounds = 8;  // walkers are so many that blocks of uneven work even out
constexpr size_t kAlignment = 256;

// The element-wise part: a thread owns one channel and kItems tokens.
template <typename T>
struct ElementWise {
  const Args& args;
  Shared& shared;
  const int tile_channel = threadIdx.x % kChannels;
  const int token_half = threadIdx.x / kChannels;
  const int64_t channel = int64_t(blockIdx.x) * kChannels + tile_channel;
  const bool has_channel = channel < args.params.channels;
  T u[kItems], dt[kItems], z[kItems], grad_out[kItems], staged[kStaged];
  float bias[kItems];
  float skip = 0.0f, grad_D = 0.0f;
  float* grad_bias = nullptr;  // this thread's sums per modality: in shared memory, or already in args
  int64_t grad_bias_stride = 0;

  __device__ ElementWise(const Args& a, Shared& s, float* shared_bias) : args(a), shared(s) {
    const SelectiveScanBackwardParams& p = args.params;
    if (!has_channel) return;
    if (p.D != nullptr) skip = static_cast<const float*>(p.D)[channel];
    if (p.grad_dt_bias == nullptr) return;
    const bool fits = p.bias_modalities <= kSharedModalities;
    grad_bias =
        fits ? shared_bias + token_half * p.bias_modalities * kChannels + tile_channel : bias_partial();
    grad_bias_stride = fits ? kChannels : p.channels;
    for (int m = 0; m < p.bias_modalities; ++m) grad_bias[m * grad_bias_stride] = 0.0f;
  }

  __device__ int64_t walk_half() const { return int64_t(blockIdx.y) * kTokenHalves + token_half; }
  __device__ float* bias_partial() const {
    return args.grad_dt_bias + walk_half() * args.params.bias_modalities * args.params.channels + channel;
  }

  __device__ void load_inputs(const TileTokens& tokens) {
    const SelectiveScanBackwardParams& p = args.params;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int32_t row = tokens.row[token_half * kItems + j];
      const int32_t modality = tokens.modality[token_half * kItems + j];
      const bool wanted = has_channel && modality >= 0;
      bias[j] = load_bias(p, modality, channel, wanted);
      u[j] = load_element<T>(p.u, row, channel, wanted);
      dt[j] = load_element<T>(p.dt, row, channel, wanted);
      z[j] = load_element<T>(p.z, row, channel, wanted && p.z.data != nullptr);
      grad_out[j] = load_element<T>(p.grad_out, row, channel, wanted);
    }
  }

  __device__ void load_state_inputs(const TileTokens& tokens, int block) {
    const SelectiveScanBackwardParams& p = args.params;
#pragma unroll
    for (int k = 0; k < kStaged; ++k) {
      const int item = threadIdx.x + k * kThreads, t = item / (2 * kStates), column = item % (2 * kStates);
      const int64_t state = block * kStates + column % kStates;
      staged[k] = load_element<T>(column < kStates ? p.B : p.C, tokens.row[t], state,
                                  tokens.modality[t] >= 0 && state < p.states);
    }
  }

  __device__ void stage_state_inputs() {
#pragma unroll
    for (int k = 0; k < kStaged; ++k) (&shared.BC[0][0])[threadIdx.x + k * kThreads] = to_float(staged[k]);
  }

  __device__ void element_wise_in(const TileTokens& tokens) {
    const SelectiveScanBackwardParams& p = args.params;
#pragma unroll
    for (int k = 0; k < kItems / kGroup; ++k) {
      float delta[kGroup], input[kGroup], grad_y[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int j = k * kGroup + i;
        const bool active = has_channel && tokens.modality[token_half * kItems + j] >= 0;
        const float x = to_float(dt[j]) + bias[j];
        const Softplus step = p.softplus ? softplus_fast(x) : Softplus{x, 1.0f};
        delta[i] = active ? step.value : 0.0f;
        shared.slope[j][threadIdx.x] = step.slope;
        const float ut = to_float(u[j]), gate = to_float(z[j]), grad = to_float(grad_out[j]);
        const float open = sigmoid_fast(gate), gated = gate * open;
        const bool has_gate = p.z.data != nullptr;
        grad_y[i] = has_gate ? grad * gated : grad;
        shared.gate[j][threadIdx.x] = gated;
        shared.grad_gate[j][threadIdx.x] = grad * fmaf(gated, 1.0f - open, open);
        shared.u[j][threadIdx.x] = ut;
        input[i] = delta[i] * ut;
        grad_D = fmaf(grad_y[i], ut, grad_D);
      }
      const int group = token_half * (kItems / kGroup) + k;
      shared.delta.at(group, tile_channel) = make_float4(delta[0], delta[1], delta[2], delta[3]);
      shared.input.at(group, tile_channel) = make_float4(input[0], input[1], input[2], input[3]);
      shared.grad_y.at(group, tile_channel) = make_float4(grad_y[0], grad_y[1], grad_y[2], grad_y[3]);
    }
  }

  __device__ void element_wise_out(const TileTokens& tokens) {
    const SelectiveScanBackwardParams& p = args.params;
#pragma unroll
    for (int k = 0; k < kItems / kGroup; ++k) {
      const int group = token_half * (kItems / kGroup) + k;
      float delta[kGroup], grad_y[kGroup], y[kGroup], grad_input[kGroup], grad_rate[kGroup];
      unpack(shared.delta.at(group, tile_channel), delta);
      unpack(shared.grad_y.at(group, tile_channel), grad_y);
      unpack(shared.y.at(group, tile_channel), y);
      unpack(shared.grad_input.at(group, tile_channel), grad_input);
      unpack(shared.grad_rate.at(group, tile_channel), grad_rate);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int j = k * kGroup + i;
        const int32_t row = tokens.row[token_half * kItems + j];
        const int32_t modality = tokens.modality[token_half * kItems + j];
        if (row < 0 || !has_channel) continue;
        const bool active = modality >= 0;
        const float ut = shared.u[j][threadIdx.x];
        const float grad_delta = fmaf(grad_input[i], ut, grad_rate[i] * kLn2);
        const float grad_dt = active ? grad_delta * shared.slope[j][threadIdx.x] : 0.0f;
        store_element<T>(p.grad_u, row, channel,
                         active ? fmaf(grad_input[i], delta[i], skip * grad_y[i]) : 0.0f);
        store_element<T>(p.grad_dt, row, channel, grad_dt);
        const float yt = active ? fmaf(skip, ut, y[i]) : 0.0f;
        store_element<T>(p.grad_z, row, channel, shared.grad_gate[j][threadIdx.x] * yt);
        store_element<T>(p.out, row, channel, shared.gate[j][threadIdx.x] * yt);
        if (grad_bias != nullptr && active) {
          grad_bias[(p.bias_modalities == 1 ? 0 : modality) * grad_bias_stride] += grad_dt;
        }
      }
    }
  }

  __device__ void store_state_gradients(const TileTokens& tokens, int block) {
    const int64_t states = args.params.states;
#pragma unroll
    for (int k = 0; k < kStaged; ++k) {
      const int item = threadIdx.x + k * kThreads, t = item / (2 * kStates), column = item % (2 * kStates);
      const int64_t state = block * kStates + column % kStates;
      if (tokens.modality[t] < 0 || state >= states) continue;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += shared.warp_sums[w][t][column];
      const int64_t row = blockIdx.x * args.params.order.tokens + tokens.row[t];
      args.grad_BC[row * 2 * states + (column < kStates ? 0 : states) + state] = sum;
    }
  }

  __device__ void finish() {
    const SelectiveScanBackwardParams& p = args.params;
    if (!has_channel) return;
    if (p.grad_D != nullptr) args.grad_D[walk_half() * p.channels + channel] = grad_D;
    if (grad_bias == nullptr || grad_bias == bias_partial()) return;
    for (int m = 0; m < p.bias_modalities; ++m) bias_partial()[m * p.channels] = grad_bias[m * kChannels];
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kResident) backward_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(16) unsigned char memory[];
  let_next_begin();
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  ElementWise<T> elements(args, shared, reinterpret_cast<float*>(memory + sizeof(Shared)));
  Sweep sweep(args, shared);
  const int blocks = state_blocks(args.params);

  ScanUnit unit;
  for (int index = blockIdx.y; get_unit(args.units, index, &unit); index += args.walkers) {
    sweep.begin_unit(unit, index);
    int tile = (unit.length + kTokens - 1) / kTokens - 1;
    __syncthreads();
    if (threadIdx.x < kTokens) {
      put_token(args, find_row(args, unit, tile * kTokens + threadIdx.x), shared.tokens[tile & 1],
                threadIdx.x);
    }
    __syncthreads();
    if (tile >= 0) {
      elements.load_inputs(shared.tokens[tile & 1]);
      elements.load_state_inputs(shared.tokens[tile & 1], 0);
      sweep.load_checkpoint(unit.slot + tile, 0);
    }
    for (; tile >= 0; --tile) {
      const TileTokens& tokens = shared.tokens[tile & 1];
      TileTokens& next_tokens = shared.tokens[(tile & 1) ^ 1];
      int32_t next_row = -1;
      if (threadIdx.x < kTokens) next_row = find_row(args, unit, (tile - 1) * kTokens + threadIdx.x);
      elements.element_wise_in(tokens);
      for (int block = 0; block < blocks; ++block) {
        elements.stage_state_inputs();
        __syncthreads();
        if (blocks > 1) sweep.open_block(block);
        sweep.run(block == 0);
        if (blocks > 1) sweep.close_block(block);
        if (block == 0 && threadIdx.x < kTokens) put_token(args, next_row, next_tokens, threadIdx.x);
        if (block + 1 < blocks) {
          elements.load_state_inputs(tokens, block + 1);
          sweep.load_checkpoint(unit.slot + tile, block + 1);
        }
        __syncthreads();
        elements.store_state_gradients(tokens, block);
      }
      if (tile > 0) {
        elements.load_inputs(next_tokens);
        elements.load_state_inputs(next_tokens, 0);
        sweep.load_checkpoint(unit.slot + tile - 1, 0);
      }
      elements.element_wise_out(tokens);
    }
    sweep.end_unit(unit);
  }
  elements.finish();
  sweep.finish();
}

int64_t channel_blocks(const SelectiveScanBackwardParams& p) {
  return (p.channels + kChannels - 1) / kChannels;
}

int64_t resident_blocks() { return kResident * std::max(multiprocessors_cuda(), 1); }

// Whole sequences where equal ones fill the device; else chunks that are two rounds of blocks. Packed
// sequences may be of any length, so long ones are always cut.
int64_t chunk_length(const SelectiveScanBackwardParams& p) {
  const TokenOrder& order = p.order;
  if (order.cu_seqlens == nullptr && order.sequences * channel_blocks(p) * 4 >= resident_blocks() * 3) {
    return order.length;
  }
  return std::max(order.tokens * channel_blocks(p) / (2 * resident_blocks()), kShortestChunk);
}

struct Plan {
  Args args;
  void* units = nullptr;  // workspace of the unit table
  size_t bytes = 0;
};

// Workspace pointers are counted from `base`.
Plan make_plan(const SelectiveScanBackwardParams& p, void* base) {
  Plan plan;
  Args& args = plan.args;
  args.params = p;
  args.units = plan_scan_units(p.order, p.reverse, chunk_length(p));
  const int64_t units = args.units.max_units, size = p.channels * p.states;
  const int64_t most_walkers = kRounds * resident_blocks() / std::max<int64_t>(channel_blocks(p), 1);
  const int64_t walkers = std::min(units, std::max<int64_t>(most_walkers, 1));
  args.walkers = static_cast<int32_t>(walkers);

  const auto take_bytes = [&](size_t bytes) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(base) + plan.bytes;
    plan.bytes += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return address;
  };
  const auto take = [&](int64_t count) {
    return reinterpret_cast<float*>(take_bytes(count * sizeof(float)));
  };
  plan.units = reinterpret_cast<void*>(take_bytes(scan_units_workspace(args.units)));
  args.cut = (p.order.cu_seqlens == nullptr ? p.order.length : p.order.tokens) > args.units.chunk_length;
  if (args.cut) args.unit_carry = take(units * size);
  if (args.cut) args.delta_sum = take(units * p.channels);
  if (p.states > kStates) args.walk_carry = take(walkers * size);
  args.grad_A = take(walkers * size);
  if (p.grad_D != nullptr) args.grad_D = take(walkers * kTokenHalves * p.channels);
  if (p.grad_dt_bias != nullptr) {
    args.grad_dt_bias = take(walkers * kTokenHalves * p.bias_modalities * p.channels);
  }
  args.grad_BC = take(channel_blocks(p) * p.order.tokens * 2 * p.states);
  return plan;
}

template <typename T>
int launch_typed(const Args& args, cudaStream_t stream) {
  const SelectiveScanBackwardParams& p = args.params;
  const bool shares = p.grad_dt_bias != nullptr && p.bias_modalities <= kSharedModalities;
  const size_t bias_bytes = shares ? kTokenHalves * p.bias_modalities * kChannels * sizeof(float) : 0;
  const int bytes = static_cast<int>(sizeof(Shared) + bias_bytes);
  const auto kernel = backward_kernel<T>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      error != cudaSuccess) {
    return error;
  }
  const dim3 grid(static_cast<unsigned>(channel_blocks(p)), args.walkers);
  kernel<<<grid, kThreads, bytes, stream>>>(args);
  return cudaGetLastError();
}

int launch_main(const Args& args, cudaStream_t stream) {
  switch (args.params.type) {
    case ScalarType::kFloat32:
      return launch_typed<float>(args, stream);
    case ScalarType::kBFloat16:
      return launch_typed<__nv_bfloat16>(args, stream);
    case ScalarType::kFloat16:
      return launch_typed<__half>(args, stream);
    case ScalarType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace general_backward

size_t general_backward_workspace(const SelectiveScanBackwardParams& p) {
  return general_backward::make_plan(p, nullptr).bytes;
}

int launch_general_backward(const SelectiveScanBackwardParams& p, void* workspace, CUstream_st* stream) {
  using namespace general_backward;
  Plan plan = make_plan(p, workspace);
  Args& args = plan.args;
  const bool has_work = p.channels > 0 && args.walkers > 0;
  if (has_work) {
    int error = build_scan_units(args.units, plan.units, stream);
    if (error == 0 && args.cut) error = launch_unit_carries(args, stream);
    if (error == 0) error = launch_main(args, stream);
    if (error != 0) return error;
  }
  const int64_t walkers = has_work ? args.walkers : 0, halves = walkers * kTokenHalves;
  const int error = launch_reduce_state_gradients(p, args.grad_BC, has_work ? channel_blocks(p) : 0, stream);
  if (error != 0) return error;
  return launch_column_sums({{args.grad_A, walkers, p.channels * p.states, p.grad_A},
                             {args.grad_D, halves, p.channels, p.grad_D},
                             {args.grad_dt_bias, halves, p.bias_modalities * p.channels, p.grad_dt_bias}},
                            stream);
}

}  // namespace mixture_of_mamba
