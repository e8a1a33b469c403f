// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <initializer_list>

#include "kernels/selective_scan.h"

// What the files of the scan's backward share. selective_scan_bwd.cu asks fast_backward_supports()
// and hands every other call to the general path. Both paths leave fp32 partial sums in their
// workspace, which the second passes add in a fixed order: no float atomics, so two runs are equal
// bit by bit.
//
// All int results are cudaError_t; nothing here waits for the device. Workspaces are 256-byte aligned.

namespace mixture_of_mamba {

// The fast path: bf16 or fp16, 16 states, channels and pointers aligned for vector loads.
// Looks at sizes, strides, pointers and the device, never at device memory.
bool fast_backward_supports(const SelectiveScanBackwardParams&);
size_t fast_backward_workspace(const SelectiveScanBackwardParams&);
int launch_fast_backward(const SelectiveScanBackwardParams&, void* workspace, CUstream_st* stream);

// The general path: the whole contract of selective_scan.h except kFloat64.
size_t general_backward_workspace(const SelectiveScanBackwardParams&);
int launch_general_backward(const SelectiveScanBackwardParams&, void* workspace, CUstream_st* stream);

// grad_B and grad_C from per-block partials, which lie by row, not by time:
// partials [blocks, tokens, 2 * states], one token's grad_B first, then its grad_C. 16-byte aligned.
// Partials of padding rows are never read (their gradients are 0), so they may stay unwritten.
// Absent outputs are skipped.
int launch_reduce_state_gradients(const SelectiveScanBackwardParams&, const float* partials, int64_t blocks,
                                  CUstream_st* stream);

// out[i] = sum over k of partials[k * size + i], k = 0 .. count - 1. count == 0 writes zeros.
// out == nullptr or size == 0: nothing to do.
struct ColumnSums {
  const float* partials = nullptr;
  int64_t count = 0, size = 0;
  void* out = nullptr;  // float
};
// All in one launch; at most 3.
int launch_column_sums(std::initializer_list<ColumnSums>, CUstream_st* stream);

}  // namespace mixture_of_mamba
