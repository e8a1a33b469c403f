// SPDX-License-Identifier: Apache-2.0
#include "operator_call.h"

#include <ATen/autocast_mode.h>
#include <fmt/format.h>
#include <torch/custom_class.h>

#include "registration.h"

namespace mixture_of_mamba::frontend {

namespace {

// Where a saved call keeps its arguments; tensors are left undefined there, autograd keeps those.
struct SavedArguments : torch::CustomClassHolder {
  explicit SavedArguments(Values values) : values(std::move(values)) {}
  Values values;
};

size_t count_tensors(const c10::IValue& value) {
  if (value.isTensor()) return 1;
  return value.isTensorList() ? value.toTensorList().size() : 0;
}

size_t count_tensors(const Values& values) {
  size_t count = 0;
  for (const c10::IValue& value : values) count += count_tensors(value);
  return count;
}

}  // namespace

void save_call(torch::autograd::AutogradContext* context, const Values& arguments, variable_list saved) {
  const variable_list nothing(count_tensors(arguments));
  context->saved_data["arguments"] =
      c10::IValue::make_capsule(c10::make_intrusive<SavedArguments>(with_tensors(arguments, nothing)));
  context->save_for_backward(std::move(saved));
}

SavedCall saved_call(torch::autograd::AutogradContext* context) {
  const auto holder = context->saved_data["arguments"].toCapsule();
  const Values& skeleton = static_cast<const SavedArguments&>(*holder).values;
  const variable_list saved = context->get_saved_variables();
  const size_t inputs = count_tensors(skeleton);
  SavedCall result;
  result.arguments = with_tensors(skeleton, at::TensorList(saved.data(), inputs));
  result.kept.assign(saved.begin() + static_cast<std::ptrdiff_t>(inputs), saved.end());
  size_t next = 0;
  for (const c10::IValue& value : skeleton) {
    bool any = false;
    for (const size_t end = next + count_tensors(value); next < end; ++next) {
      any = context->needs_input_grad(next) || any;
    }
    result.needs.push_back(any);
  }
  return result;
}

variable_list gradients_per_tensor(const Values& arguments, const Values& gradients) {
  variable_list flat;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const size_t count = count_tensors(arguments[i]);
    if (count > 0 && gradients[i].isTensor()) {
      flat.push_back(gradients[i].toTensor());
    } else if (count > 0 && gradients[i].isTensorList() && !gradients[i].toTensorList().empty()) {
      const std::vector<at::Tensor> list = gradients[i].toTensorVector();
      flat.insert(flat.end(), list.begin(), list.end());
    } else {
      flat.resize(flat.size() + count);
    }
  }
  return flat;
}

Values pop_arguments(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Values arguments = torch::jit::pop(*stack, op.schema().arguments().size());
  for (c10::IValue& value : arguments) {
    if (value.isTensor() && !value.toTensor().defined()) value = c10::IValue();
  }
  return arguments;
}

void push_results(torch::jit::Stack* stack, const Values& results) {
  stack->insert(stack->end(), results.begin(), results.end());
}

void call_in_autocast_dtype(const c10::OperatorHandle& op, torch::jit::Stack* stack, c10::DeviceType device,
                            c10::DispatchKey key, uint64_t wide) {
  c10::impl::ExcludeDispatchKeyGuard exclude(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  Values arguments = pop_arguments(op, stack);
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = arguments[i];
    if (wide >> i & 1) continue;
    if (value.isTensor()) {
      value = at::autocast::cached_cast(dtype, value.toTensor(), device);
    } else if (value.isTensorList()) {
      value = at::autocast::cached_cast(dtype, value.toTensorVector(), device);
    }
  }
  op.callBoxed(arguments);
  push_results(stack, arguments);
}

void throw_no_double_backward(const char* name) {
  TORCH_CHECK(false, fmt::format("mixture_of_mamba::{} has no derivative: double backward is not supported; "
                                 "mixture_of_mamba.reference has differentiable versions in plain torch",
                                 name));
}

}  // namespace mixture_of_mamba::frontend
