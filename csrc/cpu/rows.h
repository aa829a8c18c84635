// The steps of a contrast loss on a few rows, one function for each type of the arithmetic because
// templates cannot be cloned for several instruction sets.
#pragma once

#include "ops.h"

namespace ctt {

// unit (rows, D) <- rows of `source`, L2-normalised; inverse_norm (rows,), 0 without direction
void gather_group(const Matrix& source, const std::int64_t* row, std::int64_t rows,
                  std::int64_t dim, float* unit, float* inverse_norm);
void gather_group(const Matrix& source, const std::int64_t* row, std::int64_t rows,
                  std::int64_t dim, double* unit, double* inverse_norm);

// A row of scores, cosines, becomes the weights of the keys in the gradient with respect to the
// unit vector, up to `factor`, which leaves weights near 1.
void info_nce_row(const Queues& queues, std::int64_t c, float inverse_tau, float* score,
                  float* loss, float* factor);
void info_nce_row(const Queues& queues, std::int64_t c, double inverse_tau, double* score,
                  double* loss, double* factor);

// As info_nce_row; the positive (D,) becomes its own share of the gradient.
void pair_info_nce_row(const Queues& queues, std::int64_t c, std::int64_t dim, float inverse_tau,
                       const float* unit, float* score, float* positive, float* loss,
                       float* factor);
void pair_info_nce_row(const Queues& queues, std::int64_t c, std::int64_t dim, double inverse_tau,
                       const double* unit, double* score, double* positive, double* loss,
                       double* factor);

// grad[row] <- the gradient with respect to the vector before it was normalised, from slope
// (rows, D), `scale` times which is the gradient with respect to the unit vector over the norm.
// Uses up slope. along (rows,) <- slope . unit.
void scatter_group(const Matrix& grad, const std::int64_t* row, std::int64_t rows,
                   std::int64_t dim, const float* unit, const float* scale, float* slope,
                   float* along);
void scatter_group(const Matrix& grad, const std::int64_t* row, std::int64_t rows,
                   std::int64_t dim, const double* unit, const double* scale, double* slope,
                   double* along);

}  // namespace ctt
