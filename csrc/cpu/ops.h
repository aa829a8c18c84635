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

// A block of b pixels of a contrast loss. Everything is in the dtype of the arithmetic, float32
// or float64, and contiguous.
struct Block {
  const std::int64_t* row;    // (b,) which pixel
  const std::int64_t* label;  // (N,)
  std::int64_t b;
  std::int64_t dim;
  int threads;
};

// unit (b, D) <- rows of `source`, L2-normalised; inverse_norm (b,), 0 without direction
template <class A>
void gather_unit(const Block& block, const Matrix& source, A* unit, A* inverse_norm);

// The keys that belong to a class: begin and size (banks, C), places in a row of scores (m).
struct Queues {
  const std::int64_t* begin;
  const std::int64_t* size;
  std::int64_t banks;
  std::int64_t num_classes;
  std::int64_t m;
};

// score (b, m), cosines, becomes the weights of the keys in the gradient with respect to `unit`, up
// to a factor (b,) for each row, which keeps the weights near 1; loss (b,).
template <class A>
void info_nce_rows(const Block& block, const Queues& queues, double temperature, A* score, A* loss,
                   A* factor);

// As info_nce_rows, with one positive (b, D) for each row, which becomes its own share of the
// gradient; the keys' share is to be added to it.
template <class A>
void pair_info_nce_rows(const Block& block, const Queues& queues, double temperature,
                        const A* unit, A* score, A* positive, A* loss, A* factor);

// grad[row] <- gradient with respect to the vector before it was normalised, from slope (b, D), the
// gradient with respect to `unit` before `factor` and the weight of the pixel's class (C,). Uses
// up slope.
template <class A>
void scatter_gradient(const Block& block, const A* unit, const A* inverse_norm, const A* factor,
                      const double* class_weight, A* slope, const Matrix& grad);

}  // namespace ctt
