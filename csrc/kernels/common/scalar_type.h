// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace mixture_of_mamba {

// Element types of activations. Parameters and states are float, or double beside kFloat64.
enum class ScalarType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

constexpr int64_t size_of(ScalarType type) {
  return type == ScalarType::kFloat64 ? 8 : type == ScalarType::kFloat32 ? 4 : 2;
}

// A matrix whose rows may lie apart: element (row, column) is data[row * stride + column].
struct ConstRows {
  const void* data = nullptr;  // null: absent
  int64_t stride = 0;          // elements between rows
};

struct Rows {
  void* data = nullptr;  // null: not wanted
  int64_t stride = 0;
};

}  // namespace mixture_of_mamba
