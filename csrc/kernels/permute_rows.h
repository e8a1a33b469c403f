// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/parallel.h"

struct CUstream_st;

namespace mixture_of_mamba {

// out[i] = x[index[i]] for rows of `row_bytes` bytes, any element type. An index outside [0, rows)
// gives a row of zeros.
struct PermuteRowsParams {
  const void* x = nullptr;
  int64_t x_stride = 0;  // bytes between rows of x
  void* out = nullptr;   // rows packed
  const int32_t* index = nullptr;
  int64_t rows = 0;
  int64_t row_bytes = 0;
};

void run_permute_rows_cpu(const PermuteRowsParams&, ParallelFor);
int launch_permute_rows_cuda(const PermuteRowsParams&, CUstream_st* stream);

}  // namespace mixture_of_mamba
