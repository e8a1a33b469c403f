// SPDX-License-Identifier: Apache-2.0
#include "support.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// Element types, and matrices of them.

namespace mixture_of_mamba::testing {

namespace {

struct Format {
  int exponent_bits, mantissa_bits;
  int lowest_exponent() const { return 2 - (1 << (exponent_bits - 1)); }
};

Format format_of(ScalarType type) { return type == ScalarType::kBFloat16 ? Format{8, 7} : Format{5, 10}; }

}  // namespace

const char* name_of(ScalarType type) {
  const char* const names[] = {"float32", "bfloat16", "float16", "float64"};
  return names[static_cast<int>(type)];
}

// A number is r quanta of its binade; r carries into the exponent field by itself, and denormals are the
// binade below which the quantum stays.
uint16_t encode16(ScalarType type, Real value) {
  const Format format = format_of(type);
  const int infinity = ((1 << format.exponent_bits) - 1) << format.mantissa_bits;
  const int sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return static_cast<uint16_t>(sign | infinity | 1 << (format.mantissa_bits - 1));
  if (std::isinf(value)) return static_cast<uint16_t>(sign | infinity);
  int exponent = 0;
  std::frexp(value, &exponent);
  const int binade = std::max(exponent - 1, format.lowest_exponent());
  if (value == 0 || binade > 1 - format.lowest_exponent()) {
    return static_cast<uint16_t>(value == 0 ? sign : sign | infinity);
  }
  const long quanta = std::lrint(std::ldexp(std::fabs(value), format.mantissa_bits - binade));
  const int bits = ((binade - format.lowest_exponent()) << format.mantissa_bits) + static_cast<int>(quanta);
  return static_cast<uint16_t>(sign | bits);
}

Real decode16(ScalarType type, uint16_t bits) {
  const Format format = format_of(type);
  const int mantissa = bits & ((1 << format.mantissa_bits) - 1);
  const int exponent = (bits & 0x7fff) >> format.mantissa_bits;
  const int highest = (1 << format.exponent_bits) - 1;
  Real magnitude;
  if (exponent == highest) {
    magnitude = mantissa != 0 ? Real(NAN) : Real(INFINITY);
  } else {
    const int quanta = exponent == 0 ? mantissa : mantissa | 1 << format.mantissa_bits;
    magnitude =
        std::ldexp(Real(quanta), format.lowest_exponent() + std::max(exponent - 1, 0) - format.mantissa_bits);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
}

Real half_unit(ScalarType type, Real value) {
  if (size_of(type) > 2 || value == 0) return 0;
  const Format format = format_of(type);
  int exponent = 0;
  std::frexp(value, &exponent);
  return std::ldexp(Real(1), std::max(exponent - 1, format.lowest_exponent()) - format.mantissa_bits - 1);
}

void encode(ScalarType type, Real value, unsigned char* to) {
  if (type == ScalarType::kFloat64) {
    const double wide = static_cast<double>(value);
    std::memcpy(to, &wide, 8);
  } else if (type == ScalarType::kFloat32) {
    const float narrow = static_cast<float>(value);
    std::memcpy(to, &narrow, 4);
  } else {
    const uint16_t bits = encode16(type, value);
    std::memcpy(to, &bits, 2);
  }
}

Real decode(ScalarType type, const unsigned char* from) {
  double wide;
  float narrow;
  uint16_t bits;
  if (type == ScalarType::kFloat64) return std::memcpy(&wide, from, 8), wide;
  if (type == ScalarType::kFloat32) return std::memcpy(&narrow, from, 4), narrow;
  return std::memcpy(&bits, from, 2), decode16(type, bits);
}

Matrix::Matrix(Arena& arena, ScalarType type, int64_t rows, int64_t columns, int64_t gap, int64_t offset)
    : arena_(&arena),
      type_(type),
      rows_(rows),
      columns_(columns),
      stride_(columns + gap),
      offset_(offset),
      byte_count_(rows > 0 ? (offset + (rows - 1) * stride_ + columns) * size_of(type)
                           : offset * size_of(type)),
      memory_(static_cast<unsigned char*>(arena.allocate(byte_count_))) {}

void Matrix::write(const Reals& values) {
  Bytes bytes(byte_count_, kPoison);
  for (int64_t i = 0; i < rows_ * columns_; ++i) encode(type_, values[i], &bytes[at(i)]);
  arena_->write(memory_, bytes.data(), byte_count_);
}

Bytes Matrix::bytes() const {
  Bytes bytes(byte_count_);
  arena_->read(bytes.data(), memory_, byte_count_);
  return bytes;
}

Reals Matrix::values() const {
  const Bytes memory = bytes();
  Reals values(rows_ * columns_);
  for (int64_t i = 0; i < rows_ * columns_; ++i) values[i] = decode(type_, &memory[at(i)]);
  return values;
}

bool Matrix::gaps_untouched() const {
  Bytes memory = bytes();
  for (int64_t i = 0; i < rows_ * columns_; ++i) std::memset(&memory[at(i)], kPoison, size_of(type_));
  return std::all_of(memory.begin(), memory.end(), [](unsigned char byte) { return byte == kPoison; });
}

}  // namespace mixture_of_mamba::testing
