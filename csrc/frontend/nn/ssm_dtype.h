// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/ScalarType.h>

#include <optional>

namespace mixture_of_mamba::frontend {

// That of the scan's state beside activations of `dtype`: float32 (float64 for float64) unless 16 bits are
// asked.
c10::ScalarType checked_ssm_dtype(const char* argument, std::optional<c10::ScalarType> ssm_dtype,
                                  c10::ScalarType dtype);

}  // namespace mixture_of_mamba::frontend
