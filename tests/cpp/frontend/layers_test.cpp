// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <limits>
#include <sstream>

#include "nn/mixing.h"
#include "support.h"

namespace mixture_of_mamba::testing {

namespace {

using nn::MixtureOfMamba;
using nn::MixtureOfMambaOptions;

const std::vector<std::string> kProjections{"in_proj", "x_proj", "dt_proj", "out_proj"};

std::vector<std::string> subset(unsigned bits) {
  std::vector<std::string> names;
  for (size_t i = 0; i < kProjections.size(); ++i) {
    if (bits >> i & 1) names.push_back(kProjections[i]);
  }
  return names;
}

MixtureOfMambaOptions small(int64_t modalities = 3) {
  return MixtureOfMambaOptions(4, modalities).d_state(3).d_conv(3).dt_rank(2);
}

// Forward and all gradients of the layer, against the layer written out.
void require_equal_to_reference(MixtureOfMamba& layer, const Tensor& x, const Tensor& ids) {
  Tensors inputs = layer->parameters();
  inputs.push_back(x);
  const Tensor y = layer->forward(x, ids), expected = reference_layer(*layer, x, ids);
  require_close("y", y, expected);
  const Tensors grads = gradients({y}, inputs), expected_grads = gradients({expected}, inputs);
  const auto names = layer->named_parameters().keys();
  for (size_t i = 0; i < grads.size(); ++i) {
    require_close("gradient of " + (i < names.size() ? names[i] : "x"), grads[i], expected_grads[i]);
  }
}

}  // namespace

TEST_CASE("Every subset of decoupled projections computes what the layer written out does", "[layer]") {
  for (unsigned bits = 0; bits < 16; ++bits) {
    torch::manual_seed(bits);
    MixtureOfMamba layer =
        make_layer(small().decouple(subset(bits)).bias(bits % 2 == 1).conv_bias(bits % 3 != 1));
    INFO(*layer);
    require_equal_to_reference(layer, leaf({2, 6, 4}), random_ids(2, 6, 3));
  }
}

TEST_CASE("Norms of B, C and dt, and limits of delta, are as written out", "[layer]") {
  torch::manual_seed(1);
  for (const auto& decouple : {subset(0), subset(15)}) {
    MixtureOfMamba normed = make_layer(small().decouple(decouple).bcdt_norm(true));
    require_equal_to_reference(normed, leaf({2, 5, 4}), random_ids(2, 5, 3));
    MixtureOfMamba limited = make_layer(small().decouple(decouple).dt_limit(std::make_pair(0.01, 0.05)));
    require_equal_to_reference(limited, leaf({2, 5, 4}), random_ids(2, 5, 3));
  }
  MixtureOfMamba unlimited(small().dt_limit(std::make_pair(0.0, std::numeric_limits<double>::infinity())));
  REQUIRE_FALSE(unlimited->options.dt_limit().has_value());
}

TEST_CASE("D, A and shared experts of the projections are as written out, whole and in steps", "[layer]") {
  torch::manual_seed(15);
  auto with_all = subset(15);
  with_all.insert(with_all.end(), {"A_log", "D"});
  for (const auto& options :
       {small().decouple({"D"}), small().decouple({"A_log"}), small().decouple(with_all),
        small().decouple({"dt_proj", "D"}).dt_limit(std::make_pair(0.01, 0.05)),
        small().shared_expert(subset(15)).bias(true), small().decouple(with_all).shared_expert({"x_proj"})}) {
    MixtureOfMamba layer = make_layer(options);
    INFO(*layer);
    const Tensor x = leaf({2, 6, 4}), ids = random_ids(2, 6, 3);
    require_equal_to_reference(layer, x, ids);
    const auto [y, last] = layer->forward_with_state(x, ids);
    nn::MambaState state = layer->allocate_state(2);
    Tensors steps;
    for (int64_t t = 0; t < 6; ++t) {
      steps.push_back(layer->step(x.slice(1, t, t + 1), state, ids.slice(1, t, t + 1)));
    }
    require_close("steps", torch::cat(steps, 1), y.detach());
    require_close("state", state.ssm, last.ssm.detach());
    const Tensor cu_seqlens = torch::tensor({0, 5, 12}, torch::kInt32);
    const auto [packed, states] = layer->forward_with_state(x, ids, {.cu_seqlens = cu_seqlens});
    const Tensor flat = x.reshape({1, 12, 4}), flat_ids = ids.reshape({1, 12});
    const Tensor second = layer->forward(flat.slice(1, 5, 12), flat_ids.slice(1, 5, 12));
    require_close("packed", packed.reshape({1, 12, 4}).slice(1, 5, 12), second);
  }
  // With many rows the shared expert is added to the matrices.
  MixtureOfMamba layer = make_layer(small().shared_expert({"in_proj"}));
  require_equal_to_reference(layer, leaf({1, 260, 4}), random_ids(1, 260, 3));
  torch::NoGradGuard no_grad;
  MixtureOfMamba fresh(MixtureOfMambaOptions(8, 2).shared_expert({"in_proj"}));
  REQUIRE(torch::equal(fresh->in_proj.decoupled->shared->weight, torch::zeros({32, 8})));
  std::ostringstream printed;
  printed << *fresh;
  REQUIRE_THAT(printed.str(),
               ContainsSubstring("out_proj], shared_expert=[in_proj])") && ContainsSubstring("(shared): "));
}

TEST_CASE("One operator and one step after the other give the same numbers; lean gives the same bits",
          "[layer]") {
  torch::manual_seed(2);
  for (const unsigned bits : {0u, 5u, 15u}) {
    MixtureOfMamba layer = make_layer(small().decouple(subset(bits)).bias(true));
    const Tensor x = leaf({2, 6, 4});
    const Routing routing = Routing::from_ids(random_ids(2, 6, 3), 3);
    const auto [one, one_state] = frontend::mix(*layer, x, routing, {}, {});
    const auto [steps, steps_state] = frontend::mix_step_by_step(*layer, x, routing, {}, {});
    require_close("y", steps, one);
    require_close("conv", steps_state.conv, one_state.conv);
    require_close("ssm", steps_state.ssm, one_state.ssm);
    Tensors inputs = layer->parameters();
    inputs.push_back(x);
    const Tensors grads = gradients({one, one_state.ssm}, inputs);
    const Tensors step_grads = gradients({steps, steps_state.ssm}, inputs);
    layer->options.memory("lean");
    const Tensors lean_grads = gradients({std::get<0>(frontend::mix(*layer, x, routing, {}, {}))}, inputs);
    layer->options.memory("default");
    const Tensors default_grads = gradients({std::get<0>(frontend::mix(*layer, x, routing, {}, {}))}, inputs);
    for (size_t i = 0; i < inputs.size(); ++i) {
      require_close("gradient", step_grads[i], grads[i]);
      REQUIRE(torch::equal(lean_grads[i], default_grads[i]));
    }
  }
}

TEST_CASE("Whole, in chunks and in steps: the state carries everything, and its gradient", "[state]") {
  torch::manual_seed(3);
  MixtureOfMamba layer = make_layer(small());
  const Tensor x = leaf({2, 7, 4}), ids = random_ids(2, 7, 3);
  const auto part = [](const Tensor& tensor, int64_t begin, int64_t end) {
    return tensor.slice(1, begin, end);
  };
  const auto [whole, whole_state] = layer->forward_with_state(x, ids);
  const auto [first, middle] = layer->forward_with_state(part(x, 0, 3), part(ids, 0, 3));
  const auto [second, last] = layer->forward_with_state(part(x, 3, 7), part(ids, 3, 7), {.state = middle});
  require_close("chunks", torch::cat({first, second}, 1), whole);
  require_close("conv", last.conv, whole_state.conv);
  require_close("ssm", last.ssm, whole_state.ssm);
  Tensors inputs = layer->parameters();
  inputs.push_back(x);
  const Tensors expected = gradients({whole, whole_state.ssm}, inputs);
  const Tensors chunked = gradients({torch::cat({first, second}, 1), last.ssm}, inputs);
  for (size_t i = 0; i < inputs.size(); ++i) require_close("gradient", chunked[i], expected[i]);

  nn::MambaState state = layer->allocate_state(2);
  Tensors steps;
  for (int64_t t = 0; t < 7; ++t) steps.push_back(layer->step(part(x, t, t + 1), state, part(ids, t, t + 1)));
  require_close("steps", torch::cat(steps, 1), whole.detach());
  require_close("stepped ssm", state.ssm, whole_state.ssm.detach());
  REQUIRE_FALSE(steps[0].requires_grad());
  const nn::MambaState kept = state.clone();
  layer->step(part(x, 0, 1), state, part(ids, 0, 1));
  require_close("clone", kept.ssm, whole_state.ssm.detach());
  REQUIRE_FALSE(torch::equal(state.ssm, kept.ssm));
}

TEST_CASE("The scan's state may have 16 bits: a step in float32, rounded", "[state]") {
  torch::manual_seed(12);
  const auto as = [](torch::Dtype dtype) { return small().dtype(dtype); };
  std::vector<std::string> with_A = subset(15);
  with_A.push_back("A_log");
  for (const auto& options :
       {as(torch::kBFloat16), as(torch::kHalf), as(torch::kBFloat16).bcdt_norm(true),
        as(torch::kBFloat16).dt_limit(std::make_pair(0.01, 0.05)), as(torch::kBFloat16).decouple(with_A)}) {
    MixtureOfMamba layer(options);
    INFO(*layer);
    const torch::Dtype dtype = *options.dtype();
    const Tensor x = torch::randn({2, 7, 4}).to(dtype), ids = random_ids(2, 7, 3);
    torch::NoGradGuard no_grad;
    const auto [y, prefilled] = layer->forward_with_state(x, ids);
    nn::MambaState narrow = prefilled.to(dtype), wide{narrow.conv.clone(), narrow.ssm.to(torch::kFloat32)};
    REQUIRE(torch::equal(narrow.ssm, prefilled.ssm.to(dtype)));
    const Tensor stepped = layer->step(x.slice(1, 0, 2), narrow, ids.slice(1, 0, 2));
    require_close("y", stepped.to(torch::kFloat64),
                  layer->step(x.slice(1, 0, 2), wide, ids.slice(1, 0, 2)).to(torch::kFloat64), 2e-2);
    REQUIRE(narrow.ssm.scalar_type() == dtype);
    REQUIRE(torch::equal(narrow.ssm, wide.ssm.to(dtype)));
    // A chunk goes on from it, and ends in float32.
    const auto [more, last] = layer->forward_with_state(x, ids, {.state = narrow});
    const auto [expected, _] = layer->forward_with_state(x, ids, {.state = narrow.to(torch::kFloat32)});
    REQUIRE(torch::equal(more, expected));
    REQUIRE(last.ssm.scalar_type() == torch::kFloat32);
    const nn::MambaState empty = layer->allocate_state(3, {}, dtype);
    REQUIRE(empty.ssm.scalar_type() == dtype);
    REQUIRE(empty.conv.scalar_type() == dtype);
  }
}

TEST_CASE("Packed documents are separate documents, and padding does not exist", "[packing]") {
  torch::manual_seed(4);
  MixtureOfMamba layer = make_layer(small());
  const Tensor x = leaf({1, 9, 4}), ids = random_ids(1, 9, 3);
  const Tensor cu_seqlens = torch::tensor({0, 4, 4, 9}, torch::kInt32);
  const auto [packed, states] = layer->forward_with_state(x, ids, {.cu_seqlens = cu_seqlens});
  Tensors parts;
  for (const auto& [begin, end] : {std::make_pair(0, 4), std::make_pair(4, 9)}) {
    const auto [y, state] = layer->forward_with_state(x.slice(1, begin, end), ids.slice(1, begin, end));
    require_close("state", states.ssm[begin == 0 ? 0 : 2], state.ssm[0]);
    parts.push_back(y);
  }
  require_close("packed", packed, torch::cat(parts, 1));
  REQUIRE(states.ssm[1].abs().max().item<double>() == 0);

  // Padding between and after tokens, whose content does not matter.
  const Tensor dense_ids = random_ids(1, 5, 3, false), dense = randn({1, 5, 4});
  const Tensor places = torch::tensor({0, 2, 3, 6, 7}, torch::kInt64);
  const Tensor padded = torch::full({1, 9, 4}, std::numeric_limits<double>::quiet_NaN(), torch::kFloat64);
  const Tensor padded_ids = torch::full({1, 9}, -1, torch::kInt64);
  padded.index_copy_(1, places, dense);
  padded_ids.index_copy_(1, places, dense_ids);
  const Tensor y = layer->forward(padded, padded_ids);
  require_close("padded", y.index_select(1, places), layer->forward(dense, dense_ids));
  REQUIRE(torch::equal(y.slice(1, 8, 9), torch::zeros({1, 1, 4}, torch::kFloat64)));
}

TEST_CASE("Modality is ids, a routing, one number or nothing; sorted rows stay sorted", "[layer]") {
  torch::manual_seed(5);
  MixtureOfMamba layer = make_layer(small());
  const Tensor x = randn({2, 5, 4}), ids = random_ids(2, 5, 3);
  const Tensor y = layer->forward(x, ids);
  const Routing routing = Routing::from_ids(ids, 3);
  REQUIRE(torch::equal(layer->forward(x, routing), y));
  REQUIRE(torch::equal(routing.unsort(layer->forward(routing.sort(x), routing, {.sorted = true})), y));
  REQUIRE(torch::equal(layer->forward(x, 2), layer->forward(x, torch::full({2, 5}, 2))));
  MixtureOfMamba shared = make_layer(small().decouple({}));
  REQUIRE(torch::equal(shared->forward(x, 1), shared->forward(x, torch::zeros({2, 5}, torch::kInt64))));
}

TEST_CASE("Mamba is the mixture of one modality; other ids count as one, -1 is padding", "[mamba]") {
  torch::manual_seed(6);
  nn::Mamba dense(nn::MambaOptions(4).d_state(3));
  dense->to(torch::kFloat64);
  const Tensor x = leaf({2, 5, 4}), ids = random_ids(2, 5, 3);
  require_close("dense", dense->forward(x), reference_layer(*dense, x, torch::zeros({2, 5}, torch::kInt64)));
  require_close("padding", dense->forward(x, ids), reference_layer(*dense, x, ids.clamp_max(0)));
  REQUIRE(torch::equal(dense->forward(x, Routing::from_ids(ids, 3)), dense->forward(x, ids)));
  torch::manual_seed(7);
  MixtureOfMamba one(nn::MambaOptions(4).decouple(kProjections));
  torch::manual_seed(7);
  nn::Mamba same(4);
  REQUIRE(torch::equal(one->in_proj.weights()[0], same->in_proj.weights()[0]));
  REQUIRE(same->named_parameters().keys() ==
          std::vector<std::string>({"A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias",
                                    "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "out_proj.weight"}));
  // In a Sequential, with the arguments' defaults.
  torch::nn::Sequential stack(nn::RMSNorm(4), nn::Mamba(4));
  REQUIRE(stack->forward(torch::randn({1, 3, 4})).sizes().vec() == std::vector<int64_t>({1, 3, 4}));
}

TEST_CASE("Parameters begin as in the Mamba paper", "[initialisation]") {
  torch::manual_seed(8);
  MixtureOfMamba layer(MixtureOfMambaOptions(64, 2).dt_min(0.01).dt_max(0.02));
  REQUIRE(torch::allclose(layer->A_log.exp(), torch::arange(1, 17).to(torch::kFloat32).expand({128, 16})));
  REQUIRE(torch::equal(layer->D, torch::ones({128})));
  for (const Tensor& bias : layer->dt_proj.biases()) {
    const Tensor delta = torch::softplus(bias);
    REQUIRE(delta.min().item<double>() >= 0.0099);
    REQUIRE(delta.max().item<double>() <= 0.0201);
  }
  REQUIRE_FALSE(torch::equal(layer->dt_proj.biases()[0], layer->dt_proj.biases()[1]));
  REQUIRE(layer->dt_proj.weights()[0].abs().max().item<double>() <= 0.5);  // dt_rank^-0.5
  MixtureOfMamba constant(MixtureOfMambaOptions(64, 2).dt_init("constant"));
  REQUIRE(torch::equal(constant->dt_proj.weights()[1], torch::full({128, 4}, 0.5)));
  REQUIRE(layer->parameters_without_weight_decay().size() == 4);

  MixtureOfMamba narrow(MixtureOfMambaOptions(16, 2).dtype(torch::kBFloat16));
  REQUIRE(narrow->in_proj.weights()[0].scalar_type() == torch::kBFloat16);
  REQUIRE(narrow->A_log.scalar_type() == torch::kFloat32);
  const auto [y, state] = narrow->forward_with_state(torch::randn({1, 4, 16}, torch::kBFloat16), 0);
  REQUIRE(y.scalar_type() == torch::kBFloat16);
  const nn::MambaState empty = narrow->allocate_state(1);
  REQUIRE(empty.conv.scalar_type() == state.conv.scalar_type());
  REQUIRE(empty.ssm.scalar_type() == state.ssm.scalar_type());
}

TEST_CASE("Modules are cloned, converted, saved, loaded and printed", "[module]") {
  torch::manual_seed(9);
  MixtureOfMamba layer = make_layer(small().decouple({"in_proj", "dt_proj"}).bcdt_norm(true));
  const Tensor x = randn({1, 4, 4}), ids = random_ids(1, 4, 3);
  const Tensor y = layer->forward(x, ids);

  const auto copy = std::dynamic_pointer_cast<nn::MixtureOfMambaImpl>(layer->clone());
  REQUIRE(torch::equal(copy->forward(x, ids), y));
  {
    torch::NoGradGuard no_grad;
    copy->D.add_(1);
    copy->in_proj.weights()[1].mul_(2);  // the copy's own, and the one that its forward reads
  }
  REQUIRE(torch::equal(layer->forward(x, ids), y));
  REQUIRE_FALSE(torch::equal(copy->forward(x, ids), y));

  std::stringstream file;
  torch::save(layer, file);
  MixtureOfMamba loaded(layer->options);
  loaded->to(torch::kFloat64);
  torch::load(loaded, file);
  REQUIRE(torch::equal(loaded->forward(x, ids), y));

  layer->to(torch::kFloat32);
  REQUIRE(layer->forward(x.to(torch::kFloat32), ids).scalar_type() == torch::kFloat32);

  std::ostringstream printed;
  printed << *layer;
  REQUIRE_THAT(
      printed.str(),
      ContainsSubstring("mixture_of_mamba::nn::MixtureOfMamba(d_model=4, num_modalities=3, "
                        "decouple=[in_proj, dt_proj])") &&
          ContainsSubstring("(in_proj): mixture_of_mamba::nn::ModalityLinear(in_features=4, out_features=16, "
                            "num_modalities=3)") &&
          ContainsSubstring("(b_layernorm): mixture_of_mamba::nn::RMSNorm(3, eps=1e-06)"));
  const auto names = layer->named_parameters().keys();
  for (const char* name : {"in_proj.2.weight", "dt_proj.0.bias", "x_proj.weight", "conv1d.bias", "A_log"}) {
    REQUIRE(std::find(names.begin(), names.end(), name) != names.end());
  }
}

TEST_CASE("A graph that keeps a state is told when a step writes over it", "[layer]") {
  torch::manual_seed(8);
  for (const bool one_operator : {true, false}) {
    MixtureOfMamba layer = make_layer(small(2).bcdt_norm(!one_operator));
    const Tensor x = torch::randn({2, 5, 4}, torch::kDouble), ids = random_ids(2, 5, 2);
    nn::MambaState state = std::get<1>(layer->forward_with_state(x, ids)).detach();
    const Tensor y = std::get<0>(layer->forward_with_state(x, ids, {.state = state}));
    layer->step(x.narrow(1, 0, 1), state, ids.narrow(1, 0, 1));
    REQUIRE(error_of([&] { y.sum().backward(); }).find("modified by an inplace operation") !=
            std::string::npos);
  }
}

TEST_CASE("Errors of the layer name the argument, the requirement and what came", "[errors]") {
  REQUIRE(
      error_of([] {
        MixtureOfMamba(MixtureOfMambaOptions(4, 2).decouple({"in_proj", "conv"}));
      }) ==
      "decouple must name projections among ('in_proj', 'x_proj', 'dt_proj', 'out_proj', 'A_log', 'D'), got "
      "['conv']");
  REQUIRE(error_of([] { MixtureOfMamba(4, 0); }) == "num_modalities must be at least 1, got 0");
  REQUIRE(error_of([] { MixtureOfMamba(MixtureOfMambaOptions(4, 2).dt_init("zero")); }) ==
          "dt_init must be \"random\" or \"constant\", got 'zero'");
  REQUIRE(error_of([] { MixtureOfMamba(MixtureOfMambaOptions(4, 2).memory("none")); }) ==
          "memory must be \"default\" or \"lean\", got 'none'");
  REQUIRE_THAT(
      error_of([] { MixtureOfMamba(MixtureOfMambaOptions(4, 2).dt_limit(std::make_pair(0.2, 0.1))); }),
      StartsWith("dt_limit must have 0 <= low < high, got (0.2, 0.1)"));
  MixtureOfMamba layer(4, 2);
  const Tensor x = torch::randn({2, 3, 4});
  REQUIRE(error_of([&] {
            layer->forward(torch::randn({2, 3, 5}), 0);
          }) == "x must have shape [batch, length, d_model = 4], got [2, 3, 5]");
  REQUIRE(error_of([&] { layer->allocate_state(-1); }) == "batch must be an integer of at least 0, got -1");
  REQUIRE(error_of([&] { layer->allocate_state(1, torch::kInt64); }) ==
          "dtype must be a floating type, got torch.int64");
  REQUIRE(error_of([&] { layer->allocate_state(1, torch::kBFloat16, torch::kHalf); }) ==
          "ssm_dtype must be torch.float32 or torch.bfloat16 beside activations of torch.bfloat16, got "
          "torch.float16");
  REQUIRE(error_of([&] { layer->allocate_state(1).to(torch::kBFloat16); }) ==
          "ssm_dtype must be torch.float32 beside activations of torch.float32, got torch.bfloat16");
  REQUIRE(error_of([&] { nn::ModalityLinear(2, 3, 0); }) == "num_modalities must be at least 1, got 0");
  const Routing three = Routing::from_ids(random_ids(2, 3, 3), 3);
  REQUIRE(error_of([&] { nn::ModalityLinear(4, 3, 2)->forward(x, three); }) ==
          "routing must be a Routing of 2 modalities, got 3");
  REQUIRE(error_of([&] { layer->forward(x); }) ==
          "modality must be ids [batch, length] or a Routing (or one int for all tokens, or modality_masks "
          "in its "
          "place), since the layer has 2 modalities, got None");
  REQUIRE(error_of([&] { layer->forward(x, 2); }) ==
          "modality must lie in 0 .. num_modalities - 1 = 1 when it is an int, got 2");
  REQUIRE(error_of([&] { layer->forward(x, Routing::from_ids(random_ids(2, 3, 3), 3)); }) ==
          "modality must be a Routing of 2 modalities, got 3");
  REQUIRE(error_of([&] { layer->forward(x, Routing::from_ids(random_ids(3, 2, 2), 2)); }) ==
          "modality must have the batch and length of x, [2, 3], got [3, 2]");
}

}  // namespace mixture_of_mamba::testing
