// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cpu/vector_types.h"

namespace mixture_of_mamba::MOM_ISA {

// Bits of 2^(j / 16), less what adding j << 19 will put into them. The entries' rounding is the same each
// time an entry is used, so it adds up over the memory of a recurrence; with 2^(-1/16), 2^(-2/16) .. as
// decays, memory times rounding is below 1.3e-7 for every entry.
constexpr uint32_t kExp2Table[16] = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
                                     0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
                                     0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};

// 2^x for x in a range where the result is a normal number. x is split as k / 2^b + f: 2^(k / 2^b) comes from
// a table of 2^b = kLanes numbers in one register (b = 0 without a permutation of lanes, and for double), and
// 2^f = 1 + f * q(f), so that 2^x - 1 keeps its relative accuracy near 0: a decay close to 1 has the right
// rate.
template <typename T>
inline Vec<T> exp2_in_range(Vec<T> x) {
  constexpr int kTableBits = sizeof(T) == 8 || kVectorBytes == 16 ? 0 : kVectorBytes == 32 ? 3 : 4;
  constexpr int kMantissaBits = sizeof(T) == 4 ? 23 : 52;
  // 1.5 * 2^(mantissa bits - b): adding it leaves k in the lowest bits.
  constexpr T kRound = (sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0)) / T(1 << kTableBits);
  const Vec<T> rounded = x + kRound;
  const Vec<T> f = x - (rounded - kRound);
  Vec<T> q;
  if constexpr (kTableBits == 4) {
    q = 5.55041097e-2f * f + 2.40233555e-1f;
    q = q * f + 6.93147182e-1f;
  } else if constexpr (kTableBits == 3) {
    q = 9.61812865e-3f * f + 5.55093177e-2f;
    q = q * f + 2.40226507e-1f;
    q = q * f + 6.93147182e-1f;
  } else if constexpr (sizeof(T) == 4) {
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
  IntVec<T> k, bits;
  std::memcpy(&k, &rounded, sizeof(k));
  Vec<T> result;
  if constexpr (kTableBits > 0) {
    IntVec<T> table;
    for (int j = 0; j < kLanes<T>; ++j) table[j] = static_cast<int32_t>(kExp2Table[j * (16 >> kTableBits)]);
    bits = __builtin_shuffle(table, k) + (k << (kMantissaBits - kTableBits));
    Vec<T> power;
    std::memcpy(&power, &bits, sizeof(power));
    result = (q * f) * power + power;
  } else {
    // Multiplied, not added to the exponent's bits: a NaN must stay one, whatever its payload leaves in k.
    constexpr typename VectorOf<T>::Int kBias = sizeof(T) == 4 ? 127 : 1023;
    bits = (k + kBias) << kMantissaBits;
    Vec<T> power;
    std::memcpy(&power, &bits, sizeof(power));
    result = (q * f + T(1)) * power;
  }
  return result;
}

template <typename T>
constexpr T kLowestExponent = sizeof(T) == 4 ? T(-126) : T(-1022);

// 2^x; stays at 2^-126 (2^-1022) below it and at 2^127 (2^1023) above. kNegative: x <= 0 is known.
template <typename T, bool kNegative = false>
inline Vec<T> exp2(Vec<T> x) {
  x = maximum<T>(x, kLowestExponent<T>);
  if constexpr (!kNegative) x = minimum<T>(x, 1 - kLowestExponent<T>);
  return exp2_in_range<T>(x);
}

template <typename T>
constexpr T kLog2E = T(1.4426950408889634074);
template <typename T>
constexpr T kLn2 = T(0.69314718055994530942);

}  // namespace mixture_of_mamba::MOM_ISA
