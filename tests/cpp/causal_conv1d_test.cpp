// SPDX-License-Identifier: Apache-2.0
#include "check.h"

namespace mixture_of_mamba::testing {

TEST_CASE("the convolution and its gradients agree with scalar loops on random problems", "[causal_conv1d]") {
  for (int i = 0; i < random_cases(); ++i) {
    INFO("problem " << i);
    Random random(i);
    check_results(ConvProblem::random(random, device().has_float64, longest_of(i)), device().conv);
  }
}

TEST_CASE(
    "the convolution and its gradients agree with scalar loops for every option, width and unusual size",
    "[causal_conv1d]") {
  for (ScalarType type : device().types()) {
    for (const ConvProblem& problem : ConvProblem::table(type)) check_results(problem, device().conv);
  }
}

TEST_CASE("the convolution touches nothing beyond its tensors when rows and boundaries are garbage",
          "[causal_conv1d]") {
  for (int i = 0; i < random_cases(); ++i) {
    INFO("problem " << i);
    Random random(i);
    const ConvProblem problem = ConvProblem::random(random, device().has_float64, longest_of(i));
    check_memory(problem, random, device().conv);
  }
}

}  // namespace mixture_of_mamba::testing
