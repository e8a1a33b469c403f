// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mixture_of_mamba/ops/optional_tensor.h>
#include <torch/types.h>

namespace mixture_of_mamba {

/// y[rows of m] = x[rows of m] @ weight[m].T + bias[m]; padding rows are 0.
/// \param x [..., in_features], rows in sorted order.
/// \param weight one [out_features, in_features] per modality, cast to the dtype of x.
/// \param bias one [out_features] per modality, or empty.
/// \param offsets int32 [modalities + 1], see Routing.
/// \param host_offsets int64 on the CPU; with it the operator may be a loop of plain GEMMs; without, on a
/// GPU, all stays on the device. \return [..., out_features] in the dtype of x.
torch::Tensor grouped_linear(const torch::Tensor& x, at::TensorList weight, at::TensorList bias,
                             const torch::Tensor& offsets, const OptionalTensor& host_offsets = {});

}  // namespace mixture_of_mamba
