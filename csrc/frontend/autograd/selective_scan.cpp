// SPDX-License-Identifier: Apache-2.0
#include "mixture_of_mamba/ops.h"
#include "registration.h"

namespace mixture_of_mamba {

namespace frontend {
namespace {

struct SelectiveScan {
  static constexpr const char* kName = "selective_scan";
  static constexpr const char* kBackwardName = "selective_scan_backward";
  static constexpr size_t kDifferentiable = 2;

  // Arguments of forward. Those of backward: grad_out, grad_final_state, these up to the initial state,
  // checkpoints, softplus, reverse.
  enum : size_t {
    kU,
    kDt,
    kA,
    kB,
    kC,
    kD,
    kZ,
    kDtBias,
    kRows,
    kOffsets,
    kCuSeqlens,
    kInitialState,
    kSoftplus,
    kReverse,
    kCheckpoint
  };

  static at::ScalarType accumulation(const Values& in, size_t first = 0) {
    return accumulation_dtype({tensor_at(in, first + kU), tensor_at(in, first + kDt),
                               tensor_at(in, first + kB), tensor_at(in, first + kC),
                               tensor_at(in, first + kZ)});
  }

  static Values meta(const Values& in) {
    const at::Tensor u = tensor_at(in, kU), A = tensor_at(in, kA);
    const c10::SymInt sequences = num_sequences(u, in[kCuSeqlens]);
    const c10::SymInt slots = u.sym_size(0) * u.sym_size(1) / kCheckpointInterval + sequences;
    const at::ScalarType acc = accumulation(in);
    const c10::SymInt channels = A.sym_size(0), states = A.sym_size(1);
    return {empty(u, u.sym_sizes()), empty(u, {sequences, channels, states}, acc),
            in[kCheckpoint].toBool() ? empty(u, {slots, channels, states}, acc) : empty(u, {0}, acc)};
  }

  static Values backward_meta(const Values& in) {
    constexpr size_t kFirst = 2;
    const at::ScalarType acc = accumulation(in, kFirst);
    at::ScalarType io = acc == at::kDouble ? acc : tensor_at(in, kFirst + kU).scalar_type();
    for (const size_t i : {kDt, kB, kC, kZ}) {
      if (const at::Tensor x = tensor_at(in, kFirst + i); x.defined())
        io = at::promote_types(io, x.scalar_type());
    }
    Values out;
    for (const size_t i : {kU, kDt, kA, kB, kC, kD, kZ, kDtBias, kInitialState}) {
      const bool parameter = i == kA || i == kD || i == kDtBias || i == kInitialState;
      out.emplace_back(empty_gradient(tensor_at(in, kFirst), in[kFirst + i], parameter ? acc : io));
    }
    return out;
  }

  static Values backward(const BackwardCall& in) {
    const at::Tensor u = tensor_at(in.arguments, kU);
    Values arguments{in.grads[0].defined() ? in.grads[0] : at::zeros_like(u),
                     in.grads[1].defined() ? c10::IValue(in.grads[1]) : c10::IValue()};
    arguments.insert(arguments.end(), in.arguments.begin(), in.arguments.begin() + kSoftplus);
    arguments.insert(arguments.end(), {in.kept[0], in.arguments[kSoftplus], in.arguments[kReverse]});
    const Values out = call(kBackwardName, std::move(arguments));
    Values grads(in.arguments.size());
    for (size_t i = 0; i <= kDtBias; ++i) grads[i] = given(out[i], in.arguments[i]);
    grads[kInitialState] = given(out[8], in.arguments[kInitialState]);
    return grads;
  }
};

}  // namespace

// No autocast: the scan belongs to the operators that run in the widest type of their inputs, and promotes by
// itself.
void register_selective_scan(torch::Library& library) {
  register_differentiable<SelectiveScan>(library);
  register_meta<&like_first_argument>(library, "selective_scan_step");
}

}  // namespace frontend

std::tuple<torch::Tensor, torch::Tensor> selective_scan(const torch::Tensor& u, const torch::Tensor& dt,
                                                        const torch::Tensor& A, const torch::Tensor& B,
                                                        const torch::Tensor& C,
                                                        const SelectiveScanOptions& o) {
  frontend::variable_list inputs{u, dt, A, B, C};
  for (const auto& input : {o.D, o.z, o.dt_bias, o.initial_state}) {
    if (input) inputs.push_back(*input);
  }
  const bool checkpoint = frontend::wants_gradient(inputs);
  const auto out =
      frontend::call("selective_scan", {u, dt, A, B, C, o.D, o.z, o.dt_bias, o.rows, o.offsets, o.cu_seqlens,
                                        o.initial_state, o.softplus, o.reverse, checkpoint});
  return {out[0].toTensor(), out[1].toTensor()};
}

torch::Tensor selective_scan_step(const torch::Tensor& u, torch::Tensor& state, const torch::Tensor& dt,
                                  const torch::Tensor& A, const torch::Tensor& B, const torch::Tensor& C,
                                  const SelectiveScanStepOptions& o) {
  frontend::forbid_gradients("selective_scan_step", {u, state, dt, A, B, C, o.D, o.z, o.dt_bias});
  const auto out = frontend::call(
      "selective_scan_step", {u, state, dt, A, B, C, o.D, o.z, o.dt_bias, o.rows, o.offsets, o.softplus});
  frontend::mark_written({state});
  return out[0].toTensor();
}

}  // namespace mixture_of_mamba
