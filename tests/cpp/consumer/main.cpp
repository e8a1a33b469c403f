// SPDX-License-Identifier: Apache-2.0
#include <mixture_of_mamba/nn.h>
#include <torch/torch.h>

#include <iostream>

namespace mom = mixture_of_mamba;

int main() {
  torch::manual_seed(0);

  // A batch of two rows: 0 is text, 1 is image, -1 is padding.
  const auto ids = torch::tensor({{0, 0, 1, 1, 1, 0}, {1, 1, 0, 0, -1, -1}}, torch::kInt64);
  const auto x = torch::randn({2, 6, 16});
  const auto routing = mom::Routing::from_ids(ids, /*num_modalities=*/2);  // once per batch, for all layers

  // Learn to repeat the token before.
  mom::nn::MixtureOfMamba layer(mom::nn::MixtureOfMambaOptions(/*d_model=*/16, /*num_modalities=*/2));
  const auto before = torch::roll(x, 1, /*dims=*/1).index_fill(1, torch::tensor({0}), 0);
  const auto wanted = before * (ids >= 0).unsqueeze(-1);  // padding comes out as zeros
  torch::optim::AdamW optimizer(layer->parameters(), torch::optim::AdamWOptions(3e-3).weight_decay(0));
  double first = 0, loss = 0;
  for (int step = 0; step < 200; ++step) {
    optimizer.zero_grad();
    const auto error = torch::mse_loss(layer->forward(x, routing), wanted);
    error.backward();
    optimizer.step();
    loss = error.item<double>();
    if (step == 0) first = loss;
  }
  std::cout << layer << "\nloss " << first << " -> " << loss << '\n';

  // Generation: the prompt at once, then token by token, is the same as all at once.
  torch::NoGradGuard no_grad;
  const auto part = [](const torch::Tensor& all, int64_t begin, int64_t end) {
    return all.slice(1, begin, end);
  };
  auto [prompt, state] = layer->forward_with_state(part(x, 0, 4), part(ids, 0, 4));
  std::vector<torch::Tensor> outputs{prompt};
  for (int64_t t = 4; t < 6; ++t) {
    outputs.push_back(layer->step(part(x, t, t + 1), state, part(ids, t, t + 1)));
  }
  const double difference = (torch::cat(outputs, 1) - layer->forward(x, routing)).abs().max().item<double>();
  std::cout << "largest difference when generating: " << difference << '\n';

  torch::save(layer, "layer.pt");
  mom::nn::MixtureOfMamba loaded(layer->options);
  torch::load(loaded, "layer.pt");
  const bool same = torch::equal(loaded->forward(x, routing), layer->forward(x, routing));
  std::cout << "saved and loaded: " << (same ? "equal" : "different") << '\n';
  return loss < 0.1 * first && difference < 1e-5 && same ? 0 : 1;
}
