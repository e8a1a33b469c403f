// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <optional>

namespace mixture_of_mamba {

using OptionalTensor = std::optional<torch::Tensor>;

}  // namespace mixture_of_mamba
