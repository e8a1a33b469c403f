// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/scalar_type.h"

// Products of groups of rows, with a matrix for each: all groups in one launch, their boundaries on the host
// or on the device.

struct CUstream_st;

namespace mixture_of_mamba {

// A group g owns the rows begin[g] .. begin[g + 1]; x is left, [rows, left_columns], y is right, [rows,
// right_columns]. In a 16-bit type with sums in float32, in an order that depends on the sizes and the device
// alone.
//   kRight    y[r] = W[g] x[r] + bias[g]; rows behind the last group become 0. With `add`, y[r] += W[g] x[r]
//   kMatrix   W[g] = sum over rows of g: y[r] x[r]^T; 0 where there are none
struct GroupedGemmParams {
  enum class Result : int32_t { kRight, kMatrix };
  static constexpr int kMostGroups = 16;
  ScalarType type = ScalarType::kBFloat16;
  Result result = Result::kRight;
  int32_t rows = 0, groups = 1;
  int32_t left_columns = 0, right_columns = 0;
  const int32_t* offsets = nullptr;  // [groups + 1] on the device, in place of `begin`; clamped
  int32_t begin[kMostGroups + 1] = {};
  ConstRows left;
  Rows right;                      // read only for kMatrix
  void* matrix[kMostGroups] = {};  // [right_columns, left_columns]; read only for kRight
  int64_t matrix_stride[kMostGroups] = {};
  bool transposed = false;             // kRight: matrices lie as [left_columns, right_columns]
  const void* bias[kMostGroups] = {};  // kRight: [right_columns], or null
  bool add = false;                    // kRight
};

// Whether the device, types, sizes and addresses allow it.
bool grouped_gemm_supports(const GroupedGemmParams&);
int launch_grouped_gemm_cuda(const GroupedGemmParams&, CUstream_st* stream);

}  // namespace mixture_of_mamba
