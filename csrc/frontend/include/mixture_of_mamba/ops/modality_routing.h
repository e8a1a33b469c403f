// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <tuple>

namespace mixture_of_mamba {

/// Stable sort of tokens by modality, padding last: what routes the tokens of arXiv 2501.16295.
/// \param ids integers of any shape; 0 .. num_modalities - 1, or -1 for padding.
/// \param num_modalities 1 .. 1024.
/// \param checked refuse ids out of range; on a GPU, as with false, they are padding.
/// \return rows int32 [tokens], order int32 [tokens] (its inverse), offsets int32 [modalities + 1].
/// \throws c10::Error ids out of range (checked, on the CPU) or of another dtype, or num_modalities out of
/// range.
std::tuple<torch::Tensor, torch::Tensor, torch::Tensor> modality_routing(const torch::Tensor& ids,
                                                                         int64_t num_modalities,
                                                                         bool checked = true);

/// out[i] = x[index[i]] over the rows of x [..., channels]; the gradient is the gather by `inverse`.
/// \param x any dtype; its leading dimensions are the rows.
/// \param index, inverse int32 [rows], a permutation and its inverse.
/// \return the shape of x.
torch::Tensor permute_rows(const torch::Tensor& x, const torch::Tensor& index, const torch::Tensor& inverse);

}  // namespace mixture_of_mamba
