// SPDX-License-Identifier: Apache-2.0
#include "ops/common.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <vector>

namespace mixture_of_mamba::ops {

std::ostream& operator<<(std::ostream& out, const ShapeOf& shape) {
  out << "[";
  for (int64_t d = 0; d < shape.tensor.dim(); ++d) out << (d ? ", " : "") << shape.tensor.size(d);
  return out << "]";
}

std::ostream& operator<<(std::ostream& out, const DeviceOf& device) {
  if (device.tensor.is_cpu()) return out << "cpu";
  return out << (device.tensor.is_cuda() ? "cuda:" : "device:") << device.tensor.get_device_index();
}

std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.argument;
  return name.index < 0 ? out : out << "[" << name.index << "]";
}

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::Float:
      return "float32";
    case Dtype::Double:
      return "float64";
    case Dtype::BFloat16:
      return "bfloat16";
    case Dtype::Half:
      return "float16";
    case Dtype::Int:
      return "int32";
    case Dtype::Long:
      return "int64";
    case Dtype::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

bool is_floating(Dtype dtype) {
  return dtype == Dtype::Float || dtype == Dtype::Double || dtype == Dtype::BFloat16 || dtype == Dtype::Half;
}

int64_t element_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::Bool:
    case Dtype::Byte:
    case Dtype::Char:
    case Dtype::Float8_e4m3fn:
    case Dtype::Float8_e5m2:
    case Dtype::Float8_e4m3fnuz:
    case Dtype::Float8_e5m2fnuz:
    case Dtype::Float8_e8m0fnu:
      return 1;
    case Dtype::Short:
    case Dtype::UInt16:
    case Dtype::Half:
    case Dtype::BFloat16:
      return 2;
    case Dtype::Int:
    case Dtype::UInt32:
    case Dtype::Float:
    case Dtype::ComplexHalf:
      return 4;
    case Dtype::Long:
    case Dtype::UInt64:
    case Dtype::Double:
    case Dtype::ComplexFloat:
      return 8;
    case Dtype::ComplexDouble:
      return 16;
    default:
      throw std::runtime_error(std::string("mixture_of_mamba: unsupported dtype ") + name_of(dtype));
  }
}

ScalarType kernel_type(const char* op, const Tensor& tensor, Dtype dtype) {
  switch (dtype) {
    case Dtype::Float:
      return ScalarType::kFloat32;
    case Dtype::BFloat16:
      return ScalarType::kBFloat16;
    case Dtype::Half:
      return ScalarType::kFloat16;
    case Dtype::Double:
      require(tensor.is_cpu(), op,
              "float64 is supported on the CPU only (for gradient checks), got a tensor on ",
              device_of(tensor));
      return ScalarType::kFloat64;
    default:
      require(false, op, "expected float32, bfloat16, float16 or float64, got ", name_of(dtype));
  }
  return ScalarType::kFloat32;
}

Dtype widest(std::initializer_list<Dtype> dtypes) {
  std::optional<Dtype> result;
  for (const Dtype dtype : dtypes) {
    if (!result || *result == dtype) {
      result = dtype;
    } else if (*result == Dtype::Double || dtype == Dtype::Double) {
      result = Dtype::Double;
    } else {
      result = Dtype::Float;
    }
  }
  return result.value_or(Dtype::Float);
}

void require_floating(const char* op, const Name& name, const Tensor& tensor) {
  require(is_floating(tensor.scalar_type()), op, name, " must be float32, bfloat16, float16 or float64, got ",
          name_of(tensor.scalar_type()));
}

void require_device(const char* op, const Name& name, const Tensor& tensor, const char* other_name,
                    const Tensor& other) {
  const bool same = tensor.is_cpu() == other.is_cpu() && tensor.is_cuda() == other.is_cuda() &&
                    (tensor.is_cpu() || tensor.get_device_index() == other.get_device_index());
  require(same, op, name, " must be on the device of ", other_name, " (", device_of(other), "), got ",
          device_of(tensor));
}

void require_in_place(const char* op, const char* name, const Tensor& state, Dtype dtype,
                      std::optional<Dtype> or_dtype) {
  const bool known = state.scalar_type() == dtype || state.scalar_type() == or_dtype;
  require(known && state.is_contiguous(), op, name, " is updated in place and must be contiguous ",
          name_of(dtype), or_dtype ? " or " : "", or_dtype ? name_of(*or_dtype) : "", ", got ",
          state.is_contiguous() ? "contiguous " : "strided ", name_of(state.scalar_type()));
}

void require_shape(const char* op, const Name& name, const Tensor& tensor,
                   std::initializer_list<int64_t> sizes, const char* rule) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (const int64_t size : sizes) {
    same = same && (size < 0 || tensor.size(d) == size);
    ++d;
  }
  if (same) return;
  std::ostringstream wanted;
  const char* separator = "[";
  for (const int64_t size : sizes) {
    wanted << separator;
    size < 0 ? wanted << "any" : wanted << size;
    separator = ", ";
  }
  require(false, op, name, " must have shape ", rule, " = ", wanted.str(), "], got ", shape_of(tensor));
}

Tensor to_dtype(const Tensor& tensor, Dtype dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

namespace {

// A shim where the host's time counts. That of the CPU leaves out what torch fills memory with for debugging.
Tensor empty(const Tensor& reference, const std::vector<int64_t>& sizes, Dtype dtype) {
  if (reference.is_cpu()) return torch::stable::new_empty(reference, sizes, dtype);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(reference.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), static_cast<int32_t>(dtype), device_type,
                                                  reference.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace

Tensor empty_like_device(const Tensor& reference, std::initializer_list<int64_t> sizes, Dtype dtype) {
  return empty(reference, sizes, dtype);
}

Tensor empty_of_shape(const Tensor& tensor, Dtype dtype) {
  std::vector<int64_t> sizes(tensor.dim());
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes[d] = tensor.size(d);
  return empty(tensor, sizes, dtype);
}

RowView::RowView(const Tensor& tensor, Dtype dtype) : tensor_(to_dtype(tensor, dtype)) {
  const int64_t batch = tensor.size(0), length = tensor.size(1), channels = tensor.size(2);
  const bool dense_channels = channels <= 1 || tensor_->stride(2) == 1;
  const bool one_stride = batch <= 1 || length <= 1 || tensor_->stride(0) == length * tensor_->stride(1);
  if (!dense_channels || !one_stride) tensor_ = packed(*tensor_);
  stride_ = length > 1 ? tensor_->stride(1) : batch > 1 ? tensor_->stride(0) : channels;
}

ConstRows RowView::rows() const {
  return tensor_ ? ConstRows{tensor_->const_data_ptr(), stride_} : ConstRows{};
}

Block::Block(const Tensor& tensor, Dtype dtype) : tensor_(packed(to_dtype(tensor, dtype))) {}

}  // namespace mixture_of_mamba::ops
