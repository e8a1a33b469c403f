// SPDX-License-Identifier: Apache-2.0
#include "mixture_of_mamba/nn/state.h"

#include "ssm_dtype.h"
#include "text.h"

namespace mixture_of_mamba {

namespace frontend {

c10::ScalarType checked_ssm_dtype(const char* argument, std::optional<c10::ScalarType> ssm_dtype,
                                  c10::ScalarType dtype) {
  const c10::ScalarType wide = dtype == c10::kDouble ? c10::kDouble : c10::kFloat;
  const bool narrow = c10::elementSize(dtype) == 2;
  require_value(!ssm_dtype || *ssm_dtype == wide || (narrow && *ssm_dtype == dtype),
                "{} must be {}{} beside activations of {}, got {}", argument, name_of(wide),
                narrow ? " or " + name_of(dtype) : "", name_of(dtype), ssm_dtype ? name_of(*ssm_dtype) : "");
  return ssm_dtype.value_or(wide);
}

}  // namespace frontend

nn::MambaState nn::MambaState::to(torch::Dtype ssm_dtype) const {
  return {conv, ssm.to(frontend::checked_ssm_dtype("ssm_dtype", ssm_dtype, conv.scalar_type()))};
}

}  // namespace mixture_of_mamba
