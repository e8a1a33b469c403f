// SPDX-License-Identifier: Apache-2.0
#include "scan_of_pairs.h"

#include "mixture_of_mamba/ops.h"
#include "per_row.h"
#include "ssm_dtype.h"
#include "text.h"

namespace mixture_of_mamba::frontend {

namespace {

struct Pairs {
  at::Tensor u, delta, decay, ones;
};

Pairs pairs_of(const PairScan& scan) {
  const auto dtype = at::promote_types(scan.u.scalar_type(), at::kFloat);
  std::vector<int64_t> shape = scan.u.sizes().vec();
  shape.push_back(scan.B.size(-1));
  const at::Tensor A = of_rows(scan.A.to(dtype).flatten(1), scan.routing).view(shape);
  const at::Tensor delta = at::softplus(with_bias(scan.dt.to(dtype), scan.dt_bias, scan.routing));
  const at::Tensor deltas = (-delta.unsqueeze(-1) * A).flatten(2);
  const at::Tensor inputs = (-scan.u.to(dtype).unsqueeze(-1) * scan.B.to(dtype).unsqueeze(-2) / A).flatten(2);
  return {inputs, deltas, at::full({inputs.size(2), 1}, -1.0, inputs.options()),
          at::ones({shape[0], shape[1], 1}, inputs.options())};
}

at::Tensor pairs_of_state(const at::Tensor& state, const at::Tensor& A) {
  require_value(state.dim() == 3 && state.sizes().slice(1) == A.sizes().slice(1),
                "state.ssm must have shape [sequences, d_inner = {}, d_state = {}], got {}", A.size(1),
                A.size(2), shape_of(state));
  return state.reshape({state.size(0), A.size(1) * A.size(2), 1});
}

// Not a matrix product: autocast would round it to 16 bits.
at::Tensor gated_output(const at::Tensor& h, const PairScan& scan) {
  std::vector<int64_t> shape = scan.z.sizes().vec();
  shape.push_back(scan.C.size(-1));
  const at::Tensor y = (h.view(shape) * scan.C.to(h.scalar_type()).unsqueeze(-2)).sum(-1);
  return y * at::silu(scan.z.to(h.scalar_type()));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> scan_of_pairs(const PairScan& scan, const OptionalTensor& cu_seqlens,
                                                 const OptionalTensor& initial_state) {
  SelectiveScanOptions options{.rows = scan.routing.rows,
                               .offsets = scan.routing.offsets,
                               .cu_seqlens = cu_seqlens,
                               .softplus = false};
  if (initial_state) options.initial_state = pairs_of_state(*initial_state, scan.A);
  const Pairs pairs = pairs_of(scan);
  const auto [h, last] = selective_scan(pairs.u, pairs.delta, pairs.decay, pairs.ones, pairs.ones, options);
  return {gated_output(h, scan), last.view({last.size(0), scan.A.size(1), scan.A.size(2)})};
}

at::Tensor scan_of_pairs_step(const PairScan& scan, const at::Tensor& state) {
  require_value(state.is_contiguous(), "state.ssm must be contiguous, got strides [{}]",
                fmt::join(state.strides().begin(), state.strides().end(), ", "));
  checked_ssm_dtype("state.ssm", state.scalar_type(), scan.u.scalar_type());
  const Pairs pairs = pairs_of(scan);
  const at::Tensor flat = pairs_of_state(state, scan.A);
  at::Tensor wide = flat.to(pairs.u.scalar_type());
  const at::Tensor h =
      selective_scan_step(pairs.u, wide, pairs.delta, pairs.decay, pairs.ones, pairs.ones,
                          {.rows = scan.routing.rows, .offsets = scan.routing.offsets, .softplus = false});
  if (!wide.is_same(flat)) flat.copy_(wide);
  return gated_output(h, scan);
}

}  // namespace mixture_of_mamba::frontend
