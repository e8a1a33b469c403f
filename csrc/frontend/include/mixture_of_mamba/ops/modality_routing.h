// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <tuple>

namespace mixture_of_mamba {

/// Stable sort of tokens by modality, padding last.
/// \param ids integers of any shape; 0 .. num_modalities - 1, or -1 for padding.
/// \param num_modalities 1 .. 1024.
/// \param checked refuse ids out of range; on a GPU, as with false, they are padding.
/// \return rows, order (its inverse), offsets.
std::tuple<torch::Tensor, torch::Tensor, torch::Tensor> modality_routing(const torch::Tensor& ids,
                                                                         int64_t num_modalities,
                                                                         bool checked = true);

/// out[i] = x[index[i]] over the rows of x [..., channels]; the gradient is the gather by `inverse`.
/// \param index, inverse int32 [rows], a permutation and its inverse.
torch::Tensor permute_rows(const torch::Tensor& x, const torch::Tensor& index, const torch::Tensor& inverse);

}  // namespace mixture_of_mamba
