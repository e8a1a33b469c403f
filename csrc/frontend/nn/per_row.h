// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/ATen.h>

#include "intervals.h"
#include "mixture_of_mamba/ops/optional_tensor.h"
#include "mixture_of_mamba/routing.h"

// A parameter per modality, spread over the rows of a batch: for what no operator takes per modality.

namespace mixture_of_mamba::frontend {

// [modalities, channels] -> [tokens, channels], rows in sorted order. Padding takes the last modality's; the
// scan passes over it and sends back zeros.
inline at::Tensor of_rows(const at::Tensor& parameter, const Routing& routing) {
  const at::Tensor rows = at::arange(routing.num_tokens(), routing.offsets.options());
  return at::embedding(parameter, interval_of(rows, routing.offsets));
}

// x [batch, length, channels] with its bias, [channels] or [modalities, channels], in float32 at least.
inline at::Tensor with_bias(const at::Tensor& x, const OptionalTensor& bias,
                            const std::optional<Routing>& routing) {
  const at::Tensor wide = x.to(at::promote_types(x.scalar_type(), at::kFloat));
  if (!bias) return wide;
  const at::Tensor values = bias->to(wide.scalar_type());
  return wide + (values.dim() > 1 ? of_rows(values, *routing).view(wide.sizes()) : values);
}

}  // namespace mixture_of_mamba::frontend
