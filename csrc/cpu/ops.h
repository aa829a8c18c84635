// The kernels, as bindings.cpp calls them. `threads` is torch.get_num_threads(): 1 in a forked
// worker, where a second OpenMP thread would hang.
#pragma once

#include <vector>

#include "common.h"

namespace ctt {

// A vector shorter than this has no direction; NORM_EPS of ctt/ops/reference.py.
constexpr double kNormEps = 1e-12;

struct EmaPair {
  std::uintptr_t teacher;
  std::uintptr_t student;
  std::int64_t size;
  DType teacher_dtype;
  DType student_dtype;
};

void ema_update(const std::vector<EmaPair>& pairs, double decay, int threads);

struct TopkInput {
  std::uintptr_t confidence;  // (N,)
  const std::int64_t* label;  // (N,)
  const bool* valid;          // (N,), null: all
  std::int64_t n;
  std::int64_t k;
  std::int64_t num_classes;
};

// index (C, k), count (C,)
void class_topk(const TopkInput& in, DType dtype, std::int64_t* index, std::int64_t* count,
                int threads);

struct PushInput {
  const std::int64_t* index;  // (C, k)
  std::int64_t* count;        // (C,)
  std::int64_t* cursor;       // (C,)
  std::int64_t n;
  std::int64_t k;
  std::int64_t num_classes;
  std::int64_t capacity;
  std::int64_t dim;
};

// features (N, D), keys (C, V, D) contiguous
void queue_push(const PushInput& in, const Matrix& features, std::uintptr_t keys, DType dtype,
                int threads);

// Pixels of a contrast loss that count, in their order.
//
// label (N,), mask (N,) or null, held (banks, C): keys held by each queue. Fills index (N,) and
// pixels (C,), and returns how many pixels count.
std::int64_t select_pixels(const std::int64_t* label, const bool* mask, std::int64_t n,
                           const std::int64_t* held, std::int64_t banks,
                           std::int64_t num_classes, bool need_own, std::int64_t* index,
                           std::int64_t* pixels);

// The keys that belong to a class: begin and size (banks, C), places in a row of m scores.
struct Queues {
  const std::int64_t* begin;
  const std::int64_t* size;
  std::int64_t banks;
  std::int64_t num_classes;
  std::int64_t m;
};

struct Contrast {
  Matrix query;     // (N, D)
  Matrix positive;  // (N, D), of pair_info_nce; address 0 for info_nce
  Matrix grad;      // (N, D), written where a pixel counts; address 0: not wanted
  const std::int64_t* index;   // (n,) pixels that count
  const std::int64_t* label;   // (N,)
  const double* class_weight;  // (C,) what the loss of a pixel counts in the result
  std::int64_t n;
  std::int64_t dim;
  double temperature;
  int threads;
};

// Loss (n,) of the pixels that count and the gradient with respect to their queries, against keys
// (m, D) contiguous. A, float or double, is the type of the arithmetic. slope (n,), null where it is
// not wanted: the derivative of what a pixel gives to the result by the temperature; needs `grad`.
template <class A>
void contrast(const Contrast& in, const Queues& queues, const A* keys, A* loss, A* slope);

}  // namespace ctt
