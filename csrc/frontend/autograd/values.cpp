// SPDX-License-Identifier: Apache-2.0
#include "values.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/function.h>

#include <algorithm>

#include "mixture_of_mamba/ops.h"

namespace mixture_of_mamba::frontend {

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

bool wants_gradient(const variable_list& inputs) {
  return at::GradMode::is_enabled() && torch::autograd::any_variable_requires_grad(inputs);
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

void mark_written(std::initializer_list<at::Tensor> states) {
  for (const at::Tensor& state : states) {
    if (!state.is_inference()) torch::autograd::impl::bump_version(state);
  }
}

}  // namespace mixture_of_mamba::frontend
