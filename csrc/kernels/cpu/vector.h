// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Vectors as wide as the instruction set that this translation unit is compiled for, on GCC's vector
// extensions; loads and stores that convert from and to bfloat16 and float16; exp, softplus and
// sigmoid. All of it lives in the namespace of the instruction set (dispatch.h says why).

#ifndef MOM_ISA
#define MOM_ISA baseline
#endif

namespace mixture_of_mamba::MOM_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// T is float or double.
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Int integer __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
using IntVec = typename VectorOf<T>::integer;

template <typename T>
inline Vec<T> splat(T value) {
  return Vec<T>{} + value;
}
// max(a, b) and min(a, b); a NaN in `a` stays. One instruction each where the compiler does not see that a
// comparison and a selection are one.
template <typename T>
inline Vec<T> maximum(Vec<T> a, T b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_max_ps((__m512)splat<T>(b), (__m512)a);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_max_ps((__m256)splat<T>(b), (__m256)a);
#endif
  return a < b ? splat<T>(b) : a;
}
template <typename T>
inline Vec<T> minimum(Vec<T> a, T b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_min_ps((__m512)splat<T>(b), (__m512)a);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_min_ps((__m256)splat<T>(b), (__m256)a);
#endif
  return a > b ? splat<T>(b) : a;
}

// An owned array of vectors or numbers, zeroed. std::vector's members would be shared between instruction
// sets.
template <typename Element>
class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size), data_(allocate(size)) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, std::align_val_t(kVectorBytes)); }

  int64_t size() const { return size_; }
  Element* data() { return data_; }
  const Element* data() const { return data_; }
  Element& operator[](int64_t i) { return data_[i]; }
  const Element& operator[](int64_t i) const { return data_[i]; }
  void clear() { std::memset(static_cast<void*>(data_), 0, size_ * sizeof(Element)); }

 private:
  static Element* allocate(int64_t size) {
    void* memory = ::operator new(size * sizeof(Element), std::align_val_t(kVectorBytes));
    std::memset(memory, 0, size * sizeof(Element));
    return static_cast<Element*>(memory);
  }

  int64_t size_;
  Element* data_;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- Element types of activations, as bits.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Rounds to nearest even; a NaN stays a NaN.
inline BFloat16 to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

#if defined(__F16C__)
inline float to_float(Float16 x) { return _cvtsh_ss(x.bits); }
inline Float16 to_float16(float value) {
  return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
}
#else
// 2^112 moves float16's exponent bias (15) to float32's (127), denormals included.
inline float to_float(Float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u | magnitude : 0u;
  float value;
  std::memcpy(&value, &magnitude, 4);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (special ? special : bits) | static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline Float16 to_float16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (bits < 0x38800000u) {                                                 // a float16 denormal
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;  // aligns the last kept bit with float32's last bit, rounding to nearest even
    std::memcpy(&bits, &magnitude, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13))};
}
#endif

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
template <typename Scalar, typename T>
inline Scalar from_float(T x) {
  if constexpr (std::is_same_v<Scalar, BFloat16>) {
    return to_bfloat16(x);
  } else if constexpr (std::is_same_v<Scalar, Float16>) {
    return to_float16(x);
  } else {
    return x;
  }
}

// float, or double for double: what a scalar type is computed in.
template <typename Scalar>
using Acc = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

// ---- Loads and stores of kLanes elements.
template <typename Scalar>
inline Vec<Acc<Scalar>> load(const Scalar* p) {
  using T = Acc<Scalar>;
  Vec<T> v;
  if constexpr (std::is_same_v<Scalar, T>) {
    std::memcpy(&v, p, sizeof(v));
  } else if constexpr (std::is_same_v<Scalar, BFloat16>) {
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    typedef uint32_t Full __attribute__((vector_size(kVectorBytes)));
    Half half;
    std::memcpy(&half, p, sizeof(half));
    const Full bits = __builtin_convertvector(half, Full) << 16;
    std::memcpy(&v, &bits, sizeof(v));
  } else {
    for (int i = 0; i < kLanes<T>; ++i) v[i] = to_float(p[i]);
  }
  return v;
}

template <typename Scalar>
inline void store(Scalar* p, Vec<Acc<Scalar>> v) {
  using T = Acc<Scalar>;
  if constexpr (std::is_same_v<Scalar, T>) {
    std::memcpy(p, &v, sizeof(v));
  } else if constexpr (std::is_same_v<Scalar, BFloat16>) {
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    typedef uint32_t Full __attribute__((vector_size(kVectorBytes)));
    Full bits;
    std::memcpy(&bits, &v, sizeof(v));
    const Full rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Full nan = (bits >> 16) | 0x40u;
    const Full chosen = (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
    const Half half = __builtin_convertvector(chosen, Half);
    std::memcpy(p, &half, sizeof(half));
  } else {
    for (int i = 0; i < kLanes<T>; ++i) p[i] = to_float16(v[i]);
  }
}

// The first n lanes only; memory beyond is not touched, lanes beyond are 0.
template <typename Scalar>
inline Vec<Acc<Scalar>> load(const Scalar* p, int n) {
  if (n == kLanes<Acc<Scalar>>) return load(p);
  Scalar padded[kLanes<Acc<Scalar>>] = {};
  std::memcpy(padded, p, n * sizeof(Scalar));
  return load(padded);
}
template <typename Scalar>
inline void store(Scalar* p, Vec<Acc<Scalar>> v, int n) {
  if (n == kLanes<Acc<Scalar>>) return store(p, v);
  Scalar padded[kLanes<Acc<Scalar>>];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(Scalar));
}

// ---- Elementary functions.

// 2^x. x is split into an integer and f in [-1/2, 1/2]; 2^f = 1 + f * q(f), so that 2^x - 1 keeps its
// relative accuracy near 0: a decay close to 1 has the right rate. Below 2^-126 the result stays at 2^-126.
template <typename T>
inline Vec<T> exp2(Vec<T> x) {
  x = minimum<T>(maximum<T>(x, sizeof(T) == 4 ? T(-126) : T(-1022)), sizeof(T) == 4 ? T(127) : T(1023));
  constexpr T kRound = sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^mantissa bits
  const Vec<T> rounded = x + kRound;
  const Vec<T> f = x - (rounded - kRound);
  Vec<T> q;
  if constexpr (sizeof(T) == 4) {
    q = 1.5461448e-4f * f + 1.33908674e-3f;
    q = q * f + 9.61805667e-3f;
    q = q * f + 5.5503571e-2f;
    q = q * f + 2.40226509e-1f;
    q = q * f + 6.93147188e-1f;
  } else {
    // ln(2)^k / k!, k = 13 .. 1
    constexpr double kTaylor[] = {1.3691488853904128e-12, 2.5678435993488206e-11, 4.4455382718708110e-10,
                                  7.0549116208011230e-09, 1.0178086009239699e-07, 1.3215486790144307e-06,
                                  1.5252733804059840e-05, 1.5403530393381609e-04, 1.3333558146428443e-03,
                                  9.6181291076284770e-03, 5.5504108664821580e-02, 2.4022650695910070e-01,
                                  6.9314718055994530e-01};
    q = splat<T>(kTaylor[0]);
    for (int k = 1; k < 13; ++k) q = q * f + T(kTaylor[k]);
  }
  const Vec<T> power = q * f + T(1);
  IntVec<T> exponent, bits;
  std::memcpy(&exponent, &rounded, sizeof(exponent));
  std::memcpy(&bits, &power, sizeof(bits));
  bits += exponent << (sizeof(T) == 4 ? 23 : 52);
  Vec<T> result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

template <typename T>
constexpr T kLog2E = T(1.4426950408889634074);
template <typename T>
constexpr T kLn2 = T(0.69314718055994530942);

// log(1 + e) for e in [0, 1] by log(1 + e) = 2 atanh(e / (2 + e)): accurate for the smallest e too.
template <typename T>
inline Vec<T> log1p_unit(Vec<T> e) {
  const Vec<T> s = e / (e + T(2));
  const Vec<T> square = s * s;
  constexpr int kTerms = sizeof(T) == 4 ? 7 : 17;  // s <= 1/3, so each term is worth a factor 9
  Vec<T> sum = splat<T>(T(1) / T(2 * kTerms + 1));
  for (int k = kTerms - 1; k >= 0; --k) sum = sum * square + T(1) / T(2 * k + 1);
  return (s + s) * sum;
}

template <typename T>
inline Vec<T> exp_of_minus_magnitude(Vec<T> x) {
  return exp2<T>((x < T(0) ? x : -x) * kLog2E<T>);
}

// softplus(x) and its slope sigmoid(x), from one exponential.
template <typename T>
inline Vec<T> softplus(Vec<T> x, Vec<T>* slope) {
  const Vec<T> e = exp_of_minus_magnitude<T>(x);
  *slope = (x < T(0) ? e : splat<T>(1)) / (e + T(1));
  return maximum<T>(x, T(0)) + log1p_unit<T>(e);
}

template <typename T>
inline Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp_of_minus_magnitude<T>(x);
  return (x < T(0) ? e : splat<T>(1)) / (e + T(1));
}

// One vector from kLanes vectors: lane i is the sum of the lanes of v[i]. Overwrites v.
// A stage folds lanes that differ in bit `half` and keeps the result of v[i] where that bit is 0, of
// v[i + half] where it is 1: log2(kLanes) stages, kLanes - 1 folds in all.
template <typename T>
inline Vec<T> sum_each(Vec<T>* v) {
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    IntVec<T> own, other;
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const int source = lane & half ? kLanes<T> : 0;
      own[lane] = source + lane;
      other[lane] = source + (lane ^ half);
    }
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      v[i] = __builtin_shuffle(v[i], v[i + half], own) + __builtin_shuffle(v[i], v[i + half], other);
    }
  }
  return v[0];
}

}  // namespace mixture_of_mamba::MOM_ISA
