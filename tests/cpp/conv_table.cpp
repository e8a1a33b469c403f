// SPDX-License-Identifier: Apache-2.0
#include <functional>

#include "conv_problem.h"

// Calls of the convolution that are chosen, not drawn.

namespace mixture_of_mamba::testing {

namespace {

ConvProblem unfilled(ScalarType type) {
  ConvProblem p;
  p.name = "base";
  p.type = type;
  p.channels = 70;
  p.tokens.lengths = {37, 37};
  p.tokens.sorted = p.tokens.routed = true;
  p.tokens.modalities = 3;
  p.silu = p.bias = p.initial = p.final = p.grad_final = true;
  return p;
}

}  // namespace

ConvProblem ConvProblem::base(ScalarType type) {
  ConvProblem p = unfilled(type);
  Random random(0);
  p.fill(random);
  return p;
}

std::vector<ConvProblem> ConvProblem::table(ScalarType type) {
  std::vector<ConvProblem> problems;
  const auto vary = [&](const std::string& name, const std::function<void(ConvProblem&)>& change) {
    ConvProblem p = unfilled(type);
    p.name = name;
    change(p);
    Random random(problems.size());
    p.fill(random);
    problems.push_back(p);
  };
  const auto pad = [](ConvProblem& p) { p.tokens.padding = p.garbage = true; };
  vary("base", [](ConvProblem&) {});
  vary("time order, one modality",
       [](ConvProblem& p) { p.tokens.sorted = p.tokens.routed = false, p.tokens.modalities = 1; });
  vary("rows alone", [](ConvProblem& p) { p.tokens.routed = false, p.tokens.modalities = 1; });
  vary("offsets alone", [&](ConvProblem& p) { p.tokens.sorted = false, pad(p); });
  vary("no silu", [](ConvProblem& p) { p.silu = false; });
  vary("no bias", [](ConvProblem& p) { p.bias = p.want_grad_bias = false; });
  vary("no states in or out",
       [](ConvProblem& p) { p.initial = p.final = p.grad_final = p.want_grad_initial = false; });
  vary("no gradient but the weight's",
       [](ConvProblem& p) { p.want_grad_x = p.want_grad_bias = p.want_grad_initial = false; });
  vary("aligned channels", [](ConvProblem& p) { p.channels = 128; });
  vary("aligned rows", [](ConvProblem& p) { p.channels = 128, p.gap = 64; });
  vary("odd rows", [](ConvProblem& p) { p.gap = 3, p.offset = 1; });
  vary("no channels", [](ConvProblem& p) { p.channels = 0; });
  vary("length 0", [](ConvProblem& p) { p.tokens.lengths = {0, 0}; });
  vary("batch 0", [](ConvProblem& p) { p.tokens.lengths = {}; });
  vary("chunks", [&](ConvProblem& p) { p.tokens.lengths = {517, 200}, p.tokens.packed = true, pad(p); });
  vary("many sequences", [](ConvProblem& p) { p.tokens.lengths = std::vector<int>(300, 3); });
  for (int width = 1; width <= 9; ++width) {
    vary("other width", [&](ConvProblem& p) { p.width = width, p.tokens.lengths = {70, 70}, pad(p); });
    // Shorter than the window, so that entries of the state move within it.
    vary("other width, short documents, state in place", [&](ConvProblem& p) {
      p.width = width, p.in_place = p.tokens.packed = true, p.tokens.lengths = {2, 0, 1, width, 3, width - 1};
      pad(p);
    });
  }
  return problems;
}

}  // namespace mixture_of_mamba::testing
