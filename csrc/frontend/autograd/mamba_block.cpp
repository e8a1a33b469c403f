// SPDX-License-Identifier: Apache-2.0
#include "mixture_of_mamba/ops.h"
#include "registration.h"

namespace mixture_of_mamba {

namespace frontend {
namespace {

struct MambaBlock {
  static constexpr const char* kName = "mamba_block";
  static constexpr const char* kBackwardName = "mamba_block_backward";
  static constexpr size_t kDifferentiable = 3;

  // Arguments of forward. Those of backward: grad_y, grad_conv_state, grad_ssm_state, these up to the states,
  // xz, x_dbl, u, checkpoints, needs.
  enum : size_t {
    kX,
    kInWeight,
    kInBias,
    kConvWeight,
    kConvBias,
    kXWeight,
    kDtWeight,
    kDtBias,
    kALog,
    kD,
    kOutWeight,
    kOutBias,
    kRows,
    kOffsets,
    kHostOffsets,
    kCuSeqlens,
    kConvState,
    kSsmState,
    kLean,
    kKeep
  };
  // Which gradients are wanted, as bits.
  enum : int64_t { kNeedsX = 1, kNeedsIn = 2, kNeedsXProj = 4, kNeedsDtProj = 8, kNeedsOut = 16 };

  static Values meta(const Values& in) {
    const at::Tensor x = tensor_at(in, kX), conv_weight = tensor_at(in, kConvWeight);
    const at::ScalarType acc = accumulation_dtype({x});
    const c10::SymInt tokens = x.sym_size(0) * x.sym_size(1), sequences = num_sequences(x, in[kCuSeqlens]);
    const c10::SymInt inner = conv_weight.sym_size(0), states = tensor_at(in, kALog).sym_size(1);
    const c10::SymInt rank = list_at(in, kDtWeight)[0].sym_size(1);
    const c10::SymInt slots = tokens / kCheckpointInterval + sequences;
    const bool keep = in[kKeep].toBool(), full = keep && !in[kLean].toBool();
    return {empty(x, {x.sym_size(0), x.sym_size(1), list_at(in, kOutWeight)[0].sym_size(0)}),
            empty(x, {sequences, conv_weight.sym_size(1) - 1, inner}),
            empty(x, {sequences, inner, states}, acc),
            keep ? empty(x, {tokens, 2 * inner}) : empty(x, {0}),
            keep ? empty(x, {tokens, rank + 2 * states}) : empty(x, {0}),
            full ? empty(x, {tokens, inner}) : empty(x, {0}),
            full ? empty(x, {slots, inner, states}, acc) : empty(x, {0}, acc)};
  }

  static Values backward_meta(const Values& in) {
    const Values forward(in.begin() + 3, in.begin() + 3 + kLean);
    const int64_t needs = in.back().toInt();
    const at::Tensor x = tensor_at(forward, kX);
    const at::ScalarType acc = accumulation_dtype({x});
    const auto one = [&](size_t i, at::ScalarType absent) { return empty_gradient(x, forward[i], absent); };
    const auto list = [&](size_t i, bool wanted) { return empty_gradients(list_at(forward, i), wanted); };
    return {needs & kNeedsX ? one(kX, acc) : empty(x, {0}),
            list(kInWeight, needs & kNeedsIn),
            list(kInBias, true),
            one(kConvWeight, acc),
            one(kConvBias, acc),
            list(kXWeight, needs & kNeedsXProj),
            list(kDtWeight, needs & kNeedsDtProj),
            list(kDtBias, true),
            one(kALog, acc),
            one(kD, acc),
            list(kOutWeight, needs & kNeedsOut),
            list(kOutBias, true),
            one(kConvState, x.scalar_type()),
            one(kSsmState, acc)};
  }

  static Values backward(const BackwardCall& in) {
    const at::Tensor x = tensor_at(in.arguments, kX);
    const auto grad = [&](size_t i) {
      return in.grads[i].defined() ? c10::IValue(in.grads[i]) : c10::IValue();
    };
    const auto bit = [&](size_t argument, int64_t value) { return in.needs[argument] ? value : int64_t{0}; };
    const int64_t needs = bit(kX, kNeedsX) | bit(kInWeight, kNeedsIn) | bit(kXWeight, kNeedsXProj) |
                          bit(kDtWeight, kNeedsDtProj) | bit(kOutWeight, kNeedsOut);
    Values arguments{grad(0), grad(1), grad(2)};
    if (arguments[0].isNone()) {
      const c10::SymInt d_model = list_at(in.arguments, kOutWeight)[0].sym_size(0);
      arguments[0] = x.new_zeros_symint({x.sym_size(0), x.sym_size(1), d_model});
    }
    arguments.insert(arguments.end(), in.arguments.begin(), in.arguments.begin() + kLean);
    arguments.insert(arguments.end(), in.kept.begin(), in.kept.end());
    arguments.emplace_back(needs);
    const Values out = call(kBackwardName, std::move(arguments));
    Values grads(in.arguments.size());
    for (size_t i = kX; i <= kOutBias; ++i) grads[i] = given(out[i], in.arguments[i]);
    if (!in.needs[kX]) grads[kX] = {};
    grads[kConvState] = given(out[12], in.arguments[kConvState]);
    grads[kSsmState] = given(out[13], in.arguments[kSsmState]);
    return grads;
  }

  static Values step_meta(const Values& in) {
    const at::Tensor x = tensor_at(in, kX);
    return {empty(x, {x.sym_size(0), x.sym_size(1), list_at(in, kOutWeight)[0].sym_size(0)})};
  }

  // What autocast leaves alone.
  static constexpr uint64_t kWide = 1u << kDtBias | 1u << kALog | 1u << kD | 1u << kSsmState;
};

}  // namespace

void register_mamba_block(torch::Library& library) {
  register_differentiable<MambaBlock>(library);
  register_autocast<MambaBlock::kWide>(library, MambaBlock::kName);
  register_meta<&MambaBlock::step_meta>(library, "mamba_block_step");
}

}  // namespace frontend

namespace {

frontend::Values with_parameters(const torch::Tensor& x, const MambaBlockParameters& p) {
  return {x,           p.in_weight, p.in_bias, p.conv_weight, p.conv_bias,  p.x_weight,
          p.dt_weight, p.dt_bias,   p.A_log,   p.D,           p.out_weight, p.out_bias};
}

}  // namespace

std::tuple<torch::Tensor, torch::Tensor, torch::Tensor> mamba_block(const torch::Tensor& x,
                                                                    const MambaBlockParameters& p,
                                                                    const MambaBlockOptions& o) {
  frontend::Values arguments = with_parameters(x, p);
  arguments.insert(arguments.end(),
                   {o.rows, o.offsets, o.host_offsets, o.cu_seqlens, o.conv_state, o.ssm_state});
  const bool keep = frontend::wants_gradient(frontend::tensors_of(arguments));
  arguments.insert(arguments.end(), {o.lean, keep});
  const auto out = frontend::call("mamba_block", std::move(arguments));
  return {out[0].toTensor(), out[1].toTensor(), out[2].toTensor()};
}

torch::Tensor mamba_block_step(const torch::Tensor& x, torch::Tensor& conv_state, torch::Tensor& ssm_state,
                               const MambaBlockParameters& p, const MambaBlockStepOptions& o) {
  frontend::Values arguments = with_parameters(x, p);
  arguments.insert(arguments.end(), {o.rows, o.offsets, o.host_offsets, conv_state, ssm_state});
  const frontend::variable_list tensors = frontend::tensors_of(arguments);
  frontend::forbid_gradients("mamba_block_step", {tensors.begin(), tensors.end()});
  const auto out = frontend::call("mamba_block_step", std::move(arguments));
  frontend::mark_written({conv_state, ssm_state});
  return out[0].toTensor();
}

}  // namespace mixture_of_mamba
