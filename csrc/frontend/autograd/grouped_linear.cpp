// SPDX-License-Identifier: Apache-2.0
#include "mixture_of_mamba/ops.h"
#include "registration.h"

namespace mixture_of_mamba {

namespace frontend {
namespace {

struct GroupedLinear {
  static constexpr const char* kName = "grouped_linear";
  static constexpr const char* kBackwardName = "grouped_linear_backward";
  static constexpr size_t kDifferentiable = 1;

  enum : size_t { kX, kWeight, kBias, kOffsets, kHostOffsets };
  // Arguments of backward.
  enum : size_t { kGrad, kBackwardX, kBackwardWeight, kNeedsX = 5, kNeedsWeight, kNeedsBias };

  static Values meta(const Values& in) {
    const at::Tensor x = tensor_at(in, kX);
    std::vector<c10::SymInt> sizes = x.sym_sizes().vec();
    sizes.back() = list_at(in, kWeight)[0].sym_size(0);
    return {empty(x, sizes)};
  }

  static Values backward_meta(const Values& in) {
    const at::Tensor x = tensor_at(in, kBackwardX);
    const std::vector<at::Tensor> weight = list_at(in, kBackwardWeight);
    std::vector<at::Tensor> grad_bias;
    if (in[kNeedsBias].toBool()) {
      for (const at::Tensor& w : weight) grad_bias.push_back(empty(w, {w.sym_size(0)}));
    }
    return {in[kNeedsX].toBool() ? empty(x, x.sym_sizes()) : empty(x, {0}),
            empty_gradients(weight, in[kNeedsWeight].toBool()), grad_bias};
  }

  static Values backward(const BackwardCall& in) {
    const Values out =
        call(kBackwardName, {in.grads[0], in.arguments[kX], in.arguments[kWeight], in.arguments[kOffsets],
                             in.arguments[kHostOffsets], bool(in.needs[kX]), bool(in.needs[kWeight]),
                             bool(in.needs[kBias])});
    Values grads(in.arguments.size());
    if (in.needs[kX]) grads[kX] = out[0];
    grads[kWeight] = out[1];
    std::vector<at::Tensor> grad_bias = list_at(out, 2);
    const std::vector<at::Tensor> bias = list_at(in.arguments, kBias);
    for (size_t m = 0; m < grad_bias.size(); ++m) grad_bias[m] = grad_bias[m].to(bias[m].scalar_type());
    grads[kBias] = std::move(grad_bias);
    return grads;
  }
};

}  // namespace

void register_grouped_linear(torch::Library& library) {
  register_differentiable<GroupedLinear>(library);
  register_autocast(library, GroupedLinear::kName);
}

}  // namespace frontend

torch::Tensor grouped_linear(const torch::Tensor& x, at::TensorList weight, at::TensorList bias,
                             const torch::Tensor& offsets, const std::optional<torch::Tensor>& host_offsets) {
  return frontend::call("grouped_linear", {x, weight.vec(), bias.vec(), offsets, host_offsets})[0].toTensor();
}

}  // namespace mixture_of_mamba
