// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/selective_scan.h"
#include "ops/common.h"

namespace mixture_of_mamba::ops {

// The scan's state that a step updates in place: in the accumulation dtype, or, where the activations have 16
// bits, in their dtype. Then it is computed in the accumulation dtype all the same, and rounded once a call.
class StepState {
 public:
  // `activation`, called `activation_name`, is what the scan walks over.
  StepState(const char* op, const char* name, const Tensor& state, std::initializer_list<int64_t> sizes,
            const char* activation_name, const Tensor& activation, Dtype acc);

  // Runs the scan from the state and writes the new one over it. Kernels that do not take 16 bits get a copy.
  // `settled`: that of the params, for the state itself.
  template <typename Backend>
  void run(const Backend& backend, SelectiveScanForwardParams& params, bool settled) const {
    const bool wide = state_.scalar_type() == acc_;
    params.narrow_state = !wide && type_ == params.type && backend.takes_narrow_state(params);
    const bool as_it_is = wide || params.narrow_state;
    params.settled_state = settled && as_it_is;
    const Tensor seen = as_it_is ? state_ : to_dtype(state_, acc_);
    params.initial_state = params.final_state = seen.mutable_data_ptr();
    backend.run(params);
    if (as_it_is) return;
    Tensor state = state_;
    torch::stable::copy_(state, seen);
  }

 private:
  Tensor state_;
  Dtype acc_;
  ScalarType type_;  // of the state
};

}  // namespace mixture_of_mamba::ops
