// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

// What the operators' registrations share. The operators come from the stable ABI and are boxed anyway, so
// autograd, meta and autocast are written on boxed calls too: an operator's values are a row of IValues, by
// position in its schema, and what differs between operators is a handful of lines each.

namespace mixture_of_mamba::frontend {

using torch::autograd::variable_list;
// Tokens between the states that a scan keeps for backward (kCheckpointInterval in the kernels).
constexpr int64_t kCheckpointInterval = 16;

// Arguments or results of one call by position: tensors, None, lists of tensors, numbers.
using Values = torch::jit::Stack;

// Calls mixture_of_mamba::<name> through the dispatcher.
Values call(const char* name, Values arguments);

at::Tensor tensor_at(const Values& values, size_t index);  // undefined when it is None
std::vector<at::Tensor> list_at(const Values& values, size_t index);

// None where the input was not given; operators return an empty tensor for its gradient.
c10::IValue given(const c10::IValue& gradient, const c10::IValue& input);

// dtype of parameters, states and sums beside these activations.
at::ScalarType accumulation_dtype(const variable_list& activations);

// Sequences of a [batch, length, channels] activation, packed or not.
c10::SymInt num_sequences(const at::Tensor& activation, const c10::IValue& cu_seqlens);

// For meta kernels: an uninitialised tensor on the device of `like`.
at::Tensor empty(const at::Tensor& like, at::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype = {});
// For a meta kernel whose output is like its first argument.
Values like_first_argument(const Values& arguments);
// A gradient: as its input, or an empty tensor of a dtype where there is no input.
at::Tensor empty_gradient(const at::Tensor& reference, const c10::IValue& input, at::ScalarType absent);
std::vector<at::Tensor> empty_gradients(const std::vector<at::Tensor>& inputs, bool wanted = true);

// A call whose gradients are asked for.
struct BackwardCall {
  const Values& arguments;         // as forward got them
  const variable_list& kept;       // outputs that forward kept for backward
  const variable_list& grads;      // of the outputs; undefined where none came
  const std::vector<bool>& needs;  // per argument, whether one of its tensors wants a gradient
};

// All defined tensors among the values, in order; and the values again with other tensors in their place.
variable_list tensors_of(const Values& values);
Values with_tensors(const Values& values, at::TensorList tensors);

// The call on its way through a torch::autograd::Function, and what the operator returned.
struct CallInFlight {
  const c10::OperatorHandle& op;
  const Values& arguments;
  Values results;
};

// Saves arguments and kept outputs; backward_call() brings them back.
void save_call(torch::autograd::AutogradContext* context, const Values& arguments, variable_list saved);
struct SavedCall {
  Values arguments;
  variable_list kept;
  std::vector<bool> needs;
};
SavedCall saved_call(torch::autograd::AutogradContext* context);
// One gradient per value of the arguments -> one per tensor among them.
variable_list gradients_per_tensor(const Values& arguments, const Values& gradients);

// Op is a description: kName; kDifferentiable, the number of outputs that have a gradient (the others are
// kept for backward); backward(BackwardCall), which returns one value per argument.
template <typename Op>
struct DifferentiableCall : torch::autograd::Function<DifferentiableCall<Op>> {
  static variable_list forward(torch::autograd::AutogradContext* context, at::TensorList inputs,
                               CallInFlight& in_flight) {
    at::AutoDispatchBelowADInplaceOrView below;
    in_flight.results = in_flight.arguments;
    in_flight.op.callBoxed(in_flight.results);
    variable_list outputs = tensors_of(in_flight.results);
    variable_list saved = inputs.vec();
    if (outputs.size() > Op::kDifferentiable) {
      const variable_list kept(outputs.begin() + Op::kDifferentiable, outputs.end());
      context->mark_non_differentiable(kept);
      saved.insert(saved.end(), kept.begin(), kept.end());
    }
    context->set_materialize_grads(false);  // zeros for what is kept would be the largest tensors of all
    save_call(context, in_flight.arguments, std::move(saved));
    return outputs;
  }

  static variable_list backward(torch::autograd::AutogradContext* context, const variable_list& grads) {
    const SavedCall saved = saved_call(context);
    const Values gradients = Op::backward({saved.arguments, saved.kept, grads, saved.needs});
    variable_list flat = gradients_per_tensor(saved.arguments, gradients);
    flat.emplace_back();  // of the call itself, which is no tensor
    return flat;
  }
};

// Takes the operator's arguments from the stack; an undefined tensor becomes None.
Values pop_arguments(const c10::OperatorHandle& op, torch::jit::Stack* stack);
bool wants_gradient(const variable_list& inputs);

template <typename Op>
void autograd_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Values arguments = pop_arguments(op, stack);
  const variable_list inputs = tensors_of(arguments);
  if (!wants_gradient(inputs)) {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(arguments);
    *stack = std::move(arguments);
    return;
  }
  CallInFlight in_flight{op, arguments, {}};
  const variable_list outputs = DifferentiableCall<Op>::apply(at::TensorList(inputs), in_flight);
  *stack = with_tensors(in_flight.results, outputs);
}

template <Values (*compute)(const Values&)>
void meta_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  *stack = compute(pop_arguments(op, stack));
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

// Steps update their state in place and are for inference.
void forbid_gradients(const std::string& name, const std::vector<std::optional<at::Tensor>>& inputs);

}  // namespace mixture_of_mamba::frontend
