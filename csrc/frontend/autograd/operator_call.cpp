// SPDX-License-Identifier: Apache-2.0
#include "operator_call.h"

#include <ATen/autocast_mode.h>
#include <fmt/format.h>

#include <algorithm>
#include <string>

#include "mixture_of_mamba/ops.h"

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

Values call(const char* name, Values arguments) {
  initialize();
  const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(("mixture_of_mamba::" + std::string(name)).c_str(), "");
  op.callBoxed(arguments);
  return arguments;
}

at::Tensor tensor_at(const Values& values, size_t index) {
  return values[index].isNone() ? at::Tensor() : values[index].toTensor();
}

std::vector<at::Tensor> list_at(const Values& values, size_t index) { return values[index].toTensorVector(); }

c10::IValue given(const c10::IValue& gradient, const c10::IValue& input) {
  return input.isNone() ? c10::IValue() : gradient;
}

at::ScalarType accumulation_dtype(const variable_list& activations) {
  const bool wide = std::any_of(activations.begin(), activations.end(), [](const at::Tensor& x) {
    return x.defined() && x.scalar_type() == at::kDouble;
  });
  return wide ? at::kDouble : at::kFloat;
}

c10::SymInt num_sequences(const at::Tensor& activation, const c10::IValue& cu_seqlens) {
  return cu_seqlens.isNone() ? activation.sym_size(0) : cu_seqlens.toTensor().sym_size(0) - 1;
}

at::Tensor empty(const at::Tensor& like, at::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype) {
  return at::empty_symint(sizes, like.options().dtype(dtype.value_or(like.scalar_type())));
}

Values like_first_argument(const Values& arguments) {
  const at::Tensor first = tensor_at(arguments, 0);
  return {empty(first, first.sym_sizes())};
}

at::Tensor empty_gradient(const at::Tensor& reference, const c10::IValue& input, at::ScalarType absent) {
  if (input.isNone()) return empty(reference, {0}, absent);
  const at::Tensor tensor = input.toTensor();
  return empty(tensor, tensor.sym_sizes());
}

std::vector<at::Tensor> empty_gradients(const std::vector<at::Tensor>& inputs, bool wanted) {
  std::vector<at::Tensor> grads;
  if (!wanted) return grads;
  for (const at::Tensor& input : inputs) grads.push_back(empty(input, input.sym_sizes()));
  return grads;
}

variable_list tensors_of(const Values& values) {
  variable_list tensors;
  for (const c10::IValue& value : values) {
    if (value.isTensor()) {
      tensors.push_back(value.toTensor());
    } else if (value.isTensorList()) {
      const std::vector<at::Tensor> list = value.toTensorVector();
      tensors.insert(tensors.end(), list.begin(), list.end());
    }
  }
  return tensors;
}

Values with_tensors(const Values& values, at::TensorList tensors) {
  Values result;
  result.reserve(values.size());
  size_t next = 0;
  for (const c10::IValue& value : values) {
    if (value.isTensor()) {
      result.emplace_back(tensors[next++]);
    } else if (value.isTensorList()) {
      const size_t size = value.toTensorList().size();
      result.emplace_back(tensors.slice(next, size).vec());
      next += size;
    } else {
      result.push_back(value);
    }
  }
  return result;
}

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

bool wants_gradient(const variable_list& inputs) {
  return at::GradMode::is_enabled() && torch::autograd::any_variable_requires_grad(inputs);
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
  *stack = std::move(arguments);
}

void throw_no_double_backward(const char* name) {
  TORCH_CHECK(false, fmt::format("mixture_of_mamba::{} has no derivative: double backward is not supported; "
                                 "mixture_of_mamba.reference has differentiable versions in plain torch",
                                 name));
}

void forbid_gradients(const std::string& name, const std::vector<std::optional<at::Tensor>>& inputs) {
  variable_list tensors;
  for (const std::optional<at::Tensor>& input : inputs) {
    if (input) tensors.push_back(*input);
  }
  const std::string differentiable = name.substr(0, name.rfind("_step"));
  TORCH_CHECK(
      !wants_gradient(tensors),
      fmt::format("{} is for inference: it updates its state in place and records no gradient; call it under "
                  "torch.no_grad(), or use {} with initial_state for a differentiable step",
                  name, differentiable));
}

}  // namespace mixture_of_mamba::frontend
