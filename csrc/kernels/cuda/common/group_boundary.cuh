// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace mixture_of_mamba {

// The first row of a group, or behind the last one of padding, where the host or the device knows. What the
// device says is clamped.
template <typename Params>
__device__ __forceinline__ int32_t boundary_of(const Params& p, int group) {
  return p.offsets != nullptr ? min(max(p.offsets[group], 0), p.rows) : p.begin[group];
}

}  // namespace mixture_of_mamba
