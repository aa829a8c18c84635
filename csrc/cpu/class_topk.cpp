// The k most confident pixels of each class: one pass over the pixels with a bounded buffer and a
// rising threshold for each class.

#include <algorithm>
#include <functional>
#include <limits>
#include <utility>

#include "ops.h"

namespace ctt {
namespace {

// A candidate as one number: the greater is the better, and equal confidences fall to the lower
// index. Zero is below every candidate.
using Narrow = std::uint64_t;                            // float bits, then index
using Broad = std::pair<std::uint64_t, std::uint64_t>;  // float64, or more than 2^32 pixels

// Bits of a float such that unsigned order is numeric order; adding 0 turns -0 into +0.
inline std::uint32_t ordered(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline std::uint64_t ordered(double x) {
  const std::uint64_t bits = bit_cast<std::uint64_t>(x + 0.0);
  return bits >> 63 ? ~bits : bits | (std::uint64_t{1} << 63);
}

template <class Key>
struct Coding;

template <>
struct Coding<Narrow> {
  static Narrow encode(float x, std::int64_t i) {
    return static_cast<Narrow>(ordered(x)) << 32 | (~static_cast<Narrow>(i) & 0xFFFFFFFFu);
  }
  static std::int64_t index(Narrow key) {
    return static_cast<std::int64_t>(~key & 0xFFFFFFFFu);
  }
};

template <>
struct Coding<Broad> {
  template <class A>
  static Broad encode(A x, std::int64_t i) {
    return {ordered(x), ~static_cast<std::uint64_t>(i)};
  }
  static std::int64_t index(const Broad& key) { return static_cast<std::int64_t>(~key.second); }
};

// Sorts falling. Stable radix sort by the bits of the confidence alone: candidates arrive by rising
// index, so that stability puts equal confidences in the order of their keys.
inline void sort_falling(Narrow* begin, Narrow* end, Narrow* scratch) {
  constexpr int digits = 4;
  std::uint32_t place[digits][256] = {};
  for (const Narrow* key = begin; key != end; ++key) {
    for (int d = 0; d < digits; ++d) ++place[d][~(*key >> (32 + 8 * d)) & 0xFF];
  }
  const std::ptrdiff_t size = end - begin;
  Narrow* from = begin;
  Narrow* to = scratch;
  for (int d = 0; d < digits; ++d) {
    const int shift = 32 + 8 * d;
    if (place[d][~(*from >> shift) & 0xFF] == size) continue;  // one digit for all
    std::uint32_t before = 0;
    for (std::uint32_t& p : place[d]) before += std::exchange(p, before);
    for (const Narrow* key = from; key != from + size; ++key) {
      to[place[d][~(*key >> shift) & 0xFF]++] = *key;
    }
    std::swap(from, to);
  }
  if (from != begin) std::copy(from, from + size, begin);
}

inline void sort_falling(Broad* begin, Broad* end, Broad*) {
  std::sort(begin, end, std::greater<Broad>());
}

// Holds the best k of what was added, and at most three times as many besides.
template <class Key>
struct Selection {
  Key* begin;
  Key* end;
  Key* limit;
  Key threshold;

  void add(const Key& key, std::int64_t k, Key* scratch) {
    if (!(key > threshold)) return;
    *end++ = key;
    if (end == limit) keep_best(k, scratch);
  }

  void keep_best(std::int64_t k, Key* scratch) {
    if (begin == end) return;
    sort_falling(begin, end, scratch);
    if (end - begin < k) return;
    end = begin + k;
    threshold = begin[k - 1];
  }
};

inline bool candidate(const TopkInput& in, std::int64_t i, std::int64_t c) {
  return c >= 0 && c < in.num_classes && (in.valid == nullptr || in.valid[i]);
}

std::vector<std::int64_t> members_of_classes(const TopkInput& in) {
  std::vector<std::int64_t> members(static_cast<std::size_t>(in.num_classes), 0);
  for (std::int64_t i = 0; i < in.n; ++i) {
    const std::int64_t c = in.label[i];
    if (candidate(in, i, c)) ++members[static_cast<std::size_t>(c)];
  }
  return members;
}

// Each thread goes through all labels and serves its own classes: no merge, and the labels are
// few bytes beside everything else.
template <class T, class Key>
void fill(const TopkInput& in, std::vector<Selection<Key>>& selections, int thread, int threads,
          Key* scratch) {
  const T* confidence = pointer<const T>(in.confidence);
  std::vector<char> mine;  // by class; a division for each pixel would cost as much as the rest
  for (std::int64_t c = 0; c < in.num_classes; ++c) mine.push_back(c % threads == thread);
  for (std::int64_t i = 0; i < in.n; ++i) {
    const std::int64_t c = in.label[i];
    if (!candidate(in, i, c) || !mine[static_cast<std::size_t>(c)]) continue;
    const auto x = widen(confidence[i]);
    if (x != x) continue;
    selections[static_cast<std::size_t>(c)].add(Coding<Key>::encode(x, i), in.k, scratch);
  }
}

template <class Key>
void write(Selection<Key>& selection, std::int64_t k, Key* scratch, std::int64_t* index,
           std::int64_t* count) {
  selection.keep_best(k, scratch);
  *count = selection.end - selection.begin;
  std::int64_t* out = index;
  for (const Key* key = selection.begin; key != selection.end; ++key) {
    *out++ = Coding<Key>::index(*key);
  }
  std::fill(out, index + k, std::int64_t{-1});
}

template <class T, class Key>
void run(const TopkInput& in, std::int64_t* index, std::int64_t* count, int threads) {
  const std::vector<std::int64_t> members = members_of_classes(in);
  const std::int64_t bound =
      in.k > std::numeric_limits<std::int64_t>::max() / 8 ? in.k : 4 * in.k;
  std::vector<std::int64_t> capacity;
  std::int64_t total = 0;
  std::int64_t largest = 0;
  for (const std::int64_t m : members) {
    // one place more than the members, so that a buffer fills up only when there are more than 4k
    capacity.push_back(std::min(m + 1, bound));
    total += capacity.back();
    largest = std::max(largest, capacity.back());
  }
  std::vector<Key> storage(static_cast<std::size_t>(total));
  std::vector<Key> scratch(static_cast<std::size_t>(largest * threads));
  std::vector<Selection<Key>> selections;
  Key* place = storage.data();
  for (const std::int64_t size : capacity) {
    selections.push_back({place, place, place + size, Key{}});
    place += size;
  }
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int thread = 0; thread < threads; ++thread) {
    Key* mine = scratch.data() + largest * thread;
    fill<T>(in, selections, thread, threads, mine);
    for (std::int64_t c = thread; c < in.num_classes; c += threads) {
      write(selections[static_cast<std::size_t>(c)], in.k, mine, index + c * in.k, count + c);
    }
  }
}

}  // namespace

void class_topk(const TopkInput& in, DType dtype, std::int64_t* index, std::int64_t* count,
                int threads) {
  const bool broad = in.n > static_cast<std::int64_t>(std::numeric_limits<std::uint32_t>::max());
  visit(dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, double>) {
      run<T, Broad>(in, index, count, threads);
    } else if (broad) {
      run<T, Broad>(in, index, count, threads);
    } else {
      run<T, Narrow>(in, index, count, threads);
    }
  });
}

}  // namespace ctt
