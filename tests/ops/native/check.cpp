// The C++ kernels without Python, against plain loops in double: for processors on which no Python
// runs here. Ends with 1 and a line for each result that is wrong.

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "isa.h"
#include "ops.h"

namespace {

using Size = std::int64_t;

int wrong = 0;

void expect(const char* what, double got, double want, double tolerance) {
  if (std::fabs(got - want) <= tolerance) return;
  std::printf("%s: got %.9g, expected %.9g\n", what, got, want);
  wrong = 1;
}

std::uintptr_t address(const void* p) { return reinterpret_cast<std::uintptr_t>(p); }

// Equation (6) of one pixel, and its gradient by the query.
double loss_of(const double* query, const std::vector<double>& keys, Size own, Size classes,
               Size capacity, Size dim, double tau, std::vector<double>* grad) {
  double squared = 0;
  for (Size d = 0; d < dim; ++d) squared += query[d] * query[d];
  const double norm = std::sqrt(squared);
  std::vector<double> score(classes * capacity);
  double z = 0;
  for (Size j = 0; j < classes * capacity; ++j) {
    for (Size d = 0; d < dim; ++d) score[j] += query[d] / norm * keys[j * dim + d] / tau;
    if (j / capacity != own) z += std::exp(score[j]);
  }
  double loss = 0;
  double push = 0;
  std::vector<double> by_unit(dim, 0.0);
  for (Size j = own * capacity; j < (own + 1) * capacity; ++j) {
    const double p = std::exp(score[j]) / (std::exp(score[j]) + z);
    loss -= std::log(p) / capacity;
    push += (1 - p) / capacity;
    for (Size d = 0; d < dim; ++d) by_unit[d] -= (1 - p) / capacity / tau * keys[j * dim + d];
  }
  for (Size j = 0; j < classes * capacity; ++j) {
    if (j / capacity == own) continue;
    const double weight = push * std::exp(score[j]) / z / tau;
    for (Size d = 0; d < dim; ++d) by_unit[d] += weight * keys[j * dim + d];
  }
  double along = 0;
  for (Size d = 0; d < dim; ++d) along += by_unit[d] * query[d] / norm;
  for (Size d = 0; d < dim; ++d) (*grad)[d] = (by_unit[d] - along * query[d] / norm) / norm;
  return loss;
}

template <class A>
void check_contrast(ctt::DType dtype, double tolerance, int threads) {
  const Size pixels = 101, classes = 5, capacity = 7, dim = 37;
  const double tau = 0.2;
  std::mt19937 source(1);
  std::normal_distribution<double> normal;
  std::vector<A> query(pixels * dim), keys(classes * capacity * dim);
  std::vector<A> grad(pixels * dim), loss(pixels);
  for (A& x : query) x = static_cast<A>(normal(source));
  for (Size j = 0; j < classes * capacity; ++j) {
    double squared = 0;
    for (Size d = 0; d < dim; ++d) {
      keys[j * dim + d] = static_cast<A>(normal(source));
      squared += static_cast<double>(keys[j * dim + d]) * static_cast<double>(keys[j * dim + d]);
    }
    for (Size d = 0; d < dim; ++d) keys[j * dim + d] /= static_cast<A>(std::sqrt(squared));
  }
  std::vector<Size> label(pixels), index(pixels), begin(classes), size(classes, capacity);
  std::vector<double> weight(classes, 1.0);
  for (Size i = 0; i < pixels; ++i) label[i] = (3 * i) % classes, index[i] = i;
  for (Size c = 0; c < classes; ++c) begin[c] = c * capacity;

  const ctt::Matrix none{0, dtype, 0, 0};
  const ctt::Contrast in{{address(query.data()), dtype, dim, 1},
                         none,
                         {address(grad.data()), dtype, dim, 1},
                         index.data(),
                         label.data(),
                         weight.data(),
                         pixels,
                         dim,
                         tau,
                         threads};
  const ctt::Queues queues{begin.data(), size.data(), 1, classes, classes * capacity};
  ctt::contrast<A>(in, queues, keys.data(), loss.data(), nullptr);

  const std::vector<double> wide_keys(keys.begin(), keys.end());
  const std::vector<double> wide(query.begin(), query.end());
  std::vector<double> want(dim);
  for (Size i = 0; i < pixels; ++i) {
    const double true_loss = loss_of(wide.data() + i * dim, wide_keys, label[i], classes, capacity,
                                     dim, tau, &want);
    expect("loss", loss[i], true_loss, 10 * tolerance);
    for (Size d = 0; d < dim; ++d) expect("gradient", grad[i * dim + d], want[d], tolerance);
  }
}

// 1 + 2^-k survives in the types that hold it, and all of them average.
void check_ema() {
  std::vector<float> teacher(1003, 1.0f);
  std::vector<std::uint16_t> bfloat(1003, 0x4040), half(1003, 0x4200);  // 3
  for (int pair = 0; pair < 2; ++pair) {
    const bool is_half = pair == 1;
    ctt::ema_update({{address(teacher.data()), address((is_half ? half : bfloat).data()), 1003,
                      ctt::DType::f32, is_half ? ctt::DType::f16 : ctt::DType::bf16}},
                    0.5, 1);
  }
  for (const float x : teacher) expect("teacher", x, 2.5, 0);
}

void check_topk_and_push() {
  const std::vector<float> confidence{0.1f, 0.9f, 0.5f, 0.9f, 0.7f};
  const std::vector<Size> label{0, 1, 0, 1, 255};
  std::vector<Size> index(4), count(2), cursor(2, 1), held(2, 0);
  ctt::class_topk({address(confidence.data()), label.data(), nullptr, 5, 2, 2}, ctt::DType::f32,
                  index.data(), count.data(), 1);
  const Size want[] = {2, 0, 1, 3};  // ties go to the lower index
  for (int i = 0; i < 4; ++i) expect("index", static_cast<double>(index[i]), want[i], 0);

  const std::vector<float> features{3, 4, 0, 5, 6, 8, 1, 0, 0, 0};
  std::vector<float> keys(2 * 2 * 2, 0.0f);
  ctt::queue_push({index.data(), held.data(), cursor.data(), 5, 2, 2, 2, 2},
                  {address(features.data()), ctt::DType::f32, 2, 1}, address(keys.data()),
                  ctt::DType::f32, 1);
  const double ring[] = {0.6, 0.8, 0.6, 0.8, 1, 0, 0, 1};  // the first goes to the second place
  for (int i = 0; i < 8; ++i) expect("key", keys[i], ring[i], 1e-6);
}

}  // namespace

int main() {
  for (const int threads : {1, 3}) {
    check_contrast<float>(ctt::DType::f32, 2e-5, threads);
    check_contrast<double>(ctt::DType::f64, 1e-12, threads);
  }
  check_ema();
  check_topk_and_push();
  std::printf("%s: %s\n", ctt::isa_name(), wrong ? "wrong" : "right");
  return wrong;
}
