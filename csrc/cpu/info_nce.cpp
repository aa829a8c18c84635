// Equation (6) for one pixel, loss and weights of the gradient in one go.
//
// With Z the sum over the negatives of e^s: the loss is the mean over the own queue of
// softplus(log Z - s+); with w+ = sigmoid(log Z - s+) its derivative is -w+ / V with respect to
// s+, and mean(w+) e^s- / Z with respect to s-. The weights are written without the common factor
// mean(w+) / Z.

#include <algorithm>
#include <cmath>
#include <limits>

#include "isa.h"
#include "negatives.h"
#include "rows.h"

namespace ctt {
namespace {

template <class A>
CTT_INLINE void row(const Queues& queues, std::int64_t c, A inverse_tau, A* score, A* loss,
                    A* factor) {
  const Negatives<A> negatives = exp_negatives(score, queues, c, inverse_tau);
  const A log_sum = std::log(negatives.sum);
  A* own = score + queues.begin[c];
  const std::int64_t size = queues.size[c];
  A total = 0;
  A slopes = 0;
#pragma omp simd reduction(+ : total, slopes)
  for (std::int64_t j = 0; j < size; ++j) {
    const Softplus<A> term = softplus((negatives.top - own[j]) * inverse_tau + log_sum);
    total += term.value;
    slopes += term.slope;
    own[j] = term.slope;
  }
  // The slopes vanish where the positives win by more than the number format can tell, and shortly
  // before that the quotient would overflow. So small a gradient is 0 to any precision.
  constexpr A least = std::numeric_limits<A>::min() * (sizeof(A) == 4 ? A(1e8) : A(1e16));
  const A share = -negatives.sum / std::max(slopes, least);
  for (std::int64_t j = 0; j < size; ++j) own[j] *= share;
  *loss = total / static_cast<A>(size);
  *factor = slopes / static_cast<A>(size) / negatives.sum * inverse_tau;
}

}  // namespace

void info_nce_row(const Queues& queues, std::int64_t c, float inverse_tau, float* score,
                             float* loss, float* factor) {
  per_isa<row<float>>(queues, c, inverse_tau, score, loss, factor);
}

void info_nce_row(const Queues& queues, std::int64_t c, double inverse_tau,
                             double* score, double* loss, double* factor) {
  per_isa<row<double>>(queues, c, inverse_tau, score, loss, factor);
}

}  // namespace ctt
