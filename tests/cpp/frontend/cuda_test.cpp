// SPDX-License-Identifier: Apache-2.0
// The same numbers on a GPU as on the CPU. Where there is no GPU these cases end at once.
#include <ATen/autocast_mode.h>

#include "support.h"

namespace mixture_of_mamba::testing {

namespace {

using nn::MixtureOfMamba;
using nn::MixtureOfMambaOptions;

bool no_gpu() {
  if (torch::cuda::is_available()) return false;
  WARN("no GPU is here to test");
  return true;
}

std::pair<MixtureOfMamba, MixtureOfMamba> on_both(const MixtureOfMambaOptions& options) {
  const MixtureOfMamba host(options);
  const auto device = torch::Device(torch::kCUDA);
  return {host, MixtureOfMamba(std::dynamic_pointer_cast<nn::MixtureOfMambaImpl>(host->clone(device)))};
}

Tensors to_host(Tensors tensors) {
  for (Tensor& tensor : tensors) tensor = tensor.cpu();
  return tensors;
}

// Outputs, states and gradients of a layer on one device, read back.
Tensors results_of(MixtureOfMamba& layer, const Tensor& data, const nn::Modality& modality,
                   const OptionalTensor& cu_seqlens = {}) {
  const torch::Device device = layer->D.device();
  const Tensor x = data.to(device).requires_grad_();
  nn::MixOptions call;
  if (cu_seqlens) call.cu_seqlens = cu_seqlens->to(device);
  const auto [y, state] = layer->forward_with_state(x, modality, call);
  Tensors inputs = layer->parameters(), results{y, state.conv, state.ssm};
  inputs.push_back(x);
  const Tensors grads = torch::autograd::grad({y.square().sum() + state.ssm.sum()}, inputs);
  results.insert(results.end(), grads.begin(), grads.end());
  return to_host(results);
}

void require_all_close(const Tensors& got, const Tensors& expected, double tolerance = 1e-4) {
  REQUIRE(got.size() == expected.size());
  for (size_t i = 0; i < got.size(); ++i)
    require_close("result " + std::to_string(i), got[i], expected[i], tolerance);
}

}  // namespace

TEST_CASE("A layer on a GPU has the outputs, states and gradients of one on the CPU", "[cuda]") {
  if (no_gpu()) return;
  torch::manual_seed(20);
  const auto base = MixtureOfMambaOptions(32, 3);
  for (auto options : {base, MixtureOfMambaOptions(base).memory("lean"),
                       MixtureOfMambaOptions(base).decouple({"in_proj", "out_proj"}).bias(true),
                       MixtureOfMambaOptions(base).decouple({}), MixtureOfMambaOptions(base).bcdt_norm(true),
                       MixtureOfMambaOptions(base).dt_limit(std::make_pair(0.01, 0.05))}) {
    auto [host, device] = on_both(options);
    INFO(*host);
    const Tensor x = torch::randn({2, 50, 32}), ids = random_ids(2, 50, 3);
    const Tensors expected = results_of(host, x, ids);
    require_all_close(results_of(device, x, ids), expected);         // routed on the CPU
    require_all_close(results_of(device, x, ids.cuda()), expected);  // and with nothing known on the host
    const Tensor cu_seqlens = torch::tensor({0, 20, 20, 100}, torch::kInt32);
    require_all_close(results_of(device, x, ids, cu_seqlens), results_of(host, x, ids, cu_seqlens));
  }
}

TEST_CASE("Steps on a GPU go on from where the whole ends", "[cuda]") {
  if (no_gpu()) return;
  torch::manual_seed(21);
  auto [host, device] = on_both(MixtureOfMambaOptions(32, 2));
  const Tensor x = torch::randn({2, 12, 32}), ids = random_ids(2, 12, 2);
  torch::NoGradGuard no_grad;
  nn::MambaState state = device->allocate_state(2);
  REQUIRE(state.ssm.is_cuda());
  Tensors steps;
  for (int64_t t = 0; t < 12; ++t) {
    steps.push_back(device->step(x.slice(1, t, t + 1).cuda(), state, ids.slice(1, t, t + 1)));
  }
  const auto [y, last] = host->forward_with_state(x, ids);
  require_all_close(to_host({torch::cat(steps, 1), state.conv, state.ssm}), {y, last.conv, last.ssm});
}

TEST_CASE("A scan's state in 16 bits on a GPU is rounded as on the CPU", "[cuda]") {
  if (no_gpu()) return;
  torch::manual_seed(23);
  nn::MixtureOfMamba layer(MixtureOfMambaOptions(32, 2).dtype(torch::kBFloat16).device(torch::kCUDA));
  torch::NoGradGuard no_grad;
  nn::MambaState narrow = layer->allocate_state(2, {}, torch::kBFloat16), wide = layer->allocate_state(2);
  const Tensor x = torch::randn({2, 1, 32}).to(torch::kBFloat16).cuda();
  const Tensor y = layer->step(x, narrow, 1), expected = layer->step(x, wide, 1);
  REQUIRE(torch::equal(narrow.ssm, wide.ssm.to(torch::kBFloat16)));
  REQUIRE(torch::allclose(y, expected, 2e-2, 2e-2));
}

TEST_CASE("A model on a GPU has the losses of one on the CPU, and learns under autocast", "[cuda]") {
  if (no_gpu()) return;
  torch::manual_seed(22);
  const models::Vocabulary vocabulary({{12}, {8, 3, 4, 5}});
  models::Chameleon host(models::ChameleonOptions(models::DecoderOptions(32, 2), vocabulary));
  models::Chameleon device(
      std::dynamic_pointer_cast<models::ChameleonImpl>(host->clone(torch::Device(torch::kCUDA))));
  const Tensor tokens = torch::randint(-1, 20, {4, 40}, torch::kInt64), there = tokens.cuda();
  const Tensor ids = vocabulary.modality_of(tokens);
  const auto expected = host->loss(tokens);
  for (const auto& modality : {models::TokenModality(), models::TokenModality(ids)}) {
    const auto losses = device->loss(there, modality);
    require_all_close(to_host({losses.cross_entropy, losses.z, losses.count}),
                      {expected.cross_entropy, expected.z, expected.count});
  }
  torch::optim::AdamW optimizer(device->parameters(), torch::optim::AdamWOptions(1e-2));
  std::vector<double> seen;
  for (int step = 0; step < 40; ++step) {
    at::autocast::set_autocast_enabled(at::kCUDA, true);
    at::autocast::set_autocast_dtype(at::kCUDA, at::kBFloat16);
    const Tensor loss = device->loss(there, ids).total();
    at::autocast::set_autocast_enabled(at::kCUDA, false);
    at::autocast::clear_cache();
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    seen.push_back(loss.item<double>());
  }
  REQUIRE(std::abs(seen.front() - expected.total().item<double>()) < 0.02);
  REQUIRE(seen.back() < 0.5 * seen.front());
}

}  // namespace mixture_of_mamba::testing
