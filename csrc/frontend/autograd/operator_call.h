// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cstdint>
#include <vector>

#include "values.h"

// An operator's call on its way through autograd. The operators come from the stable ABI and are boxed
// anyway, so autograd, meta and autocast are written on boxed calls too: what differs between operators is a
// handful of lines each.

namespace mixture_of_mamba::frontend {

// A call whose gradients are asked for.
struct BackwardCall {
  const Values& arguments;         // as forward got them
  const variable_list& kept;       // outputs that forward kept for backward
  const variable_list& grads;      // of the outputs; undefined where none came
  const std::vector<bool>& needs;  // per argument, whether one of its tensors wants a gradient
};

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

// Takes the operator's arguments from the stack, whose lower part is not ours; an undefined tensor becomes
// None.
Values pop_arguments(const c10::OperatorHandle& op, torch::jit::Stack* stack);
void push_results(torch::jit::Stack* stack, const Values& results);

template <typename Op>
void autograd_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Values arguments = pop_arguments(op, stack);
  const variable_list inputs = tensors_of(arguments);
  if (!wants_gradient(inputs)) {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(arguments);
    push_results(stack, arguments);
    return;
  }
  CallInFlight in_flight{op, arguments, {}};
  const variable_list outputs = DifferentiableCall<Op>::apply(at::TensorList(inputs), in_flight);
  push_results(stack, with_tensors(in_flight.results, outputs));
}

}  // namespace mixture_of_mamba::frontend
