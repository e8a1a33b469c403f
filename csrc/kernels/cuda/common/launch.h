// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/common/scalar_type.h"

// Host helpers of the CUDA kernels.

namespace mixture_of_mamba {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many tiles of rows as there can be, when each begins and ends with its group; of padding, the last, too.
constexpr int64_t most_row_tiles(int64_t rows, int64_t groups, int64_t tile_rows) {
  return rows / tile_rows + std::min(groups, rows) + 1;
}

constexpr size_t kWorkspaceAlignment = 256;
constexpr size_t align_workspace(size_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

// Blocks for `items` of `per_block`, at most the limit of a grid's first dimension; kernels stride over the
// rest.
inline unsigned grid_blocks(int64_t items, int64_t per_block) {
  return static_cast<unsigned>(std::min<int64_t>(ceil_div(items, per_block), (int64_t{1} << 31) - 1));
}

inline bool is_aligned_to(const void* data, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

// Whether every row begins at an address of whole words.
inline bool rows_in_words(const void* data, int64_t stride, int64_t element_bytes, int64_t word_bytes) {
  return is_aligned_to(data, word_bytes) && stride * element_bytes % word_bytes == 0;
}

template <typename T>
struct TypeOf {
  using type = T;
};

// Calls function(TypeOf<T>) for the element type; the double of the CPU is cudaErrorInvalidValue.
template <typename Function>
int dispatch_type(ScalarType type, Function&& function) {
  switch (type) {
    case ScalarType::kFloat32:
      return function(TypeOf<float>());
    case ScalarType::kBFloat16:
      return function(TypeOf<__nv_bfloat16>());
    case ScalarType::kFloat16:
      return function(TypeOf<__half>());
    case ScalarType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace mixture_of_mamba
