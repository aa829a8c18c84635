// Chosen features, L2-normalised, into the rings of the bank; places and cursors never leave the
// device.
//
// One block per class: the cursor of a class is then read and written by one block alone, which
// needs no second launch and no counter. A class of 256 features of 256 float32 values is 256 KiB,
// a few microseconds for one multiprocessor, and the classes run side by side.

#include <cmath>

#include "common.cuh"

namespace ctt {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
// Rows that a warp handles at once, so that the latencies of their scattered reads overlap.
constexpr int kRows = 4;

template <typename T>
struct Rings {
  T* keys;
  int64_t class_stride, place_stride, dim_stride;
  int64_t* count;
  int64_t count_stride;
  int64_t* cursor;
  int64_t cursor_stride;
  int64_t capacity, dim;
};

template <typename T>
struct Features {
  const T* data;
  int64_t row_stride, dim_stride, rows;
};

struct Chosen {
  const int64_t* index;
  int64_t class_stride, entry_stride, entries;
};

// What a block writes next: feature row[i] goes to place[i] of the ring.
struct Writes {
  int64_t row[kThreads];
  int64_t place[kThreads];
  int warp_total[kWarps];
};

__device__ bool is_chosen(int64_t row, int64_t rows) { return row >= 0 && row < rows; }

__device__ int64_t entry_at(const Chosen& chosen, int64_t position) {
  if (position >= chosen.entries) return -1;
  return chosen.index[blockIdx.x * chosen.class_stride + position * chosen.entry_stride];
}

template <typename W>
__device__ W warp_sum(W value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

__device__ inline float square_root(float x) { return sqrtf(x); }
__device__ inline double square_root(double x) { return sqrt(x); }

template <typename T, typename F>
__device__ void write_rows(const Rings<T>& rings, const Features<F>& features, const Writes& writes,
                           int count) {
  using W = Wide<F>;
  constexpr W kSquaredNormEps = static_cast<W>(1e-24);  // NORM_EPS**2 of ctt/ops/reference.py
  constexpr W kInfinity = INFINITY;
  for (int first = warp() * kRows; first < count; first += kWarps * kRows) {
    const F* __restrict__ row[kRows];
    T* place[kRows];
    W squared[kRows] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      // past the end the last row is read and written again: no branch parts the loads
      const int write = min(first + i, count - 1);
      row[i] = features.data + writes.row[write] * features.row_stride;
      place[i] = rings.keys + blockIdx.x * rings.class_stride +
                 writes.place[write] * rings.place_stride;
    }
#pragma unroll 8
    for (int64_t d = lane(); d < rings.dim; d += kWarp) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const W x = widen(row[i][d * features.dim_stride]);
        squared[i] += x * x;
      }
    }
    W norm[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const W sum = warp_sum(squared[i]);
      // NaN and infinity have no direction either
      norm[i] = sum > kSquaredNormEps && sum < kInfinity ? square_root(sum) : W(0);
    }
#pragma unroll 2
    for (int64_t d = lane(); d < rings.dim; d += kWarp) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const W x = widen(row[i][d * features.dim_stride]);
        place[i][d * rings.dim_stride] = narrow<T>(norm[i] > W(0) ? x / norm[i] : W(0));
      }
    }
  }
}

template <typename T, typename F>
__global__ void __launch_bounds__(kThreads, 1)
    push_kernel(Rings<T> rings, Features<F> features, Chosen chosen) {
  __shared__ Writes writes;
  int64_t* cursor = rings.cursor + blockIdx.x * rings.cursor_stride;
  int64_t* held = rings.count + blockIdx.x * rings.count_stride;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t capacity = rings.capacity;
  // a cursor outside the ring is a broken bank, but must not become a write outside memory
  const int64_t start = (*cursor % capacity + capacity) % capacity;

  int64_t total = 0;
  for (int64_t base = 0; base < chosen.entries; base += kThreads) {
    total += __syncthreads_count(is_chosen(entry_at(chosen, base + thread), features.rows));
  }
  const int64_t oldest = total > capacity ? total - capacity : 0;  // ranks below are overwritten

  int64_t before = 0;
  for (int64_t base = 0; base < chosen.entries; base += kThreads) {
    const int64_t row = entry_at(chosen, base + thread);
    const bool take = is_chosen(row, features.rows);
    const unsigned taken = __ballot_sync(kFullWarp, take);
    if (lane() == 0) writes.warp_total[warp()] = __popc(taken);
    __syncthreads();
    int64_t rank = before + __popc(taken & lower_lanes());
    int64_t after = before;
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp()) rank += writes.warp_total[i];
      after += writes.warp_total[i];
    }
    const int64_t first = before > oldest ? before : oldest;
    if (take && rank >= oldest) {
      writes.row[rank - first] = row;
      writes.place[rank - first] = (start + rank) % capacity;
    }
    __syncthreads();
    if (after > first) write_rows(rings, features, writes, static_cast<int>(after - first));
    before = after;
  }

  if (thread == 0) {
    *cursor = (start + total) % capacity;
    *held = *held + total < capacity ? *held + total : capacity;
  }
}

template <typename T, typename F>
int push(const Rings<T>& rings, const Features<F>& features, const Chosen& chosen,
         int64_t num_classes, int device, void* stream) {
  return launch(push_kernel<T, F>, static_cast<unsigned>(num_classes), kThreads, device, stream,
                rings, features, chosen);
}

template <typename T>
int push_into(const Rings<T>& rings, const Features<void>& features, int feature_dtype,
              const Chosen& chosen, int64_t num_classes, int device, void* stream) {
  const auto as = [&](auto* data) {
    using F = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    const Features<F> typed = {data, features.row_stride, features.dim_stride, features.rows};
    return push(rings, typed, chosen, num_classes, device, stream);
  };
  switch (feature_dtype) {
    case kFloat32: return as(static_cast<const float*>(features.data));
    case kFloat64: return as(static_cast<const double*>(features.data));
    case kFloat16: return as(static_cast<const __half*>(features.data));
    default: return as(static_cast<const __nv_bfloat16*>(features.data));
  }
}

}  // namespace
}  // namespace ctt

// Strides count elements. num_classes, capacity and entries are at least 1.
CTT_EXPORT int ctt_cuda_queue_push(
    void* keys, int key_dtype, int64_t key_class_stride, int64_t key_place_stride,
    int64_t key_dim_stride, int64_t* count, int64_t count_stride, int64_t* cursor,
    int64_t cursor_stride, const void* features, int feature_dtype, int64_t feature_row_stride,
    int64_t feature_dim_stride, const int64_t* index, int64_t index_class_stride,
    int64_t index_entry_stride, int64_t num_classes, int64_t capacity, int64_t dim, int64_t rows,
    int64_t entries, int device, void* stream) {
  using namespace ctt;
  const Features<void> source = {features, feature_row_stride, feature_dim_stride, rows};
  const Chosen chosen = {index, index_class_stride, index_entry_stride, entries};
  const auto into = [&](auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
    const Rings<T> rings = {data,         key_class_stride, key_place_stride, key_dim_stride,
                            count,        count_stride,     cursor,           cursor_stride,
                            capacity,     dim};
    return push_into(rings, source, feature_dtype, chosen, num_classes, device, stream);
  };
  switch (key_dtype) {
    case kFloat32: return into(static_cast<float*>(keys));
    case kFloat64: return into(static_cast<double*>(keys));
    case kFloat16: return into(static_cast<__half*>(keys));
    default: return into(static_cast<__nv_bfloat16*>(keys));
  }
}
