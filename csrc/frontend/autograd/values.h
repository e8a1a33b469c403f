// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/stack.h>
#include <torch/csrc/autograd/variable.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

// The values of an operator's call: taken apart, put together, and as empty tensors for meta kernels.

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

// All defined tensors among the values, in order; and the values again with other tensors in their place.
variable_list tensors_of(const Values& values);
Values with_tensors(const Values& values, at::TensorList tensors);

// Whether a call with these inputs is recorded.
bool wants_gradient(const variable_list& inputs);

// Steps update their state in place and are for inference.
void forbid_gradients(const std::string& name, const std::vector<std::optional<at::Tensor>>& inputs);

// What a step wrote in place, so that autograd sees it where a graph keeps the old values.
void mark_written(std::initializer_list<at::Tensor> states);

}  // namespace mixture_of_mamba::frontend
