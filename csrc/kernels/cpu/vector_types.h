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
// extensions. All of it lives in the namespace of the instruction set (dispatch.h says why).

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

// An owned array of vectors or numbers. std::vector's members would be shared between instruction sets.
template <typename Element>
class Buffer {
 public:
  // `zeroed = false` leaves the elements undefined, for whoever first touches them.
  explicit Buffer(int64_t size, bool zeroed = true) : size_(size), data_(allocate(size)) {
    if (zeroed) clear();
  }
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
    return static_cast<Element*>(::operator new(size * sizeof(Element), std::align_val_t(kVectorBytes)));
  }

  int64_t size_;
  Element* data_;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace mixture_of_mamba::MOM_ISA
