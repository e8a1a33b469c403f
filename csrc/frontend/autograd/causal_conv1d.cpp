// SPDX-License-Identifier: Apache-2.0
#include "mixture_of_mamba/ops.h"
#include "registration.h"

namespace mixture_of_mamba {

namespace frontend {
namespace {

struct CausalConv1d {
  static constexpr const char* kName = "causal_conv1d";
  static constexpr const char* kBackwardName = "causal_conv1d_backward";
  static constexpr size_t kDifferentiable = 2;

  // Arguments of forward. Those of backward: grad_y, grad_final_state, these.
  enum : size_t { kX, kWeight, kBias, kRows, kOffsets, kCuSeqlens, kInitialState, kSilu };

  static Values meta(const Values& in) {
    const at::Tensor x = tensor_at(in, kX);
    const c10::SymInt taps = tensor_at(in, kWeight).sym_size(1) - 1;
    return {empty(x, x.sym_sizes()), empty(x, {num_sequences(x, in[kCuSeqlens]), taps, x.sym_size(2)})};
  }

  static Values backward_meta(const Values& in) {
    constexpr size_t kFirst = 2;
    const at::Tensor x = tensor_at(in, kFirst + kX);
    return {empty_gradient(x, in[kFirst + kX], x.scalar_type()),
            empty_gradient(x, in[kFirst + kWeight], x.scalar_type()),
            empty_gradient(x, in[kFirst + kBias], accumulation_dtype({x})),
            empty_gradient(x, in[kFirst + kInitialState], x.scalar_type())};
  }

  static Values backward(const BackwardCall& in) {
    Values arguments{in.grads[0].defined() ? in.grads[0] : at::zeros_like(tensor_at(in.arguments, kX)),
                     in.grads[1].defined() ? c10::IValue(in.grads[1]) : c10::IValue()};
    arguments.insert(arguments.end(), in.arguments.begin(), in.arguments.end());
    const Values out = call(kBackwardName, std::move(arguments));
    Values grads(in.arguments.size());
    grads[kX] = out[0];
    grads[kWeight] = out[1];
    grads[kBias] = given(out[2], in.arguments[kBias]);
    grads[kInitialState] = given(out[3], in.arguments[kInitialState]);
    return grads;
  }
};

}  // namespace

void register_causal_conv1d(torch::Library& library) {
  register_differentiable<CausalConv1d>(library);
  register_autocast(library, CausalConv1d::kName);
  register_meta<&like_first_argument>(library, "causal_conv1d_step");
}

}  // namespace frontend

std::tuple<torch::Tensor, torch::Tensor> causal_conv1d(const torch::Tensor& x, const torch::Tensor& weight,
                                                       const std::optional<torch::Tensor>& bias,
                                                       const CausalConv1dOptions& o) {
  const auto out = frontend::call(
      "causal_conv1d", {x, weight, bias, o.rows, o.offsets, o.cu_seqlens, o.initial_state, o.silu});
  return {out[0].toTensor(), out[1].toTensor()};
}

torch::Tensor causal_conv1d_step(const torch::Tensor& x, torch::Tensor& state, const torch::Tensor& weight,
                                 const std::optional<torch::Tensor>& bias, const CausalConv1dStepOptions& o) {
  frontend::forbid_gradients("causal_conv1d_step", {x, state, weight, bias});
  const auto out = frontend::call("causal_conv1d_step", {x, state, weight, bias, o.rows, o.offsets, o.silu});
  frontend::mark_written({state});
  return out[0].toTensor();
}

}  // namespace mixture_of_mamba
