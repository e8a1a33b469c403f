// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/matrix_view.h"

namespace mixture_of_mamba::ops {

// out = left @ right, or out += it, by one call of the cuBLAS that torch has loaded, with torch's handle for
// the current stream. Torch's own product takes the host several times as long. Serves 16-bit matrices,
// whose partial sums stay in float32 whatever torch.backends.cuda.matmul allows. False, and nothing is done,
// where it does not serve.
bool multiply_by_cublas(const Factor& left, const Factor& right, const Factor& out, bool add);

}  // namespace mixture_of_mamba::ops
