// SPDX-License-Identifier: Apache-2.0
#include "ops/selective_scan.h"
#include "ops/step_state.h"

namespace mixture_of_mamba::ops {

namespace {

Dtype promoted(const char* op, const Tensor& u, const Tensor& dt, const Tensor& B, const Tensor& C,
               const OptionalTensor& z) {
  require_floating(op, "u", u);
  require_floating(op, "dt", dt);
  require_floating(op, "B", B);
  require_floating(op, "C", C);
  if (z) require_floating(op, "z", *z);
  return widest({u.scalar_type(), dt.scalar_type(), B.scalar_type(), C.scalar_type(),
                 z ? z->scalar_type() : u.scalar_type()});
}

int64_t dim_size(const char* op, const char* name, const Tensor& tensor, int64_t dims, int64_t dim,
                 const char* rule) {
  require(tensor.dim() == dims, op, name, " must have shape ", rule, ", got ", shape_of(tensor));
  return tensor.size(dim);
}

}  // namespace

ScanInputs::ScanInputs(const char* op, const Tensor& u_, const Tensor& dt_, const Tensor& A_,
                       const Tensor& B_, const Tensor& C_, const OptionalTensor& D_, const OptionalTensor& z_,
                       const OptionalTensor& dt_bias_, const OptionalTensor& rows,
                       const OptionalTensor& offsets, const OptionalTensor& cu_seqlens,
                       const OptionalTensor& initial_state_, bool softplus_, bool reverse_,
                       const char* state_name)
    : io(promoted(op, u_, dt_, B_, C_, z_)),
      acc(io == Dtype::Double ? Dtype::Double : Dtype::Float),
      type(kernel_type(op, u_, io)),
      batch(dim_size(op, "u", u_, 3, 0, "[batch, length, channels]")),
      length(u_.size(1)),
      channels(u_.size(2)),
      states(dim_size(op, "A", A_, 2, 1, "[channels, states]")),
      softplus(softplus_),
      reverse(reverse_),
      order(op, u_, rows, offsets, cu_seqlens),
      conversions(op) {
  const auto activation = [&](const char* name, const Tensor& tensor, int64_t columns, const char* rule) {
    require_shape(op, name, tensor, {batch, length, columns}, rule);
    require_device(op, name, tensor, "u", u_);
    return RowView(tensor, io);
  };
  const auto parameter = [&](const char* name, const Tensor& tensor) {
    require_floating(op, name, tensor);
    require_device(op, name, tensor, "u", u_);
    return Block(conversions.contiguous(tensor, acc), acc);
  };
  u = activation("u", u_, channels, "[batch, length, channels]");
  dt = activation("dt", dt_, channels, "[batch, length, channels]");
  B = activation("B", B_, states, "[batch, length, states]");
  C = activation("C", C_, states, "[batch, length, states]");
  if (z_) z = activation("z", *z_, channels, "[batch, length, channels]");
  require_shape(op, "A", A_, {channels, states}, "[channels, states]");
  A = parameter("A", A_);
  if (D_) {
    require_shape(op, "D", *D_, {channels}, "[channels]");
    D = parameter("D", *D_);
  }
  if (dt_bias_) {
    if (dt_bias_->dim() == 1) {
      require_shape(op, "dt_bias", *dt_bias_, {channels}, "[channels]");
      bias_modalities = 1;
    } else {
      require(offsets.has_value() || (dt_bias_->dim() == 2 && dt_bias_->size(0) == 1), op,
              "offsets must be given with a per-modality dt_bias of shape ", shape_of(*dt_bias_),
              ", got None");
      require_shape(op, "dt_bias", *dt_bias_, {order.order().modalities, channels},
                    "[num_modalities, channels]");
      bias_modalities = dt_bias_->size(0);
    }
    dt_bias = parameter("dt_bias", *dt_bias_);
  }
  if (initial_state_) {
    require_shape(op, state_name, *initial_state_, {order.order().sequences, channels, states},
                  "[sequences, channels, states]");
    initial_state = parameter(state_name, *initial_state_);
  }
}

void ScanInputs::fill(SelectiveScanParams& params) const {
  params.type = type;
  params.channels = channels;
  params.states = states;
  params.order = order.order();
  params.softplus = softplus;
  params.reverse = reverse;
  params.u = u.rows();
  params.dt = dt.rows();
  params.B = B.rows();
  params.C = C.rows();
  params.z = z.rows();
  params.A = A.data();
  params.D = D.data();
  params.dt_bias = dt_bias.data();
  params.bias_modalities = static_cast<int32_t>(bias_modalities);
  params.initial_state = initial_state.data();
}

StepState::StepState(const char* op, const char* name, const Tensor& state,
                     std::initializer_list<int64_t> sizes, const char* activation_name,
                     const Tensor& activation, Dtype acc)
    : state_(state), acc_(acc) {
  const Dtype narrow = activation.scalar_type();
  require_shape(op, name, state, sizes, "[sequences, channels, states]");
  require_device(op, name, state, activation_name, activation);
  require_in_place(op, name, state, acc,
                   element_size(narrow) == 2 ? std::optional<Dtype>(narrow) : std::nullopt);
  type_ = kernel_type(op, state, state.scalar_type());
}

}  // namespace mixture_of_mamba::ops
