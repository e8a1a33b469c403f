// SPDX-License-Identifier: Apache-2.0
#include "mixture_of_mamba/ops.h"
#include "registration.h"

namespace mixture_of_mamba {

namespace frontend {
namespace {

Values routing_meta(const Values& in) {
  const at::Tensor ids = tensor_at(in, 0);
  return {empty(ids, {ids.sym_numel()}, at::kInt), empty(ids, {ids.sym_numel()}, at::kInt),
          empty(ids, {in[1].toInt() + 1}, at::kInt)};
}

struct PermuteRows {
  static constexpr size_t kDifferentiable = 1;

  static Values backward(const BackwardCall& in) {
    return {permute_rows(in.grads[0], tensor_at(in.arguments, 2), tensor_at(in.arguments, 1)), {}, {}};
  }
};

}  // namespace

void register_modality_routing(torch::Library& library) {
  register_meta<&routing_meta>(library, "modality_routing");
  register_meta<&like_first_argument>(library, "permute_rows");
  register_autograd<PermuteRows>(library, "permute_rows");
}

}  // namespace frontend

std::tuple<torch::Tensor, torch::Tensor, torch::Tensor> modality_routing(const torch::Tensor& ids,
                                                                         int64_t num_modalities,
                                                                         bool checked) {
  const auto out = frontend::call("modality_routing", {ids, num_modalities, checked});
  return {out[0].toTensor(), out[1].toTensor(), out[2].toTensor()};
}

torch::Tensor permute_rows(const torch::Tensor& x, const torch::Tensor& index, const torch::Tensor& inverse) {
  return frontend::call("permute_rows", {x, index, inverse})[0].toTensor();
}

}  // namespace mixture_of_mamba
