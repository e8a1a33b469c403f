// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels/common/scalar_type.h"

// What every op needs between the dispatcher and a kernel: checks whose messages name the argument, the
// requirement and what came; the flat row view of an activation.

namespace mixture_of_mamba::ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Dtype = torch::headeronly::ScalarType;

// A plain runtime_error: torch turns it into Python's RuntimeError and C++'s c10::Error text as it is.
template <typename... Parts>
void require(bool ok, const char* op, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  message << "mixture_of_mamba::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Printed as "[2, 3]" and "cuda:0", and only then made into text: checks mostly succeed.
struct ShapeOf {
  const Tensor& tensor;
};
struct DeviceOf {
  const Tensor& tensor;
};
std::ostream& operator<<(std::ostream& out, const ShapeOf& shape);
std::ostream& operator<<(std::ostream& out, const DeviceOf& device);
inline ShapeOf shape_of(const Tensor& tensor) { return {tensor}; }
inline DeviceOf device_of(const Tensor& tensor) { return {tensor}; }

// Of an argument, or of an element of one that is a list: printed as "weight[2]".
struct Name {
  const char* argument;
  int64_t index = -1;
  Name(const char* argument_, int64_t index_ = -1) : argument(argument_), index(index_) {}
};
std::ostream& operator<<(std::ostream& out, const Name& name);

const char* name_of(Dtype dtype);  // "float32"
bool is_floating(Dtype dtype);
int64_t element_size(Dtype dtype);  // bytes

// The kernels' type for a floating dtype; float64 is refused on CUDA.
ScalarType kernel_type(const char* op, const Tensor& tensor, Dtype dtype);

// The narrowest dtype that holds all; bfloat16 with float16 gives float32.
Dtype widest(std::initializer_list<Dtype> dtypes);

void require_floating(const char* op, const Name& name, const Tensor& tensor);
void require_device(const char* op, const Name& name, const Tensor& tensor, const char* other_name,
                    const Tensor& other);
// `rule` is the shape in words, for the message; -1 in `sizes` matches any size.
void require_shape(const char* op, const Name& name, const Tensor& tensor,
                   std::initializer_list<int64_t> sizes, const char* rule);
// A state that is updated in place, in one dtype or one of two.
void require_in_place(const char* op, const char* name, const Tensor& state, Dtype dtype,
                      std::optional<Dtype> or_dtype = {});

Tensor to_dtype(const Tensor& tensor, Dtype dtype);
Tensor packed(const Tensor& tensor);  // as it is, without a call of torch, where it is contiguous
Tensor empty_like_device(const Tensor& reference, std::initializer_list<int64_t> sizes, Dtype dtype);
Tensor empty_of_shape(const Tensor& tensor, Dtype dtype);  // contiguous

// A [batch, length, channels] tensor as rows: contiguous channels and one stride between all rows.
// Views such as the halves of a projection pass as they are; anything else is copied.
class RowView {
 public:
  RowView() = default;
  RowView(const Tensor& tensor, Dtype dtype);

  explicit operator bool() const { return tensor_.has_value(); }
  ConstRows rows() const;

 private:
  OptionalTensor tensor_;
  int64_t stride_ = 0;
};

// A parameter or state as one contiguous block in the accumulation dtype.
class Block {
 public:
  Block() = default;
  Block(const Tensor& tensor, Dtype dtype);
  const void* data() const { return tensor_ ? tensor_->const_data_ptr() : nullptr; }

 private:
  OptionalTensor tensor_;
};

}  // namespace mixture_of_mamba::ops
