// SPDX-License-Identifier: Apache-2.0
#include "mixture_of_mamba/nn/rms_norm.h"

#include "text.h"

namespace mixture_of_mamba::nn {

RMSNormOptions::RMSNormOptions(int64_t size) : size_(size) {}

RMSNormImpl::RMSNormImpl(const RMSNormOptions& options_) : options(options_) { RMSNormImpl::reset(); }

void RMSNormImpl::reset() { weight = register_parameter("weight", torch::ones({options.size()})); }

void RMSNormImpl::reset_parameters() {
  torch::NoGradGuard no_grad;
  weight.fill_(1);
}

void RMSNormImpl::pretty_print(std::ostream& stream) const {
  stream << fmt::format("mixture_of_mamba::nn::RMSNorm({}, eps={})", options.size(), options.eps());
}

torch::Tensor RMSNormImpl::forward(const torch::Tensor& x) {
  return torch::rms_norm(x, {options.size()}, weight, options.eps());
}

}  // namespace mixture_of_mamba::nn
