// Equation (8) for one pixel, loss and weights of the gradient in one go.
//
// With Z the sum over the negatives of e^s and s+ the score of the peer's vector u: the loss is
// softplus(log Z - s+); with w = sigmoid(log Z - s+) the gradient with respect to the pixel's unit
// vector is w (sum of e^s- k- / Z - u) / tau. The weights are written without the common factor
// w / Z, which leaves -Z u for the positive.

#include <cmath>

#include "isa.h"
#include "negatives.h"
#include "rows.h"

namespace ctt {
namespace {

template <class A>
CTT_INLINE void row(const Queues& queues, std::int64_t c, std::int64_t dim, A inverse_tau,
                    const A* unit, A* score, A* positive, A* loss, A* factor) {
  A cosine = 0;
#pragma omp simd reduction(+ : cosine)
  for (std::int64_t d = 0; d < dim; ++d) cosine += unit[d] * positive[d];

  const Negatives<A> negatives = exp_negatives(score, queues, c, inverse_tau);
  const Softplus<A> term =
      softplus((negatives.top - cosine) * inverse_tau + static_cast<A>(std::log(negatives.sum)));
  *loss = term.value;
  *factor = term.slope / negatives.sum * inverse_tau;

#pragma omp simd
  for (std::int64_t d = 0; d < dim; ++d) positive[d] *= -negatives.sum;
  for (std::int64_t q = c; q < queues.banks * queues.num_classes; q += queues.num_classes) {
    A* own = score + queues.begin[q];
    for (std::int64_t j = 0; j < queues.size[q]; ++j) own[j] = A(0);
  }
}

}  // namespace

void pair_info_nce_row(const Queues& queues, std::int64_t c, std::int64_t dim,
                                  float inverse_tau, const float* unit, float* score,
                                  float* positive, float* loss, float* factor) {
  per_isa<row<float>>(queues, c, dim, inverse_tau, unit, score, positive, loss, factor);
}

void pair_info_nce_row(const Queues& queues, std::int64_t c, std::int64_t dim,
                                  double inverse_tau, const double* unit, double* score,
                                  double* positive, double* loss, double* factor) {
  per_isa<row<double>>(queues, c, dim, inverse_tau, unit, score, positive, loss, factor);
}

}  // namespace ctt
