// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/common/packing.h"
#include "kernels/cuda/device_info.h"

// What the kernels for a few tokens a sequence share, as in decoding: their threads go from sequence to
// sequence.

namespace mixture_of_mamba {

constexpr int64_t kLongestStep = 4;  // tokens; a longer walk is the other kernels' work

inline bool is_step(const TokenOrder& order) {
  return order.cu_seqlens == nullptr && order.length >= 1 && order.length <= kLongestStep;
}

// Blocks over the channels, times as many over the sequences as run at once.
inline dim3 step_grid(unsigned channel_blocks, int64_t sequences, int blocks_of_processor) {
  constexpr int64_t kMostRows = 65535;
  const int64_t at_once =
      std::max<int64_t>(1, int64_t{blocks_of_processor} * multiprocessors_cuda() / channel_blocks);
  return {channel_blocks, static_cast<unsigned>(std::min({sequences, at_once, kMostRows}))};
}

}  // namespace mixture_of_mamba
