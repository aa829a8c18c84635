// teacher <- decay * teacher + (1 - decay) * student over a list of tensors, in one parallel pass.

#include <algorithm>

#include "isa.h"
#include "ops.h"

namespace ctt {
namespace {

// Elements a thread takes at once: 256 KiB of float32, long enough for the prefetcher, short
// enough that one large tensor is shared by all threads.
constexpr std::int64_t kChunk = 1 << 16;

struct Chunk {
  std::size_t tensor;
  std::int64_t begin;
  std::int64_t end;
};

template <class T, class S>
CTT_INLINE void blend(std::uintptr_t teacher, std::uintptr_t student, std::int64_t begin,
                      std::int64_t end, double decay) {
  using A = Wide<T>;
  T* t = reinterpret_cast<T*>(teacher);
  const S* s = reinterpret_cast<const S*>(student);
  const A keep = static_cast<A>(decay);
  const A take = static_cast<A>(1.0 - decay);
#pragma omp simd
  for (std::int64_t i = begin; i < end; ++i) {
    t[i] = narrow<T>(keep * widen(t[i]) + take * static_cast<A>(widen(s[i])));
  }
}

template <class T>
CTT_INLINE void blend_into(const EmaPair& pair, std::int64_t begin, std::int64_t end,
                           double decay) {
  switch (pair.student_dtype) {
    case DType::f32:
      return blend<T, float>(pair.teacher, pair.student, begin, end, decay);
    case DType::f64:
      return blend<T, double>(pair.teacher, pair.student, begin, end, decay);
    case DType::f16:
      return blend<T, Half>(pair.teacher, pair.student, begin, end, decay);
    case DType::bf16:
      return blend<T, BFloat16>(pair.teacher, pair.student, begin, end, decay);
  }
}

CTT_INLINE void ema_chunk(const EmaPair& pair, std::int64_t begin, std::int64_t end,
                          double decay) {
  switch (pair.teacher_dtype) {
    case DType::f32:
      return blend_into<float>(pair, begin, end, decay);
    case DType::f64:
      return blend_into<double>(pair, begin, end, decay);
    case DType::f16:
      return blend_into<Half>(pair, begin, end, decay);
    case DType::bf16:
      return blend_into<BFloat16>(pair, begin, end, decay);
  }
}

}  // namespace

void ema_update(const std::vector<EmaPair>& pairs, double decay, int threads) {
  std::vector<Chunk> chunks;
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    for (std::int64_t begin = 0; begin < pairs[i].size; begin += kChunk) {
      chunks.push_back({i, begin, std::min(begin + kChunk, pairs[i].size)});
    }
  }
  const std::int64_t total = static_cast<std::int64_t>(chunks.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && total > 1)
  for (std::int64_t i = 0; i < total; ++i) {
    const Chunk& chunk = chunks[static_cast<std::size_t>(i)];
    per_isa<ema_chunk>(pairs[chunk.tensor], chunk.begin, chunk.end, decay);
  }
}

}  // namespace ctt
