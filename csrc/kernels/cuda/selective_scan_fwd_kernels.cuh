// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/common/chained.cuh"
#include "kernels/cuda/selective_scan_fwd_elements.cuh"
#include "kernels/cuda/selective_scan_fwd_recurrence.cuh"

// The kernel, its launch, and the variants that are compiled for each element type.

namespace mixture_of_mamba::scan_forward {

template <typename K>
__global__ void __launch_bounds__(kThreads, K::kMinBlocks)
    scan_kernel(const __grid_constant__ ForwardArgs args) {
  extern __shared__ __align__(64) float memory[];
  let_next_begin();
  const SelectiveScanForwardParams& p = args.params;
  const int unit_index = blockIdx.x / args.channel_blocks;
  const int64_t block_channel = static_cast<int64_t>(blockIdx.x % args.channel_blocks) * K::kChannels;
  ScanUnit unit;
  if (!get_unit(args.units, unit_index, &unit)) return wait_for_previous();
  // Nobody needs the end state of the chunk that is walked last.
  if (K::kPrepass && unit.chunk == (K::kAdjoint ? 0 : unit.chunks - 1)) return;

  const int staged = staged_modalities(p);
  const Shared<K> shared(memory, staged);
  for (int i = threadIdx.x; i < staged * K::kChannels; i += kThreads) {
    const int64_t channel = block_channel + i % K::kChannels;
    const int64_t row = i / K::kChannels * p.channels;
    const bool exists = p.dt_bias != nullptr && channel < p.channels;
    shared.bias[i] = exists ? static_cast<const float*>(p.dt_bias)[row + channel] * kLog2E : 0.0f;
  }
  if (threadIdx.x < staged && p.order.offsets != nullptr) {
    shared.boundaries[threadIdx.x] = p.order.offsets[threadIdx.x];
  }
  for (int i = threadIdx.x; i < K::kChannels; i += kThreads) {
    const bool has_skip = p.D != nullptr && block_channel + i < p.channels;
    shared.skip[i] = has_skip ? static_cast<const float*>(p.D)[block_channel + i] : 0.0f;
  }
  __syncthreads();
  const int tiles = (unit.length + kTile - 1) / kTile;
  if (threadIdx.x < kRecurrenceWarps * kWarp) {
    Recurrence<K>(args, unit, unit_index, shared, block_channel).run(tiles);
  } else {
    ElementWise<K>(args, unit, shared, block_channel, staged).run(tiles);
  }
}

template <typename K>
int launch(const ForwardArgs& base, CUstream_st* stream) {
  ForwardArgs args = base;
  args.channel_blocks = static_cast<int32_t>((args.params.channels + K::kChannels - 1) / K::kChannels);
  const int64_t blocks = static_cast<int64_t>(args.channel_blocks) * args.units.max_units;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int bytes = K::shared_bytes(staged_modalities(args.params));
  const cudaError_t error =
      cudaFuncSetAttribute(scan_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(blocks));
  // After the passes over chunks, where some multiprocessors hold as many blocks as they can in any case:
  // fewer would lie unevenly. A second launch, for more states, reads what the first one writes.
  const int64_t processors = multiprocessors_cuda();
  const bool even = blocks <= K::kMinBlocks * processors && blocks > (K::kMinBlocks - 1) * processors;
  if (args.unit_state != nullptr && args.first_launch && even) {
    return launch_chained({grid, kThreads, static_cast<size_t>(bytes), stream}, scan_kernel<K>, args);
  }
  scan_kernel<K><<<grid, kThreads, bytes, stream>>>(args);
  return cudaGetLastError();
}

// Chosen where they were measured:
//   16 states, 64 channels a block, 2 blocks an SM, one exponential of eight on the FMA pipe: enough blocks
//     for 2 on every SM (4 x 4096 tokens x 4096 channels)
//   the same with 3 blocks an SM and no polynomial: enough blocks for 3 (8 x 2048)
//   32 channels a block: fewer; also the pre-pass, which has no output to share the block with
//   32, 64, 128 states: more lanes a channel, so fewer channels a block
//   8 states: two lanes a channel, one channel a lane: 64 channels a block in half of the registers
template <typename T>
int launch_main(const ForwardArgs& args, Tile tile, int group, Access access, CUstream_st* stream) {
  constexpr Access kAny = Access::kAny, kAligned = Access::kAligned, kPlain = Access::kPlain;
  constexpr Pass kMain = Pass::kMain;
  if (group == 4 && access == kPlain) {
    switch (tile) {
      case Tile::kWide:
        return launch<Config<T, 4, 2, 2, 1, kPlain, kMain>>(args, stream);
      case Tile::kWideThree:
        return launch<Config<T, 4, 2, 3, 0, kPlain, kMain>>(args, stream);
      case Tile::kNarrow:
        return launch<Config<T, 4, 1, 2, 0, kPlain, kMain>>(args, stream);
    }
  }
  if (group == 4 && access == kAligned) {
    return tile == Tile::kNarrow ? launch<Config<T, 4, 1, 2, 0, kAligned, kMain>>(args, stream)
                                 : launch<Config<T, 4, 2, 2, 1, kAligned, kMain>>(args, stream);
  }
  if (group == 4) return launch<Config<T, 4, 1, 3, 0, kAny, kMain>>(args, stream);
  if (group == 2) {
    return access == kPlain ? launch<Config<T, 2, 1, 3, 0, kPlain, kMain>>(args, stream)
                            : launch<Config<T, 2, 1, 3, 0, kAny, kMain>>(args, stream);
  }
  if (group == 8) {
    return access == kAny ? launch<Config<T, 8, 2, 2, 0, kAny, kMain>>(args, stream)
                          : launch<Config<T, 8, 2, 2, 0, kAligned, kMain>>(args, stream);
  }
  if (group == 16) {
    return access == kAny ? launch<Config<T, 16, 2, 2, 0, kAny, kMain>>(args, stream)
                          : launch<Config<T, 16, 2, 2, 0, kAligned, kMain>>(args, stream);
  }
  return access == kAny ? launch<Config<T, 32, 4, 2, 0, kAny, kMain>>(args, stream)
                        : launch<Config<T, 32, 4, 2, 0, kAligned, kMain>>(args, stream);
}

template <typename T>
int launch_prepass(const ForwardArgs& args, int group, Access access, CUstream_st* stream) {
  constexpr Access kAny = Access::kAny;
  constexpr Pass kPrepass = Pass::kPrepass;
  if (group == 4) {
    return access == Access::kPlain ? launch<Config<T, 4, 1, 4, 1, Access::kPlain, kPrepass>>(args, stream)
                                    : launch<Config<T, 4, 1, 4, 1, kAny, kPrepass>>(args, stream);
  }
  if (group == 2) return launch<Config<T, 2, 1, 4, 0, kAny, kPrepass>>(args, stream);
  if (group == 8) return launch<Config<T, 8, 2, 2, 0, kAny, kPrepass>>(args, stream);
  if (group == 16) return launch<Config<T, 16, 2, 2, 0, kAny, kPrepass>>(args, stream);
  return launch<Config<T, 32, 4, 2, 0, kAny, kPrepass>>(args, stream);
}

template <typename T>
int launch_adjoint(const ForwardArgs& args, CUstream_st* stream) {
  return launch<Config<T, 4, 1, 4, 1, Access::kPlain, Pass::kAdjoint>>(args, stream);
}

}  // namespace mixture_of_mamba::scan_forward
