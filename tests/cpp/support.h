// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "arena.h"
#include "kernels/common/parallel.h"
#include "kernels/common/scalar_type.h"

// What the tests of all kernels share. Inputs are random but exact in their type, references are scalar
// loops in long double.
//
//   MOM_TEST_CASES   random configurations of each test (100)
//   MOM_TEST_SEED    another seed gives other configurations (1)
//   MOM_TEST_REPORT  set: at the end, how much of its tolerance each output used at most

namespace mixture_of_mamba::testing {

using Real = long double;
using Reals = std::vector<Real>;

// Exit status of an executable that this machine cannot run; ctest knows it.
constexpr int kSkipped = 77;
// Why this machine cannot run the executable's tests, or null. Each executable defines it.
const char* reason_to_skip();

int random_cases();

class Random {
 public:
  // The same index gives the same configuration, whatever ran before.
  explicit Random(uint64_t index);
  int below(int end) { return static_cast<int>(engine_() % static_cast<uint64_t>(end)); }
  int between(int first, int last) { return first + below(last - first + 1); }
  bool chance(int one_in) { return below(one_in) == 0; }
  uint32_t bits() { return static_cast<uint32_t>(engine_()); }
  ScalarType type(bool with_float64);
  // Normally distributed, rounded to `type`.
  Reals normal(int64_t count, Real mean, Real deviation, ScalarType type);
  // A value that no honest caller would send as a row or a boundary below `end`.
  int32_t hostile(int64_t end);

 private:
  std::mt19937_64 engine_;
};

// ---- Elements.
const char* name_of(ScalarType type);
// Of parameters and states beside `type`.
inline ScalarType acc_of(ScalarType type) {
  return type == ScalarType::kFloat64 ? type : ScalarType::kFloat32;
}
// The two 16-bit formats, rounding to nearest even, by arithmetic on the value instead of its bits.
uint16_t encode16(ScalarType type, Real value);
Real decode16(ScalarType type, uint16_t bits);
// What rounding to a 16-bit type may do to a value: half a unit in the last place. 0 for wider types, whose
// rounding is part of the arithmetic.
Real half_unit(ScalarType type, Real value);
void encode(ScalarType type, Real value, unsigned char* to);
Real decode(ScalarType type, const unsigned char* from);

// [rows, columns] in an arena; `offset` elements before the first row and `gap` elements between rows
// belong to nobody.
class Matrix {
 public:
  Matrix(Arena& arena, ScalarType type, int64_t rows, int64_t columns, int64_t gap = 0, int64_t offset = 0);
  void* data() const { return memory_ + offset_ * size_of(type_); }
  ConstRows const_rows() const { return {data(), stride_}; }
  Rows writable() const { return {data(), stride_}; }
  ScalarType type() const { return type_; }
  void write(const Reals& values);
  Bytes bytes() const;
  Reals values() const;
  bool gaps_untouched() const;

 private:
  int64_t at(int64_t i) const { return (offset_ + i / columns_ * stride_ + i % columns_) * size_of(type_); }

  Arena* arena_;
  ScalarType type_;
  int64_t rows_, columns_, stride_, offset_, byte_count_;
  unsigned char* memory_;
};

// ---- Results.
struct Output {
  std::string name;
  ScalarType type;
  Reals values;
  Bytes bytes;        // with whatever lies between rows
  bool clean = true;  // nothing was written between rows
};
using Outputs = std::vector<Output>;

Output output_of(const std::string& name, const Matrix& matrix);

// What arithmetic may lose before a result is rounded to a 16-bit type.
struct Tolerance {
  Real mean;   // of an output in the mean (root of squares), relative to its rms
  Real worst;  // of one element, relative to its size and the rms

  Tolerance operator*(Real factor) const { return {mean * factor, worst * factor}; }
};
// Where `got` is not what `expected` (by name) says, as a sentence; empty when all is well. `type` is that of
// the activations.
std::string mismatch(const Outputs& got, const Outputs& expected, ScalarType type, Tolerance tolerance);
std::string bitwise_mismatch(const Outputs& a, const Outputs& b);

// ---- Thread pools.
extern const ParallelFor kSerial;
// Two threads on the smallest pieces allowed, last piece first.
extern const ParallelFor kPieces;

}  // namespace mixture_of_mamba::testing
