// What both contrast losses do around their rows: choose the pixels that count, bring their
// vectors together as unit vectors, and take the gradient back through the normalisation.
//
// A group of rows is handled at once, so that a (D, h, w) map is read and written along its pixels.

#include <algorithm>
#include <cmath>

#include "isa.h"
#include "rows.h"

namespace ctt {
namespace {

template <class A, class T>
CTT_INLINE void load_group(const Matrix& m, const std::int64_t* row, std::int64_t rows,
                           std::int64_t dim, A* out) {
  const T* x = reinterpret_cast<const T*>(m.data);
  if (m.column_stride == 1) {
    for (std::int64_t r = 0; r < rows; ++r) {
      const T* from = x + row[r] * m.row_stride;
#pragma omp simd
      for (std::int64_t d = 0; d < dim; ++d) out[r * dim + d] = static_cast<A>(widen(from[d]));
    }
    return;
  }
  for (std::int64_t d = 0; d < dim; ++d) {
    const T* from = x + d * m.column_stride;
    for (std::int64_t r = 0; r < rows; ++r) {
      out[r * dim + d] = static_cast<A>(widen(from[row[r] * m.row_stride]));
    }
  }
}

template <class A, class T>
CTT_INLINE void store_group(const Matrix& m, const std::int64_t* row, std::int64_t rows,
                            std::int64_t dim, const A* in) {
  T* x = reinterpret_cast<T*>(m.data);
  if (m.column_stride == 1) {
    for (std::int64_t r = 0; r < rows; ++r) {
      T* to = x + row[r] * m.row_stride;
#pragma omp simd
      for (std::int64_t d = 0; d < dim; ++d) to[d] = narrow<T>(in[r * dim + d]);
    }
    return;
  }
  for (std::int64_t d = 0; d < dim; ++d) {
    T* to = x + d * m.column_stride;
    for (std::int64_t r = 0; r < rows; ++r) {
      to[row[r] * m.row_stride] = narrow<T>(in[r * dim + d]);
    }
  }
}

// x <- x / |x| and returns 1 / |x|; 0 for both without direction. The sum is kept in double, where
// no float32 overflows.
template <class A>
CTT_INLINE A normalize(A* x, std::int64_t dim) {
  double squared = 0;
#pragma omp simd reduction(+ : squared)
  for (std::int64_t d = 0; d < dim; ++d) {
    squared += static_cast<double>(x[d]) * static_cast<double>(x[d]);
  }
  if (squared <= kNormEps * kNormEps) {  // NaN is no length either, and shows in the loss
    for (std::int64_t d = 0; d < dim; ++d) x[d] = A(0);
    return A(0);
  }
  const double inverse = 1.0 / std::sqrt(squared);
#pragma omp simd
  for (std::int64_t d = 0; d < dim; ++d) {
    x[d] = static_cast<A>(static_cast<double>(x[d]) * inverse);
  }
  return static_cast<A>(inverse);
}

// slope <- scale (slope - (slope . unit) unit); returns slope . unit
template <class A>
CTT_INLINE A project(const A* unit, std::int64_t dim, A scale, A* slope) {
  A along = 0;
#pragma omp simd reduction(+ : along)
  for (std::int64_t d = 0; d < dim; ++d) along += slope[d] * unit[d];
#pragma omp simd
  for (std::int64_t d = 0; d < dim; ++d) slope[d] = scale * (slope[d] - along * unit[d]);
  return along;
}

template <class A>
CTT_INLINE void gather(const Matrix& source, const std::int64_t* row, std::int64_t rows,
                       std::int64_t dim, A* unit, A* inverse_norm) {
  switch (source.dtype) {
    case DType::f32:
      load_group<A, float>(source, row, rows, dim, unit);
      break;
    case DType::f64:
      load_group<A, double>(source, row, rows, dim, unit);
      break;
    case DType::f16:
      load_group<A, Half>(source, row, rows, dim, unit);
      break;
    case DType::bf16:
      load_group<A, BFloat16>(source, row, rows, dim, unit);
      break;
  }
  for (std::int64_t r = 0; r < rows; ++r) inverse_norm[r] = normalize(unit + r * dim, dim);
}

template <class A>
CTT_INLINE void scatter(const Matrix& grad, const std::int64_t* row, std::int64_t rows,
                        std::int64_t dim, const A* unit, const A* scale, A* slope,
                        A* along) {
  for (std::int64_t r = 0; r < rows; ++r) {
    along[r] = project(unit + r * dim, dim, scale[r], slope + r * dim);
  }
  switch (grad.dtype) {
    case DType::f32:
      return store_group<A, float>(grad, row, rows, dim, slope);
    case DType::f64:
      return store_group<A, double>(grad, row, rows, dim, slope);
    case DType::f16:
      return store_group<A, Half>(grad, row, rows, dim, slope);
    case DType::bf16:
      return store_group<A, BFloat16>(grad, row, rows, dim, slope);
  }
}

}  // namespace

void gather_group(const Matrix& source, const std::int64_t* row, std::int64_t rows,
                             std::int64_t dim, float* unit, float* inverse_norm) {
  per_isa<gather<float>>(source, row, rows, dim, unit, inverse_norm);
}

void gather_group(const Matrix& source, const std::int64_t* row, std::int64_t rows,
                             std::int64_t dim, double* unit, double* inverse_norm) {
  per_isa<gather<double>>(source, row, rows, dim, unit, inverse_norm);
}

void scatter_group(const Matrix& grad, const std::int64_t* row, std::int64_t rows,
                              std::int64_t dim, const float* unit, const float* scale,
                              float* slope, float* along) {
  per_isa<scatter<float>>(grad, row, rows, dim, unit, scale, slope, along);
}

void scatter_group(const Matrix& grad, const std::int64_t* row, std::int64_t rows,
                              std::int64_t dim, const double* unit, const double* scale,
                              double* slope, double* along) {
  per_isa<scatter<double>>(grad, row, rows, dim, unit, scale, slope, along);
}

std::int64_t select_pixels(const std::int64_t* label, const bool* mask, std::int64_t n,
                           const std::int64_t* held, std::int64_t banks,
                           std::int64_t num_classes, bool need_own, std::int64_t* index,
                           std::int64_t* pixels) {
  std::vector<bool> holds(static_cast<std::size_t>(num_classes), false);
  for (std::int64_t q = 0; q < banks * num_classes; ++q) {
    if (held[q] > 0) holds[static_cast<std::size_t>(q % num_classes)] = true;
  }
  const std::int64_t holding = std::count(holds.begin(), holds.end(), true);
  std::vector<char> counts;  // by class
  for (const bool own : holds) counts.push_back(holding > (own ? 1 : 0) && (own || !need_own));

  std::fill(pixels, pixels + num_classes, std::int64_t{0});
  std::int64_t chosen = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t c = label[i];
    if (c < 0 || c >= num_classes || (mask != nullptr && !mask[i])) continue;
    if (!counts[static_cast<std::size_t>(c)]) continue;
    index[chosen++] = i;
    ++pixels[c];
  }
  return chosen;
}

}  // namespace ctt
