// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/common/scalar_type.h"

// The parts of a grouped linear layer that are not a GEMM, for callers that know the row ranges on the
// device only. Rows are [rows, columns]; modality m owns rows offsets[m] .. offsets[m + 1].

struct CUstream_st;

namespace mixture_of_mamba {

// out[row] = source[row] for the rows of one modality; other rows are set to 0, or left alone.
struct SelectRowsParams {
  ScalarType type = ScalarType::kFloat32;
  ConstRows source;
  Rows out;
  int64_t rows = 0, columns = 0;
  const int32_t* offsets = nullptr;  // [modalities + 1]
  int32_t modality = 0;
  bool zero_other_rows = false;
};
int launch_select_rows_cuda(const SelectRowsParams&, CUstream_st* stream);

// In place: y[row] += bias[modality of row] where bias is given; padding rows become 0.
struct FinishRowsParams {
  ScalarType type = ScalarType::kFloat32;
  Rows y;
  int64_t rows = 0, columns = 0;
  const int32_t* offsets = nullptr;
  int32_t modalities = 1;
  const void* bias = nullptr;  // type [modalities, columns], contiguous, or null
};
int launch_finish_rows_cuda(const FinishRowsParams&, CUstream_st* stream);

// sums[m] = sum of the rows of modality m, accumulated in fp32 in a fixed order (bias gradients).
struct SumRowsParams {
  ScalarType type = ScalarType::kFloat32;
  ConstRows source;
  int64_t rows = 0, columns = 0;
  const int32_t* offsets = nullptr;
  int32_t modalities = 1;
  float* sums = nullptr;  // [modalities, columns]
};
size_t sum_rows_workspace_cuda(const SumRowsParams&);
int launch_sum_rows_cuda(const SumRowsParams&, void* workspace, CUstream_st* stream);

}  // namespace mixture_of_mamba
