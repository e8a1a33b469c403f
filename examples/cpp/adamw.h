// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mixture_of_mamba/nn.h>
#include <torch/nn/modules/embedding.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <cstdint>
#include <set>
#include <tuple>
#include <vector>

#include "torch_file.h"

namespace examples {

/// AdamW (arXiv 1711.05101) as Python's torch.optim.AdamW(fused=True): one call of torch's fused kernel for
/// all parameters, where torch::optim::AdamW makes a dozen calls for each. Matrices decay; vectors,
/// embeddings and A_log do not. The state's form is that of Python's state_dict(), so either language goes on
/// from the other's.
class AdamW {
 public:
  AdamW(const torch::nn::Module& model, double weight_decay)
      : groups_{{.weight_decay = weight_decay}, {.weight_decay = 0.0}} {
    std::set<const void*> exempt;
    for (const auto& module : model.modules(/*include_self=*/false)) {
      if (const auto* embedding = module->as<torch::nn::Embedding>()) {
        exempt.insert(embedding->weight.unsafeGetTensorImpl());
      } else if (const auto* layer = module->as<mixture_of_mamba::nn::MixtureOfMamba>()) {
        for (const auto& one : layer->parameters_without_weight_decay())
          exempt.insert(one.unsafeGetTensorImpl());
      }
    }
    for (const torch::Tensor& parameter : model.parameters()) {
      const bool decays = parameter.dim() >= 2 && !exempt.contains(parameter.unsafeGetTensorImpl());
      Group& group = groups_[decays ? 0 : 1];
      group.parameters.push_back(parameter);
      group.exp_avg.push_back(torch::zeros_like(parameter));
      group.exp_avg_sq.push_back(torch::zeros_like(parameter));
      group.steps.push_back(torch::zeros({}, torch::dtype(torch::kFloat32).device(parameter.device())));
    }
  }

  void step(double learning_rate) {
    torch::NoGradGuard no_grad;
    for (Group& group : groups_) {
      std::vector<torch::Tensor> gradients;
      for (const torch::Tensor& parameter : group.parameters) gradients.push_back(parameter.grad());
      torch::_foreach_add_(group.steps, 1);
      torch::_fused_adamw_(group.parameters, gradients, group.exp_avg, group.exp_avg_sq,
                           /*max_exp_avg_sqs=*/{}, group.steps, learning_rate, kBeta1, kBeta2,
                           group.weight_decay, kEps, /*amsgrad=*/false, /*maximize=*/false);
    }
  }

  c10::IValue state_dict(double learning_rate) const {
    Dict state = make_dict();
    c10::impl::GenericList groups(c10::AnyType::get());
    int64_t index = 0;
    for (const Group& group : groups_) {
      c10::impl::GenericList members(c10::AnyType::get());
      for (size_t i = 0; i < group.parameters.size(); ++i, ++index) {
        Dict one = make_dict();
        one.insert("step", group.steps[i].cpu());
        one.insert("exp_avg", group.exp_avg[i].cpu());
        one.insert("exp_avg_sq", group.exp_avg_sq[i].cpu());
        state.insert(index, one);
        members.push_back(index);
      }
      Dict options = make_dict();
      options.insert("lr", learning_rate);
      options.insert("betas", std::make_tuple(kBeta1, kBeta2));
      options.insert("eps", kEps);
      options.insert("weight_decay", group.weight_decay);
      for (const char* off : {"amsgrad", "maximize", "capturable", "differentiable"})
        options.insert(off, false);
      for (const char* on : {"fused", "decoupled_weight_decay"}) options.insert(on, true);
      options.insert("foreach", c10::IValue());
      options.insert("params", members);
      groups.push_back(options);
    }
    Dict all = make_dict();
    all.insert("state", state);
    all.insert("param_groups", groups);
    return all;
  }

  void load_state_dict(const c10::IValue& saved) {
    torch::NoGradGuard no_grad;
    const auto state = saved.toGenericDict().at("state").toGenericDict();
    int64_t index = 0;
    for (Group& group : groups_) {
      for (size_t i = 0; i < group.parameters.size(); ++i, ++index) {
        const auto one = state.at(index).toGenericDict();
        group.steps[i].copy_(one.at("step").toTensor());
        group.exp_avg[i].copy_(one.at("exp_avg").toTensor());
        group.exp_avg_sq[i].copy_(one.at("exp_avg_sq").toTensor());
      }
    }
  }

 private:
  static constexpr double kBeta1 = 0.9, kBeta2 = 0.95, kEps = 1e-8;

  struct Group {
    double weight_decay;
    std::vector<torch::Tensor> parameters = {}, exp_avg = {}, exp_avg_sq = {}, steps = {};
  };
  std::vector<Group> groups_;
};

}  // namespace examples
