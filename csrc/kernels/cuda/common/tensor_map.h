// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/common/scalar_type.h"

// Maps by which the copy engine finds the tiles of a matrix.

namespace mixture_of_mamba {

// The driver's function, or null. It is found at run time, so that nothing links the driver.
inline auto tensor_map_encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found)
                                                                         : nullptr;
  }();
  return function;
}

// Of a matrix in 16 bits with contiguous columns; the engine wants rows that do not overlap.
inline bool tensor_map_serves(int64_t rows, int64_t columns, int64_t stride) {
  return rows == 1 || stride >= columns;
}

// Tiles of `tile_rows` rows and a span of 128 bytes, swizzled.
inline bool make_tensor_map(CUtensorMap& map, ScalarType type, ConstRows matrix, int64_t rows,
                            int64_t columns, int tile_rows) {
  constexpr int kSpan = 64;  // elements
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(rows > 1 ? matrix.stride : columns) * size_of(type)};
  const cuuint32_t tile[] = {kSpan, static_cast<cuuint32_t>(tile_rows)}, steps[] = {1, 1};
  const auto element =
      type == ScalarType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return tensor_map_encoder()(&map, element, 2, const_cast<void*>(matrix.data), sizes, strides, tile, steps,
                              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace mixture_of_mamba
