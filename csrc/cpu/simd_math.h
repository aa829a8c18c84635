// exp and log1p as plain arithmetic, which compilers vectorise; float64 takes the library's.
#pragma once

#include <cmath>

#include "common.h"

namespace ctt {

// e^x for x <= 0 within 1.01 ulp of float32 (every 87.3 / 97e6 compared with std::exp), 0 below
// the normal range, NaN for NaN. Polynomial and split of ln 2: Cephes, expf.c.
CTT_INLINE float exp_nonpositive(float x) {
  constexpr float lowest = -87.33654f;            // ln of the smallest normal number
  constexpr float round_to_integer = 12582912.f;  // 1.5 * 2^23: the integer lands in the low bits
  const float clamped = x < lowest ? lowest : x;
  const float shifted = clamped * 1.44269504088896341f + round_to_integer;
  const float n = shifted - round_to_integer;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const float y = bit_cast<float>(bit_cast<std::uint32_t>(p) +
                                  (bit_cast<std::uint32_t>(shifted) << 23));
  return x < lowest ? 0.f : y;
}

CTT_INLINE double exp_nonpositive(double x) { return std::exp(x); }

// log(1 + x) for 0 <= x <= 1: 2 artanh(z) with z = x / (2 + x) <= 1/3; the terms left out are
// below 2e-9 of the first.
CTT_INLINE float log1p_unit(float x) {
  const float z = x / (2.f + x);
  const float zz = z * z;
  float p = 1.f / 15.f;
  p = p * zz + 1.f / 13.f;
  p = p * zz + 1.f / 11.f;
  p = p * zz + 1.f / 9.f;
  p = p * zz + 1.f / 7.f;
  p = p * zz + 1.f / 5.f;
  p = p * zz + 1.f / 3.f;
  return 2.f * z + (2.f * z) * (zz * p);
}

CTT_INLINE double log1p_unit(double x) { return std::log1p(x); }

// log(1 + e^x) and its derivative 1 / (1 + e^-x), which never overflow.
template <class T>
struct Softplus {
  T value;
  T slope;
};

template <class T>
CTT_INLINE Softplus<T> softplus(T x) {
  const T e = exp_nonpositive(x < T(0) ? x : -x);
  const T slope = (x < T(0) ? e : T(1)) / (T(1) + e);
  return {(x < T(0) ? T(0) : x) + log1p_unit(e), slope};
}

}  // namespace ctt
