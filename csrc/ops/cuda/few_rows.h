// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/products.h"

namespace mixture_of_mamba::ops {

// out = input @ weight[m].T + bias[m] of all modalities in one launch, padding rows 0, where
// kernels/few_rows.h serves; false where it does not, and nothing is done. Boundaries are on the host, or,
// when those are empty, in `offsets`, int32 on the device.
bool run_few_rows(const MatrixView& input, const MatrixView& out, const Tensors& weight, const Tensors& bias,
                  const Boundaries& boundaries, const OptionalTensor& offsets, Settled settled);

}  // namespace mixture_of_mamba::ops
