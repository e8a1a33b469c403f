// SPDX-License-Identifier: Apache-2.0
// Times calls of a layer so small that next to nothing is computed; benchmarks/cpp/overhead.py compares with
// Python.
#include <mixture_of_mamba/nn.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

namespace mom = mixture_of_mamba;

namespace {

void report(const char* name, int calls, const std::function<void()>& call) {
  for (int i = 0; i < calls / 4; ++i) call();
  std::vector<double> microseconds;
  for (int i = 0; i < calls; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    call();
    microseconds.push_back(
        std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count());
  }
  std::nth_element(microseconds.begin(), microseconds.begin() + calls / 2, microseconds.end());
  std::printf("%s %.3f\n", name, microseconds[static_cast<size_t>(calls / 2)]);
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::stoi(argv[1]) : 1000;
  torch::set_num_threads(1);
  mom::nn::MixtureOfMamba layer(/*d_model=*/16, /*num_modalities=*/2);
  const auto ids = torch::tensor({{0, 0, 1, 1, 1, 0, 0, 1}}, torch::kInt64);
  const auto routing = mom::Routing::from_ids(ids, 2);
  const auto x = torch::randn({1, 8, 16}), one = torch::randn({1, 1, 16});
  report("training", calls, [&] {
    layer->forward(x, routing).sum().backward();
    layer->zero_grad();
  });
  const torch::NoGradGuard no_grad;
  report("routing", calls, [&] { mom::Routing::from_ids(ids, 2); });
  report("forward", calls, [&] { layer->forward(x, routing); });
  auto state = layer->allocate_state(1);
  report("step", calls, [&] { layer->step(one, state, int64_t{1}); });
  return 0;
}
