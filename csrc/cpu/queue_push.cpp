// Chosen features, L2-normalised, into the ring of each class.

#include <algorithm>
#include <cmath>

#include "isa.h"
#include "ops.h"

namespace ctt {
namespace {

struct Move {
  std::int64_t source;  // row of the features
  std::int64_t target;  // row of the keys as (C * V, D)
};

inline std::int64_t modulo(std::int64_t a, std::int64_t b) { return ((a % b) + b) % b; }

// The chosen pixels lie anywhere, so that no hardware prefetcher finds the next row.
constexpr std::int64_t kAhead = 3;
constexpr std::int64_t kCacheLine = 64;

inline void prefetch_row(const Matrix& m, std::int64_t row, std::int64_t dim) {
#if defined(__GNUC__)
  if (m.column_stride != 1) return;
  visit(m.dtype, [&](auto element) {
    using T = decltype(element);
    const T* x = pointer<const T>(m.data) + row * m.row_stride;
    constexpr std::int64_t step = kCacheLine / static_cast<std::int64_t>(sizeof(T));
    for (std::int64_t d = 0; d < dim; d += step) __builtin_prefetch(x + d);
  });
#endif
}

// Of more than V features for one class only the last V survive; the rest is never written.
void push_class(const PushInput& in, std::int64_t c, std::vector<Move>& moves) {
  const std::int64_t* row = in.index + c * in.k;
  const auto exists = [&](std::int64_t i) { return i >= 0 && i < in.n; };
  const std::int64_t pushed = std::count_if(row, row + in.k, exists);
  const std::int64_t start = modulo(in.cursor[c], in.capacity);
  std::int64_t nth = 0;
  for (const std::int64_t* i = row; i != row + in.k; ++i) {
    if (!exists(*i)) continue;
    if (nth >= pushed - in.capacity) {
      moves.push_back({*i, c * in.capacity + (start + nth) % in.capacity});
    }
    ++nth;
  }
  in.cursor[c] = (start + pushed) % in.capacity;
  in.count[c] = std::min(in.count[c] + pushed, in.capacity);
}

template <class T, class K>
CTT_INLINE void store_normalized(const T* x, std::int64_t stride, std::int64_t dim, K* key) {
  using A = Wide<T>;
  A squared = 0;
#pragma omp simd reduction(+ : squared)
  for (std::int64_t d = 0; d < dim; ++d) {
    const A value = widen(x[d * stride]);
    squared += value * value;
  }
  if (!(squared > static_cast<A>(kNormEps * kNormEps)) || !std::isfinite(squared)) {
    std::fill(key, key + dim, K{});
    return;
  }
  const A norm = std::sqrt(squared);
#pragma omp simd
  for (std::int64_t d = 0; d < dim; ++d) key[d] = narrow<K>(widen(x[d * stride]) / norm);
}

template <class T>
CTT_INLINE void store_as(const T* x, std::int64_t stride, std::int64_t dim, std::uintptr_t keys,
                         DType dtype, std::int64_t target) {
  const std::int64_t offset = target * dim;
  switch (dtype) {
    case DType::f32:
      return store_normalized(x, stride, dim, reinterpret_cast<float*>(keys) + offset);
    case DType::f64:
      return store_normalized(x, stride, dim, reinterpret_cast<double*>(keys) + offset);
    case DType::f16:
      return store_normalized(x, stride, dim, reinterpret_cast<Half*>(keys) + offset);
    case DType::bf16:
      return store_normalized(x, stride, dim, reinterpret_cast<BFloat16*>(keys) + offset);
  }
}

template <class T>
CTT_INLINE void store_row(const Matrix& m, std::int64_t row, std::int64_t dim,
                          std::uintptr_t keys, DType dtype, std::int64_t target) {
  const T* x = reinterpret_cast<const T*>(m.data) + row * m.row_stride;
  // a literal stride of 1 lets the compiler load whole vectors
  if (m.column_stride == 1) return store_as(x, 1, dim, keys, dtype, target);
  return store_as(x, m.column_stride, dim, keys, dtype, target);
}

CTT_INLINE void push_row(const Matrix& features, std::int64_t row, std::int64_t dim,
                         std::uintptr_t keys, DType dtype, std::int64_t target) {
  switch (features.dtype) {
    case DType::f32:
      return store_row<float>(features, row, dim, keys, dtype, target);
    case DType::f64:
      return store_row<double>(features, row, dim, keys, dtype, target);
    case DType::f16:
      return store_row<Half>(features, row, dim, keys, dtype, target);
    case DType::bf16:
      return store_row<BFloat16>(features, row, dim, keys, dtype, target);
  }
}

}  // namespace

void queue_push(const PushInput& in, const Matrix& features, std::uintptr_t keys, DType dtype,
                int threads) {
  if (in.capacity < 1) return;
  std::vector<Move> moves;
  for (std::int64_t c = 0; c < in.num_classes; ++c) push_class(in, c, moves);
  const std::int64_t total = static_cast<std::int64_t>(moves.size());
#pragma omp parallel for num_threads(threads) if (threads > 1 && total > 1)
  for (std::int64_t i = 0; i < total; ++i) {
    const Move& move = moves[static_cast<std::size_t>(i)];
    if (i + kAhead < total) {
      prefetch_row(features, moves[static_cast<std::size_t>(i + kAhead)].source, in.dim);
    }
    per_isa<push_row>(features, move.source, in.dim, keys, dtype, move.target);
  }
}

}  // namespace ctt
