// SPDX-License-Identifier: Apache-2.0
#include "support.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <thread>

namespace mixture_of_mamba::testing {

namespace {

int64_t environment(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::atoll(value) : otherwise;
}

struct Format {
  int exponent_bits, mantissa_bits;
  int lowest_exponent() const { return 2 - (1 << (exponent_bits - 1)); }
};

Format format_of(ScalarType type) { return type == ScalarType::kBFloat16 ? Format{8, 7} : Format{5, 10}; }

// Half a unit in the last place, of a normal number relative to it, and of a denormal.
Real relative_rounding(ScalarType type) {
  return type == ScalarType::kBFloat16 ? 0x1p-8L : type == ScalarType::kFloat16 ? 0x1p-11L : 0.0L;
}
Real absolute_rounding(ScalarType type) { return type == ScalarType::kFloat16 ? 0x1p-25L : 0.0L; }

}  // namespace

int random_cases() { return static_cast<int>(environment("MOM_TEST_CASES", 100)); }

Random::Random(uint64_t index) {
  std::seed_seq seed{static_cast<uint64_t>(environment("MOM_TEST_SEED", 1)), index};
  engine_.seed(seed);
}

ScalarType Random::type(bool with_float64) { return static_cast<ScalarType>(below(with_float64 ? 4 : 3)); }

Reals Random::normal(int64_t count, Real mean, Real deviation, ScalarType type) {
  std::normal_distribution<double> distribution;
  Reals values(count);
  unsigned char element[8];
  for (Real& value : values) {
    encode(type, mean + deviation * distribution(engine_), element);
    value = decode(type, element);
  }
  return values;
}

int32_t Random::hostile(int64_t end) {
  const int32_t extremes[] = {INT32_MIN, INT32_MAX, -1, static_cast<int32_t>(end), static_cast<int32_t>(end) + 1};
  const int choice = below(8);
  return choice < 5 ? extremes[choice] : static_cast<int32_t>(bits());
}

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
  const Real quanta = std::nearbyint(std::ldexp(std::fabs(value), format.mantissa_bits - binade));
  const int bits =
      ((binade - format.lowest_exponent()) << format.mantissa_bits) + static_cast<int>(quanta);
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
    magnitude = std::ldexp(Real(quanta),
                           format.lowest_exponent() + std::max(exponent - 1, 0) - format.mantissa_bits);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
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
      byte_count_(rows > 0 ? (offset + (rows - 1) * stride_ + columns) * size_of(type) : offset * size_of(type)),
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

Output output_of(const std::string& name, const Matrix& matrix) {
  return {name, matrix.type(), matrix.values(), matrix.bytes(), matrix.gaps_untouched()};
}

std::string mismatch(const Outputs& got, const Outputs& expected, Real accumulated) {
  Real worst = 1;  // in units of what is allowed
  std::ostringstream message;
  for (const Output& output : got) {
    const auto wanted = std::find_if(expected.begin(), expected.end(),
                                     [&](const Output& candidate) { return candidate.name == output.name; });
    if (wanted == expected.end()) return "no reference for " + output.name;
    if (wanted->values.size() != output.values.size()) return "wrong size of " + output.name;
    if (!output.clean) return output.name + " was written between its rows";
    Real squares = 0;
    for (Real value : wanted->values) squares += value * value;
    const Real rms = std::sqrt(squares / std::max<size_t>(1, wanted->values.size()));
    for (size_t i = 0; i < output.values.size(); ++i) {
      const Real value = output.values[i], right = wanted->values[i];
      const Real allowed = relative_rounding(output.type) * std::fabs(right) + absolute_rounding(output.type) +
                           accumulated * (std::fabs(right) + rms);
      const Real error = std::fabs(value - right);
      if (error <= worst * allowed || value == right) continue;
      worst = std::isfinite(error) ? error / std::max(allowed, Real(1e-4000L)) : Real(INFINITY);
      message.str("");
      message << output.name << "[" << i << "] of " << output.values.size() << " is " << value << ", expected "
              << right << ", " << worst << " times the allowed error";
      if (!std::isfinite(worst)) return message.str();
    }
  }
  return message.str();
}

std::string bitwise_mismatch(const Outputs& a, const Outputs& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].bytes != b[i].bytes) return a[i].name + " differs";
  }
  return a.size() == b.size() ? "" : "not the same outputs";
}

const ParallelFor kSerial{[](int64_t begin, int64_t end, int64_t, void* context, ParallelFor::Body body) {
  body(context, begin, end);
}};

const ParallelFor kPieces{[](int64_t begin, int64_t end, int64_t grain, void* context, ParallelFor::Body body) {
  const int64_t pieces = std::max<int64_t>(1, (end - begin) / grain);
  const auto run = [=](int64_t last) {
    for (int64_t i = last; i >= 0; i -= 2) {
      body(context, begin + i * grain, i == pieces - 1 ? end : begin + (i + 1) * grain);
    }
  };
  std::thread other(run, pieces - 2);
  run(pieces - 1);
  other.join();
}};

}  // namespace mixture_of_mamba::testing
