// The sweep of both contrast losses. A thread takes a group of pixels from their vectors to their
// gradients: cosines to all keys, loss and weights, weights times keys. Nothing of size (n, m) is
// ever held, and threads meet only once.

#include <algorithm>
#include <memory>

#include "product.h"
#include "rows.h"

namespace ctt {
namespace {

// Pixels of a group: a multiple of every tile's height. With few of them the scores against some
// thousand keys stay in the second-level cache; with many, keys that do not lie there are fetched
// seldom, which is worth more: 17 to 20 % of the time at D = 768 with 2,432 keys or at D = 256 with
// 9,600, and nothing below kNear.
constexpr std::int64_t kRows = 48;
constexpr std::int64_t kMostRows = 4 * kRows;
constexpr std::int64_t kNear = 4 << 20;  // bytes of the packed keys

// Every thread has several groups, so that the last ones end at about the same time.
std::int64_t rows_of_group(std::int64_t pixels, std::int64_t packed_bytes, int threads) {
  if (packed_bytes <= kNear) return kRows;
  const std::int64_t share = pixels / (std::int64_t{4} * std::max(threads, 1));
  return std::clamp(share / kRows * kRows, kRows, kMostRows);
}

// Not initialised: its pages are first touched by the thread that fills it.
template <class A>
std::unique_ptr<A[]> buffer(std::int64_t size) {
  return std::unique_ptr<A[]>(new A[static_cast<std::size_t>(size)]);
}

// The keys as the right-hand side of both products.
template <class A>
struct PackedKeys {
  std::unique_ptr<A[]> across;  // of (D, m)
  std::unique_ptr<A[]> along;   // of (m, D)
};

template <class A>
struct Workspace {
  std::unique_ptr<A[]> score;     // (rows, m)
  std::unique_ptr<A[]> unit;      // (rows, D)
  std::unique_ptr<A[]> positive;  // (rows, D)
  std::unique_ptr<A[]> slope;     // (rows, D)
  A inverse_norm[kMostRows];
  A unused[kMostRows];
  A factor[kMostRows];

  Workspace(std::int64_t rows, std::int64_t m, std::int64_t dim, std::int64_t slope_stride,
            bool paired)
      : score(buffer<A>(rows * m)),
        unit(buffer<A>(rows * dim)),
        positive(buffer<A>(paired ? rows * dim : 0)),
        slope(buffer<A>(rows * slope_stride)) {}
};

template <class A>
class Sweep {
 public:
  Sweep(const Contrast& in, const Queues& queues, const A* keys, A* loss, A* by_temperature)
      : in_(in),
        queues_(queues),
        keys_(keys),
        loss_(loss),
        by_temperature_(by_temperature),
        product_(product<A>()),
        score_stride_(round_up(queues.m, product_.width)),
        slope_stride_(round_up(in.dim, product_.width)),
        group_(rows_of_group(
            in.n, static_cast<std::int64_t>(2 * sizeof(A)) * score_stride_ * in.dim,
            in.threads)) {
    packed_.across = buffer<A>(score_stride_ * in.dim);
    if (in.grad.data) packed_.along = buffer<A>(slope_stride_ * queues.m);
    const int workers = std::max(in.threads, 1);
    for (int i = 0; i < workers; ++i) {
      workspaces_.emplace_back(group_, score_stride_, in.dim, slope_stride_,
                               in.positive.data != 0);
    }
  }

  void run() {
    const std::int64_t across = score_stride_ / product_.width;
    const std::int64_t along = in_.grad.data ? slope_stride_ / product_.width : 0;
    const std::int64_t workers = static_cast<std::int64_t>(workspaces_.size());
#pragma omp parallel num_threads(in_.threads) if (in_.threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t p = 0; p < across + along; ++p) pack(p, across);
#pragma omp for schedule(static, 1)
      for (std::int64_t worker = 0; worker < workers; ++worker) work(workspaces_[worker]);
    }
  }

 private:
  void pack(std::int64_t p, std::int64_t across) {
    const std::int64_t m = queues_.m;
    const std::int64_t dim = in_.dim;
    if (p < across) {
      pack_panel(keys_, dim, m, std::int64_t{1}, dim, product_.width, p, packed_.across.get());
    } else {
      pack_panel(keys_, m, dim, dim, std::int64_t{1}, product_.width, p - across,
                 packed_.along.get());
    }
  }

  // Groups are drawn one after the other, so that a thread that is held up holds up no other.
  void work(Workspace<A>& space) {
    for (;;) {
      std::int64_t start;
#pragma omp atomic capture
      {
        start = next_;
        next_ += group_;
      }
      if (start >= in_.n) return;
      const std::int64_t rows = std::min(group_, in_.n - start);
      forward(space, start, rows);
      if (in_.grad.data) backward(space, start, rows);
    }
  }

  void forward(Workspace<A>& space, std::int64_t start, std::int64_t rows) {
    const std::int64_t* index = in_.index + start;
    const std::int64_t dim = in_.dim;
    const std::int64_t padded = round_up(rows, product_.height);
    A* unit = space.unit.get();
    A* score = space.score.get();
    gather_group(in_.query, index, rows, dim, unit, space.inverse_norm);
    std::fill(unit + rows * dim, unit + padded * dim, A(0));
    product_.multiply(unit, dim, padded, {packed_.across.get(), dim, queues_.m}, false, score,
                      score_stride_);

    A* positive = space.positive.get();
    if (in_.positive.data) gather_group(in_.positive, index, rows, dim, positive, space.unused);
    const A inverse_tau = static_cast<A>(1.0 / in_.temperature);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t c = in_.label[index[r]];
      A* row = score + r * score_stride_;
      A* loss = loss_ + start + r;
      if (in_.positive.data) {
        pair_info_nce_row(queues_, c, dim, inverse_tau, unit + r * dim, row, positive + r * dim,
                          loss, space.factor + r);
      } else {
        info_nce_row(queues_, c, inverse_tau, row, loss, space.factor + r);
      }
    }
  }

  void backward(Workspace<A>& space, std::int64_t start, std::int64_t rows) {
    const std::int64_t* index = in_.index + start;
    const std::int64_t dim = in_.dim;
    A* slope = space.slope.get();
    product_.multiply(space.score.get(), score_stride_, round_up(rows, product_.height),
                      {packed_.along.get(), queues_.m, dim}, false, slope, slope_stride_);

    A scale[kMostRows];
    for (std::int64_t r = 0; r < rows; ++r) {
      const A* from = slope + r * slope_stride_;
      A* to = slope + r * dim;  // rows without padding lie at or before their old place
      if (in_.positive.data) {
        const A* positive = space.positive.get() + r * dim;
        for (std::int64_t d = 0; d < dim; ++d) to[d] = from[d] + positive[d];
      } else if (to != from) {
        std::copy(from, from + dim, to);
      }
      scale[r] = static_cast<A>(in_.class_weight[in_.label[index[r]]] *
                                static_cast<double>(space.factor[r]) *
                                static_cast<double>(space.inverse_norm[r]));
    }
    A along[kMostRows];
    scatter_group(in_.grad, index, rows, dim, space.unit.get(), scale, slope, along);
    if (by_temperature_ == nullptr) return;
    for (std::int64_t r = 0; r < rows; ++r) {
      // the scores are unit . key / tau
      by_temperature_[start + r] =
          static_cast<A>(-in_.class_weight[in_.label[index[r]]] *
                         static_cast<double>(space.factor[r]) * static_cast<double>(along[r]) /
                         in_.temperature);
    }
  }

  const Contrast& in_;
  const Queues& queues_;
  const A* keys_;
  A* loss_;
  A* by_temperature_;
  const Product<A>& product_;
  const std::int64_t score_stride_;
  const std::int64_t slope_stride_;
  const std::int64_t group_;  // pixels
  PackedKeys<A> packed_;
  std::vector<Workspace<A>> workspaces_;
  std::int64_t next_ = 0;
};

}  // namespace

template <class A>
void contrast(const Contrast& in, const Queues& queues, const A* keys, A* loss, A* slope) {
  Sweep<A>(in, queues, keys, loss, slope).run();
}

template void contrast(const Contrast&, const Queues&, const float*, float*, float*);
template void contrast(const Contrast&, const Queues&, const double*, double*, double*);

}  // namespace ctt
