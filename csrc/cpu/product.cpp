#include "product.h"

#include <algorithm>
#include <cstring>

#include "isa.h"

namespace ctt {
namespace {

// Depth of a panel that is swept before the next: a panel 128 bytes wide has 32 KiB then and streams
// through the first-level cache once a tile; half of it loads and stores the sums twice as often,
// which costs 2 to 3 % more time.
constexpr std::int64_t kDepth = 256;

template <class T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));
};

// c (Height, 2 vectors) <- a b, kept in registers over the depth
template <class T, int Bytes, int Height>
CTT_INLINE void tile(const T* a, std::int64_t a_stride, const T* b, std::int64_t depth, bool add,
                     T* c, std::int64_t c_stride) {
  using Vector = typename VectorOf<T, Bytes>::type;
  constexpr std::int64_t lanes = Bytes / static_cast<int>(sizeof(T));
  Vector left[Height];
  Vector right[Height];
#pragma GCC unroll 16
  for (int r = 0; r < Height; ++r) {
    left[r] = add ? *reinterpret_cast<const Vector*>(c + r * c_stride) : Vector{};
    right[r] = add ? *reinterpret_cast<const Vector*>(c + r * c_stride + lanes) : Vector{};
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    const Vector b_left = *reinterpret_cast<const Vector*>(b + k * 2 * lanes);
    const Vector b_right = *reinterpret_cast<const Vector*>(b + k * 2 * lanes + lanes);
#pragma GCC unroll 16
    for (int r = 0; r < Height; ++r) {
      const T value = a[r * a_stride + k];
      left[r] += value * b_left;
      right[r] += value * b_right;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Height; ++r) {
    *reinterpret_cast<Vector*>(c + r * c_stride) = left[r];
    *reinterpret_cast<Vector*>(c + r * c_stride + lanes) = right[r];
  }
}

template <class T, int Bytes, int Height>
CTT_INLINE void multiply(const T* a, std::int64_t a_stride, std::int64_t rows, const Panels<T>& b,
                         bool add, T* c, std::int64_t c_stride) {
  constexpr std::int64_t width = 2 * Bytes / static_cast<int>(sizeof(T));
  for (std::int64_t k = 0; k < b.depth; k += kDepth) {
    const std::int64_t depth = std::min(kDepth, b.depth - k);
    for (std::int64_t j = 0; j < b.columns; j += width) {
      const T* panel = b.data + j * b.depth + k * width;
      for (std::int64_t r = 0; r < rows; r += Height) {
        tile<T, Bytes, Height>(a + r * a_stride + k, a_stride, panel, depth, add || k > 0,
                               c + r * c_stride + j, c_stride);
      }
    }
  }
}

template <class T>
void multiply_base(const T* a, std::int64_t a_stride, std::int64_t rows, const Panels<T>& b,
                   bool add, T* c, std::int64_t c_stride) {
  multiply<T, 16, 4>(a, a_stride, rows, b, add, c, c_stride);
}

#if defined(CTT_X86_DISPATCH)
template <class T>
__attribute__((target("arch=x86-64-v3"))) void multiply_v3(const T* a, std::int64_t a_stride,
                                                           std::int64_t rows, const Panels<T>& b,
                                                           bool add, T* c, std::int64_t c_stride) {
  multiply<T, 32, 6>(a, a_stride, rows, b, add, c, c_stride);
}

template <class T>
__attribute__((target("arch=x86-64-v4"))) void multiply_v4(const T* a, std::int64_t a_stride,
                                                           std::int64_t rows, const Panels<T>& b,
                                                           bool add, T* c, std::int64_t c_stride) {
  multiply<T, 64, 8>(a, a_stride, rows, b, add, c, c_stride);
}
#endif

template <class T>
Product<T> choose() {
  constexpr std::int64_t size = sizeof(T);
#if defined(CTT_X86_DISPATCH)
  if (isa() == Isa::v4) return {128 / size, 8, multiply_v4<T>};
  if (isa() == Isa::v3) return {64 / size, 6, multiply_v3<T>};
#endif
  return {32 / size, 4, multiply_base<T>};
}

}  // namespace

template <class T>
const Product<T>& product() {
  static const Product<T> chosen = choose<T>();
  return chosen;
}

template <class T>
void pack_panel(const T* b, std::int64_t depth, std::int64_t columns, std::int64_t row_stride,
                std::int64_t column_stride, std::int64_t width, std::int64_t panel, T* out) {
  const std::int64_t first = panel * width;
  const std::int64_t present = std::min(width, columns - first);
  T* to = out + first * depth;
  if (present < width) std::fill(to, to + depth * width, T(0));
  for (std::int64_t j = 0; j < present; ++j) {
    const T* from = b + (first + j) * column_stride;
    for (std::int64_t k = 0; k < depth; ++k) to[k * width + j] = from[k * row_stride];
  }
}

template const Product<float>& product();
template const Product<double>& product();
template void pack_panel(const float*, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                         std::int64_t, std::int64_t, float*);
template void pack_panel(const double*, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                         std::int64_t, std::int64_t, double*);

}  // namespace ctt
