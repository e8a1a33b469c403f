// SPDX-License-Identifier: Apache-2.0
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "support.h"

namespace mixture_of_mamba::testing {

namespace {

// Seven tokens of three modalities in two rows, two of them padding.
Routing small_routing() {
  return Routing::from_ids(torch::tensor({{1, -1, 0, 2}, {2, 1, -1, 0}}, torch::kInt64), 3);
}

struct ScanProblem {
  Routing routing = small_routing();
  Tensor u = leaf({2, 4, 3}), dt = leaf({2, 4, 3}), A = (-randn({3, 2}).abs()).requires_grad_();
  Tensor B = leaf({2, 4, 2}), C = leaf({2, 4, 2}), D = leaf({3}), z = leaf({2, 4, 3}), dt_bias = leaf({3, 3});
  Tensor initial_state = leaf({2, 3, 2});

  SelectiveScanOptions options() const {
    return {.D = D,
            .z = z,
            .dt_bias = dt_bias,
            .rows = routing.rows,
            .offsets = routing.offsets,
            .initial_state = initial_state};
  }
  std::vector<std::pair<std::string, Tensor>> inputs() const {
    return {{"u", u},
            {"dt", dt},
            {"A", A},
            {"B", B},
            {"C", C},
            {"D", D},
            {"z", z},
            {"dt_bias", dt_bias},
            {"initial_state", initial_state}};
  }
};

struct BlockProblem {
  Routing routing = small_routing();
  Tensor x = leaf({2, 4, 3});
  MambaBlockParameters p;
  MambaBlockOptions o;

  BlockProblem() {
    for (int m = 0; m < 3; ++m) {
      p.in_weight.push_back(leaf({8, 3}));
      p.in_bias.push_back(leaf({8}));
      p.dt_weight.push_back(leaf({4, 2}));
      p.dt_bias.push_back(leaf({4}));
    }
    p.x_weight.push_back(leaf({6, 4}));
    p.conv_weight = leaf({4, 3});
    p.conv_bias = leaf({4});
    p.A_log = leaf({4, 2});
    p.D = leaf({4});
    p.out_weight.push_back(leaf({3, 4}));
    o = {.rows = routing.rows,
         .offsets = routing.offsets,
         .conv_state = leaf({2, 2, 4}),
         .ssm_state = leaf({2, 4, 2})};
  }
  std::vector<std::pair<std::string, Tensor>> inputs() const {
    std::vector<std::pair<std::string, Tensor>> named{{"x", x},
                                                      {"conv_weight", p.conv_weight},
                                                      {"conv_bias", *p.conv_bias},
                                                      {"A_log", p.A_log},
                                                      {"D", p.D},
                                                      {"conv_state", *o.conv_state},
                                                      {"ssm_state", *o.ssm_state},
                                                      {"x_weight", p.x_weight[0]},
                                                      {"out", p.out_weight[0]}};
    for (int m = 0; m < 3; ++m) {
      named.insert(named.end(), {{"in_weight", p.in_weight[m]},
                                 {"in_bias", p.in_bias[m]},
                                 {"dt_weight", p.dt_weight[m]},
                                 {"dt_bias", p.dt_bias[m]}});
    }
    return named;
  }
  Tensors run() const {
    const auto [y, conv, ssm] = mamba_block(x, p, o);
    return {y, conv, ssm};
  }
};

bool has_kernel(const std::string& name, c10::DispatchKey key) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(("mixture_of_mamba::" + name).c_str(), "")
      .hasKernelForDispatchKey(key);
}

}  // namespace

TEST_CASE("Without Python the registrations of C++ are the process's", "[registration]") {
  REQUIRE(initialize());
  REQUIRE(initialize());  // once is enough, and twice is no error
  using c10::DispatchKey;
  for (const char* name : {"permute_rows", "grouped_linear", "grouped_linear_backward", "causal_conv1d",
                           "causal_conv1d_backward", "selective_scan", "selective_scan_backward",
                           "mamba_block", "mamba_block_backward"}) {
    INFO(name);
    REQUIRE(has_kernel(name, DispatchKey::CPU));
    REQUIRE(has_kernel(name, DispatchKey::Autograd));
    REQUIRE(has_kernel(name, DispatchKey::Meta));
  }
  for (const char* name : {"grouped_linear", "causal_conv1d", "mamba_block"}) {
    REQUIRE(has_kernel(name, DispatchKey::AutocastCPU));
    REQUIRE(has_kernel(name, DispatchKey::AutocastCUDA));
  }
  REQUIRE_FALSE(has_kernel("selective_scan", DispatchKey::AutocastCPU));
  const std::string isa = cpu_isa();
  REQUIRE((isa == "baseline" || isa == "avx2" || isa == "avx512"));
}

TEST_CASE("Gradients of selective_scan are central differences", "[gradcheck]") {
  torch::manual_seed(1);
  const ScanProblem problem;
  for (const bool reverse : {false, true}) {
    const auto run = [&]() -> Tensors {
      auto options = problem.options();
      options.reverse = reverse;
      const auto [out, state] =
          selective_scan(problem.u, problem.dt, problem.A, problem.B, problem.C, options);
      return {out, state};
    };
    require_gradients(run, problem.inputs());
  }
  // Packed, without what is optional; and of the state alone, where no gradient of `out` arrives.
  const Tensor cu_seqlens = torch::tensor({0, 3, 3, 8}, torch::kInt32);
  const auto packed = [&](bool state_only) {
    return [&, state_only]() -> Tensors {
      const auto [out, state] = selective_scan(problem.u, problem.dt, problem.A, problem.B, problem.C,
                                               {.cu_seqlens = cu_seqlens, .softplus = false});
      return state_only ? Tensors{state} : Tensors{out, state};
    };
  };
  const auto inputs = problem.inputs();
  require_gradients(packed(false), {inputs.begin(), inputs.begin() + 5});
  require_gradients(packed(true), {inputs.begin(), inputs.begin() + 5});
}

TEST_CASE("Gradients of causal_conv1d are central differences", "[gradcheck]") {
  torch::manual_seed(2);
  const Routing routing = small_routing();
  const Tensor x = leaf({2, 4, 3}), weight = leaf({3, 3}), bias = leaf({3}), state = leaf({2, 2, 3});
  for (const bool silu : {true, false}) {
    const auto run = [&]() -> Tensors {
      const auto [y, final_state] = causal_conv1d(
          x, weight, bias,
          {.rows = routing.rows, .offsets = routing.offsets, .initial_state = state, .silu = silu});
      return {y, final_state};
    };
    require_gradients(run, {{"x", x}, {"weight", weight}, {"bias", bias}, {"state", state}});
  }
  const auto bare = [&]() -> Tensors { return {std::get<1>(causal_conv1d(x, weight))}; };
  require_gradients(bare, {{"x", x}, {"weight", weight}});
}

TEST_CASE("Gradients of grouped_linear and permute_rows are central differences", "[gradcheck]") {
  torch::manual_seed(3);
  const Routing routing = small_routing();
  const Tensor x = leaf({2, 4, 3});
  const Tensors weight{leaf({2, 3}), leaf({2, 3}), leaf({2, 3})}, bias{leaf({2}), leaf({2}), leaf({2})};
  const auto run = [&]() -> Tensors {
    const Tensor sorted = permute_rows(x, routing.order, routing.rows);
    return {grouped_linear(sorted, weight, bias, routing.offsets, routing.host_offsets)};
  };
  require_gradients(run,
                    {{"x", x}, {"weight[0]", weight[0]}, {"weight[2]", weight[2]}, {"bias[1]", bias[1]}});

  // Only what is asked for, and gradients in the dtype of their inputs.
  const Tensor half_bias = torch::randn({2}, torch::kBFloat16).requires_grad_();
  const Tensor frozen = x.detach();
  const Tensor y = grouped_linear(frozen, weight, {half_bias, half_bias, half_bias}, routing.offsets);
  const Tensors grads = gradients({y}, {half_bias});
  REQUIRE(grads[0].scalar_type() == torch::kBFloat16);
}

TEST_CASE("Gradients of mamba_block are central differences", "[gradcheck]") {
  torch::manual_seed(4);
  BlockProblem problem;
  const auto run = [&] { return problem.run(); };
  require_gradients(run, problem.inputs());
  problem.o.lean = true;
  require_gradients(run, problem.inputs());
}

TEST_CASE("A parameter that is frozen gets no gradient, the others the same as before", "[autograd]") {
  torch::manual_seed(5);
  BlockProblem problem;
  const Tensor expected = gradients(problem.run(), {problem.p.D})[0];
  for (auto& weight : problem.p.in_weight) weight = weight.detach();
  problem.x = problem.x.detach();
  const Tensors outputs = problem.run();
  REQUIRE(torch::equal(gradients(outputs, {problem.p.D})[0], expected));
  for (const Tensor& output : outputs) REQUIRE(output.requires_grad());
  torch::NoGradGuard no_grad;
  for (const Tensor& output : problem.run()) REQUIRE_FALSE(output.requires_grad());
}

TEST_CASE("The second derivative is an error, not zero; that of permute_rows is right", "[autograd]") {
  torch::manual_seed(6);
  const ScanProblem problem;
  const auto [out, state] =
      selective_scan(problem.u, problem.dt, problem.A, problem.B, problem.C, problem.options());
  const auto first =
      torch::autograd::grad({out.square().sum()}, {problem.u}, {}, std::nullopt, /*create_graph=*/true);
  const std::string text = error_of([&] { torch::autograd::grad({first[0].sum()}, {problem.u}); });
  REQUIRE_THAT(text, ContainsSubstring(
                         "mixture_of_mamba::selective_scan_backward has no derivative: double backward is "
                         "not supported"));

  const Routing& routing = problem.routing;
  const Tensor x = leaf({2, 4, 3});
  const Tensor cube = permute_rows(x, routing.order, routing.rows).pow(3).sum();
  const auto slope = torch::autograd::grad({cube}, {x}, {}, std::nullopt, true);
  const auto curvature = torch::autograd::grad({slope[0].sum()}, {x});
  require_close("second derivative", curvature[0], 6 * x.detach());
}

TEST_CASE("Meta kernels tell what the operators return, forward and backward", "[meta]") {
  torch::manual_seed(7);
  BlockProblem real;
  const auto to_meta = [](const Tensor& tensor) {
    return tensor.detach().to(torch::kMeta).requires_grad_(tensor.requires_grad());
  };
  BlockProblem meta = real;
  meta.x = to_meta(real.x);
  for (auto* list : {&meta.p.in_weight, &meta.p.in_bias, &meta.p.x_weight, &meta.p.dt_weight, &meta.p.dt_bias,
                     &meta.p.out_weight}) {
    for (Tensor& tensor : *list) tensor = to_meta(tensor);
  }
  for (Tensor* tensor : {&meta.p.conv_weight, &meta.p.A_log, &meta.p.D, &*meta.p.conv_bias, &*meta.o.rows,
                         &*meta.o.offsets, &*meta.o.conv_state, &*meta.o.ssm_state}) {
    *tensor = to_meta(*tensor);
  }
  const auto compare = [](const Tensors& got, const Tensors& expected) {
    REQUIRE(got.size() == expected.size());
    for (size_t i = 0; i < got.size(); ++i) {
      INFO(i);
      REQUIRE(got[i].is_meta());
      REQUIRE(got[i].sizes().vec() == expected[i].sizes().vec());
      REQUIRE(got[i].strides().vec() == expected[i].strides().vec());
      REQUIRE(got[i].scalar_type() == expected[i].scalar_type());
    }
  };
  const auto tensors = [](const BlockProblem& problem) {
    Tensors list;
    for (const auto& [name, tensor] : problem.inputs()) list.push_back(tensor);
    return list;
  };
  const auto grads = [&](const Tensors& outputs, const Tensors& inputs) {
    return torch::autograd::grad({outputs[0].sum() + outputs[2].sum()}, inputs);
  };
  const Tensors real_out = real.run(), meta_out = meta.run();
  compare(meta_out, real_out);
  compare(grads(meta_out, tensors(meta)), grads(real_out, tensors(real)));

  // The operators one by one, in bfloat16.
  const auto shapes = [&](torch::Device device) {
    const auto make = [&](std::initializer_list<int64_t> sizes, torch::Dtype dtype = torch::kBFloat16) {
      return torch::zeros(sizes, torch::TensorOptions().dtype(dtype).device(device))
          .requires_grad_(c10::isFloatingType(dtype));
    };
    const Tensor ids = make({2, 20}, torch::kInt64), u = make({2, 20, 3});
    const auto [rows, order, offsets] = modality_routing(ids, 2, false);
    const Tensor weight = make({5, 3}), bias = make({5}, torch::kFloat32);
    const Tensor A = make({3, 4}, torch::kFloat32), B = make({2, 20, 4});
    const auto [y, conv] = causal_conv1d(u, make({3, 4}), std::nullopt, {.rows = rows, .offsets = offsets});
    const auto [out, ssm] = selective_scan(y, y, A, B, B, {.z = u});
    const Tensor linear =
        grouped_linear(permute_rows(out, order, rows), {weight, weight}, {bias, bias}, offsets);
    Tensors all{rows, order, offsets, y, conv, out, ssm, linear};
    const Tensors grads =
        torch::autograd::grad({linear.sum().to(torch::kFloat32) + ssm.sum()}, {u, A, B, weight, bias});
    all.insert(all.end(), grads.begin(), grads.end());
    return all;
  };
  compare(shapes(torch::kMeta), shapes(torch::kCPU));
}

TEST_CASE("Autocast runs projections and convolution in its dtype, the scan in the widest", "[autocast]") {
  torch::manual_seed(8);
  const Tensor x = torch::randn({1, 6, 8}).requires_grad_();
  nn::MixtureOfMamba layer(nn::MixtureOfMambaOptions(8, 2).d_state(4));
  const Routing routing = Routing::from_ids(random_ids(1, 6, 2), 2);
  const Tensor expected = layer->forward(x, routing);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const Tensor y = layer->forward(x, routing);
  const Tensor linear = grouped_linear(x, layer->in_proj.weights(), {}, routing.offsets);
  const Tensor scan = std::get<0>(selective_scan(x.to(torch::kBFloat16), x, -torch::ones({8, 2}),
                                                 torch::randn({1, 6, 2}), torch::randn({1, 6, 2})));
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  REQUIRE(y.scalar_type() == torch::kBFloat16);
  REQUIRE(linear.scalar_type() == torch::kBFloat16);
  REQUIRE(scan.scalar_type() == torch::kBFloat16);  // of u; A and the state are float32 inside
  require_close("y", y.to(torch::kFloat32), expected, 0.03);
  y.sum().backward();
  REQUIRE(layer->in_proj.weights()[0].grad().scalar_type() == torch::kFloat32);
  REQUIRE(layer->A_log.grad().scalar_type() == torch::kFloat32);
}

TEST_CASE("Boxed calls leave alone what lies below them on the stack", "[boxed]") {
  torch::manual_seed(13);
  initialize();
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mixture_of_mamba::permute_rows", "");
  const Routing routing = small_routing();
  const auto below = [&](const Tensor& x) {
    torch::jit::Stack stack{int64_t{42}, x, routing.order.to(x.device()), routing.rows.to(x.device())};
    op.callBoxed(stack);
    REQUIRE(stack.size() == 2);
    REQUIRE(stack[0].toInt() == 42);
    return stack[1].toTensor();
  };
  REQUIRE_FALSE(below(randn({2, 4, 3})).requires_grad());
  REQUIRE(below(leaf({2, 4, 3})).requires_grad());
  REQUIRE(below(randn({2, 4, 3}).to(torch::kMeta)).is_meta());
}

TEST_CASE("Steps update their state in place and record no gradient", "[step]") {
  torch::manual_seed(9);
  const Tensor u = randn({2, 1, 3}), A = -randn({3, 2}).abs(), B = randn({2, 1, 2}), start = randn({2, 3, 2});
  const auto [out, final_state] = selective_scan(u, u, A, B, B, {.initial_state = start});
  Tensor state = start.clone();
  REQUIRE(torch::equal(selective_scan_step(u, state, u, A, B, B), out));
  REQUIRE(torch::equal(state, final_state));
  const Tensor wanted = u.clone().requires_grad_();
  REQUIRE(error_of([&] { selective_scan_step(wanted, state, u, A, B, B); }) ==
          "selective_scan_step is for inference: it updates its state in place and records no gradient; call "
          "it under "
          "torch.no_grad(), or use selective_scan with initial_state for a differentiable step");
  Tensor conv_state = randn({2, 1, 3});
  REQUIRE_THAT(error_of([&] {
                 causal_conv1d_step(wanted, conv_state, randn({3, 2}));
               }),
               StartsWith("causal_conv1d_step is for inference"));
}

TEST_CASE("A step of the whole block is the block, in place", "[step]") {
  torch::manual_seed(10);
  const BlockProblem problem;
  Tensor conv_state = problem.o.conv_state->detach().clone(),
         ssm_state = problem.o.ssm_state->detach().clone();
  const auto step = [&] {
    return mamba_block_step(problem.x, conv_state, ssm_state, problem.p,
                            {.rows = problem.o.rows, .offsets = problem.o.offsets});
  };
  REQUIRE_THAT(error_of(step), StartsWith("mamba_block_step is for inference"));
  const torch::NoGradGuard no_grad;
  const auto [y, new_conv_state, new_ssm_state] = mamba_block(problem.x, problem.p, problem.o);
  REQUIRE(torch::equal(step(), y));
  REQUIRE(torch::equal(conv_state, new_conv_state));
  REQUIRE(torch::equal(ssm_state, new_ssm_state));
}

TEST_CASE("Errors of the operators name the argument, the requirement and what came", "[errors]") {
  const Tensor u = randn({2, 4, 3}), A = randn({3, 2}), B = randn({2, 4, 2});
  REQUIRE_THAT(
      error_of([&] {
        selective_scan(u, u, A, randn({2, 4, 5}), B);
      }),
      ContainsSubstring("mixture_of_mamba::selective_scan: B must have shape [batch, length, states]") &&
          ContainsSubstring("got [2, 4, 5]"));
  REQUIRE_THAT(error_of([&] {
                 Routing::from_ids(torch::full({1, 3}, 7), 2);
               }),
               ContainsSubstring("ids must lie in -1 .. num_modalities - 1 = 1 (-1 is padding), got 7"));
  REQUIRE(error_of([&] { Routing::from_ids(torch::zeros({3}, torch::kInt64), 2); }) ==
          "ids must be a tensor of shape [batch, length], got torch.int64 [3]");
  REQUIRE(error_of([&] {
            small_routing().sort(randn({4, 2, 3}));
          }) == "x must have shape [batch, length, ...] = [2, 4], got [4, 2, 3]");
}

TEST_CASE("A routing sorts and unsorts, and knows its padding", "[routing]") {
  torch::manual_seed(10);
  const Tensor ids = torch::tensor({{1, -1, 0, 2}, {2, 1, 0, 0}}, torch::kInt64);
  const Routing routing = Routing::from_ids(ids, 3);
  REQUIRE(routing.num_modalities() == 3);
  REQUIRE(routing.num_tokens() == 8);
  REQUIRE(routing.has_padding);
  REQUIRE(torch::equal(routing.sort(ids).flatten(), torch::tensor({0, 0, 0, 1, 1, 2, 2, -1}, torch::kInt64)));
  REQUIRE(torch::equal(routing.unsort(routing.sort(ids)), ids));
  REQUIRE(torch::equal(*routing.host_offsets, torch::tensor({0, 3, 5, 7}, torch::kInt64)));
  REQUIRE(torch::equal(routing.merged().offsets, torch::tensor({0, 7}, torch::kInt32)));
  REQUIRE_FALSE(Routing::from_ids(ids.clamp_min(0), 3).has_padding);
  Routing device_only = routing;
  device_only.host_offsets.reset();
  REQUIRE(torch::equal(*device_only.with_host_offsets().host_offsets, *routing.host_offsets));
}

}  // namespace mixture_of_mamba::testing
