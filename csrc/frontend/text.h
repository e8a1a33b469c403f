// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/types.h>

#include <string>
#include <utility>

// Messages of the frontend, worded as Python's. fmt stays out of the public headers.

namespace mixture_of_mamba::frontend {

inline std::string shape_of(const torch::Tensor& tensor) {
  return fmt::format("[{}]", fmt::join(tensor.sizes().begin(), tensor.sizes().end(), ", "));
}

// As Python writes a float.
inline std::string text_of(double value) {
  const std::string text = fmt::format("{}", value);
  return text.find_first_not_of("-0123456789") == std::string::npos ? text + ".0" : text;
}

inline std::string name_of(torch::Dtype dtype) {
  return "torch." + std::string(c10::getDtypeNames(dtype).first);
}
inline std::string dtype_of(const torch::Tensor& tensor) { return name_of(tensor.scalar_type()); }

// Python's ValueError.
template <typename... Arguments>
void require_value(bool ok, fmt::format_string<Arguments...> text, Arguments&&... arguments) {
  TORCH_CHECK_VALUE(ok, fmt::format(text, std::forward<Arguments>(arguments)...));
}

}  // namespace mixture_of_mamba::frontend
