// Sums over the negatives of one row of scores: all places but those of the own class.
#pragma once

#include <limits>

#include "ops.h"
#include "simd_math.h"

namespace ctt {

template <class A>
CTT_INLINE A range_max(const A* score, std::int64_t begin, std::int64_t end, A best) {
#pragma omp simd reduction(max : best)
  for (std::int64_t j = begin; j < end; ++j) best = score[j] > best ? score[j] : best;
  return best;
}

// score <- e^((score - top) / tau), returns the sum
template <class A>
CTT_INLINE A range_exp(A* score, std::int64_t begin, std::int64_t end, A top, A inverse_tau) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t j = begin; j < end; ++j) {
    const A e = exp_nonpositive((score[j] - top) * inverse_tau);
    score[j] = e;
    sum += e;
  }
  return sum;
}

template <class A>
struct Negatives {
  A top;  // the largest score: cosines need not be bounded, and at small tau e^(1/tau) overflows
  A sum;  // of e^((score - top) / tau), so at least 1
};

// Replaces the scores of the negatives of class c by e^((score - top) / tau). The bound |score| <=
// max |key| could stand for the top at temperatures that are not low, but its search takes no time
// that can be measured beside the products (30 rounds in turns, D = 64 and 256).
template <class A>
CTT_INLINE Negatives<A> exp_negatives(A* score, const Queues& queues, std::int64_t c,
                                      A inverse_tau) {
  Negatives<A> result{-std::numeric_limits<A>::infinity(), A(0)};
  std::int64_t start = 0;
  for (std::int64_t q = c; q < queues.banks * queues.num_classes; q += queues.num_classes) {
    result.top = range_max(score, start, queues.begin[q], result.top);
    start = queues.begin[q] + queues.size[q];
  }
  result.top = range_max(score, start, queues.m, result.top);

  start = 0;
  for (std::int64_t q = c; q < queues.banks * queues.num_classes; q += queues.num_classes) {
    result.sum += range_exp(score, start, queues.begin[q], result.top, inverse_tau);
    start = queues.begin[q] + queues.size[q];
  }
  result.sum += range_exp(score, start, queues.m, result.top, inverse_tau);
  return result;
}

}  // namespace ctt
