// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/ATen.h>

#include <tuple>

#include "mixture_of_mamba/ops/optional_tensor.h"
#include "mixture_of_mamba/routing.h"

// The selective scan with an A per modality, out of the operator, whose A is one for all tokens.
//
// Every pair of channel c and state n becomes a channel with one state, and A moves from the operator's decay
// into its delta and its input, which are per token:
//
//   delta'[c, n] = -delta[c] A_m[c, n]     u'[c, n] = -u[c] B[n] / A_m[c, n]     A' = -1, B' = C' = 1
//   h[c, n]      = exp(delta' A') h[c, n] + delta' u' = exp(delta[c] A_m[c, n]) h[c, n] + delta[c] u[c] B[n]
//
// That is the state itself, whose product with C follows. It is kept for every token, in float32 (float64
// beside float64).

namespace mixture_of_mamba::frontend {

struct PairScan {
  at::Tensor u, dt;  // [batch, length, channels], rows in sorted order, as all below
  at::Tensor A;      // [modalities, channels, states]
  at::Tensor B, C;   // [batch, length, states]
  at::Tensor z;      // [batch, length, channels]
  OptionalTensor dt_bias;
  Routing routing;
};

// selective_scan() without skip: the gated output in float32 at least, and the last states.
std::tuple<at::Tensor, at::Tensor> scan_of_pairs(const PairScan& scan, const OptionalTensor& cu_seqlens,
                                                 const OptionalTensor& initial_state);

// The same for one or a few tokens, updating `state` [batch, channels, states] in place; in a 16-bit dtype of
// u by way of a copy, since the operator's activations are wide here.
at::Tensor scan_of_pairs_step(const PairScan& scan, const at::Tensor& state);

}  // namespace mixture_of_mamba::frontend
