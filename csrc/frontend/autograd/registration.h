// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/library.h>

#include <cstdint>

#include "operator_call.h"

// What the operators' registrations share: one function per dispatch key, and one per stem.

namespace mixture_of_mamba::frontend {

template <Values (*compute)(const Values&)>
void meta_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  push_results(stack, compute(pop_arguments(op, stack)));
}

// Casts all floating tensors but those of arguments in `wide` (bits by position) to the autocast dtype.
void call_in_autocast_dtype(const c10::OperatorHandle& op, torch::jit::Stack* stack, c10::DeviceType device,
                            c10::DispatchKey key, uint64_t wide);

template <c10::DeviceType device, c10::DispatchKey key, uint64_t wide>
void autocast_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  call_in_autocast_dtype(op, stack, device, key, wide);
}

[[noreturn]] void throw_no_double_backward(const char* name);

// The description of a *_backward operator: its derivative is an error; without it, it would silently be
// zero.
template <typename Op>
struct DoubleBackward {
  static constexpr size_t kDifferentiable = SIZE_MAX;
  static Values backward(const BackwardCall&) { throw_no_double_backward(Op::kBackwardName); }
};

template <typename Op>
void register_autograd(torch::Library& library, const char* name) {
  library.impl(name, torch::dispatch(c10::DispatchKey::Autograd,
                                     torch::CppFunction::makeFromBoxedFunction<&autograd_kernel<Op>>()));
}

template <Values (*compute)(const Values&)>
void register_meta(torch::Library& library, const char* name) {
  library.impl(name, torch::dispatch(c10::DispatchKey::Meta,
                                     torch::CppFunction::makeFromBoxedFunction<&meta_kernel<compute>>()));
}

template <uint64_t wide = 0>
void register_autocast(torch::Library& library, const char* name) {
  using c10::DispatchKey;
  library.impl(name, torch::dispatch(DispatchKey::AutocastCPU,
                                     torch::CppFunction::makeFromBoxedFunction<
                                         &autocast_kernel<at::kCPU, DispatchKey::AutocastCPU, wide>>()));
  library.impl(name, torch::dispatch(DispatchKey::AutocastCUDA,
                                     torch::CppFunction::makeFromBoxedFunction<
                                         &autocast_kernel<at::kCUDA, DispatchKey::AutocastCUDA, wide>>()));
}

// Everything for an operator with a gradient of its own and a *_backward operator.
template <typename Op>
void register_differentiable(torch::Library& library) {
  register_autograd<Op>(library, Op::kName);
  register_autograd<DoubleBackward<Op>>(library, Op::kBackwardName);
  register_meta<&Op::meta>(library, Op::kName);
  register_meta<&Op::backward_meta>(library, Op::kBackwardName);
}

// One per stem.
void register_modality_routing(torch::Library& library);
void register_grouped_linear(torch::Library& library);
void register_causal_conv1d(torch::Library& library);
void register_selective_scan(torch::Library& library);
void register_mamba_block(torch::Library& library);

}  // namespace mixture_of_mamba::frontend
