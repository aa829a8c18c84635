// What every kernel file shares: element types, strided matrices, run-time choice of the
// instruction set. Nothing of torch: pointers, sizes and strides come in from Python.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CTT_X86_DISPATCH
#endif

#if defined(__GNUC__)
#define CTT_INLINE inline __attribute__((always_inline))
#else
#define CTT_INLINE inline
#endif

namespace ctt {

// The order is that of `_DTYPES` in ctt/ops/backends/cpu.py.
enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

struct Half {
  std::uint16_t bits;
};

struct BFloat16 {
  std::uint16_t bits;
};

template <class To, class From>
CTT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

CTT_INLINE float widen(float x) { return x; }
CTT_INLINE double widen(double x) { return x; }

CTT_INLINE float widen(BFloat16 x) {
  return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

// Branch-free, so that loops over it vectorise without hardware support for half.
CTT_INLINE float widen(Half x) {
  const std::uint32_t shifted = static_cast<std::uint32_t>(x.bits) << 16;
  const std::uint32_t sign = shifted & 0x80000000u;
  const std::uint32_t two = shifted + shifted;  // the sign falls off
  const float normal = bit_cast<float>((two >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = bit_cast<float>((two >> 17) | (126u << 23)) - 0.5f;
  const std::uint32_t magnitude =
      two < (1u << 27) ? bit_cast<std::uint32_t>(subnormal) : bit_cast<std::uint32_t>(normal);
  return bit_cast<float>(sign | magnitude);
}

// Rounding to the nearest, ties to even; T is the type in memory.
template <class T, class A>
CTT_INLINE T narrow(A x) {
  return static_cast<T>(x);
}

template <>
CTT_INLINE BFloat16 narrow<BFloat16, float>(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<std::uint16_t>(x != x ? 0x7FC0u : rounded)};
}

template <>
CTT_INLINE Half narrow<Half, float>(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  // adding a power of two makes the adder round at the place where half ends
  const std::uint32_t two = bits + bits;
  const std::uint32_t bias = (two & 0xFF000000u) < 0x71000000u ? 0x71000000u : two & 0xFF000000u;
  const float scaled = (bit_cast<float>(magnitude) * 0x1.0p+112f) * 0x1.0p-110f;
  const std::uint32_t sum =
      bit_cast<std::uint32_t>(bit_cast<float>((bias >> 1) + 0x07800000u) + scaled);
  const std::uint32_t finite = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  const std::uint32_t result = magnitude > 0x7F800000u ? 0x7E00u : finite;
  return {static_cast<std::uint16_t>(((bits >> 16) & 0x8000u) | result)};
}

template <>
CTT_INLINE BFloat16 narrow<BFloat16, double>(double x) {
  return narrow<BFloat16>(static_cast<float>(x));
}

template <>
CTT_INLINE Half narrow<Half, double>(double x) {
  return narrow<Half>(static_cast<float>(x));
}

// Half types are computed in float32, as the reference does.
template <class T>
using Wide = decltype(widen(T{}));

// A (rows, columns) tensor as it lies in memory; strides count elements.
struct Matrix {
  std::uintptr_t data;
  DType dtype;
  std::int64_t row_stride;
  std::int64_t column_stride;
};

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Calls f with a value of the type that `dtype` names.
template <class F>
void visit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    case DType::f16:
      return f(Half{});
    case DType::bf16:
      return f(BFloat16{});
  }
  throw std::invalid_argument("ctt._cpu: unknown dtype code");
}

}  // namespace ctt
