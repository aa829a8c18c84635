// The k most confident pixels of every class, without a host round trip.
//
// A pixel becomes one unsigned key: its confidence as ordered bits, and below them its index
// counted down, so that a larger key means "chosen earlier" and ties fall to the lower index. Keys
// are unique, hence the result does not depend on the order in which threads run.
//
// One block per class and part of the pixels streams over its labels and pools the keys of its
// class in shared memory; when the pool is full, a radix select keeps the k largest and raises the
// threshold for what may follow. Up to kSplitPixels pixels one launch does everything; beyond, each
// part leaves its k best keys in the workspace and a second launch merges them.

#include <algorithm>

#include "common.cuh"

namespace ctt {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRadixBits = 11;
constexpr int kBins = 1 << kRadixBits;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kPoolBytes = 32768;  // with the bins below the 48 KiB that need no opt-in
constexpr int64_t kSplitPixels = 12288;
constexpr int64_t kMaxSplits = 32;
constexpr int64_t kMaxPixels = int64_t{1} << 31;  // an index takes at most 31 bits of a key

using Key64 = uint64_t;
using Key128 = unsigned __int128;

template <typename T>
struct KeyOf {
  using type = Key64;
  static constexpr int kConfidenceBits = 32;
};
template <>
struct KeyOf<double> {
  using type = Key128;
  static constexpr int kConfidenceBits = 64;
};

template <typename Key>
constexpr int kCapacity = kPoolBytes / static_cast<int>(sizeof(Key));
// A round adds at most this many keys; half the pool, so that the k kept and one round always fit.
template <typename Key>
constexpr int kRound = kCapacity<Key> / 2;
template <typename Key>
constexpr int kMaxChosen = kCapacity<Key> - kRound<Key>;

// Bits that order as the values do; -0.0 and 0.0 are equal.
__device__ uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(x == 0 ? 0.0f : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ uint64_t ordered_bits(double x) {
  const auto bits = static_cast<uint64_t>(__double_as_longlong(x == 0 ? 0.0 : x));
  return bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
}

// Never 0, which stands for "no pixel": ordered bits are 0 for a NaN alone.
template <typename Key, typename Bits>
__device__ Key make_key(Bits ordered, int index, int index_bits) {
  const Key mask = (Key{1} << index_bits) - 1;
  return (static_cast<Key>(ordered) << index_bits) | (mask - static_cast<Key>(index));
}

template <typename Key>
__device__ int64_t index_of(Key key, int index_bits) {
  const Key mask = (Key{1} << index_bits) - 1;
  return static_cast<int64_t>(mask - (key & mask));
}

template <typename T>
struct Pixels {
  const T* confidence;
  int64_t confidence_stride;
  const int64_t* label;
  int64_t label_stride;
  const bool* valid;  // null: all
  int64_t valid_stride;
  int64_t count;
  int index_bits;
};

template <typename T>
struct PixelSource {
  using Key = typename KeyOf<T>::type;
  Pixels<T> pixels;
  int64_t own_class;

  __device__ Key operator()(int64_t i) const {
    if (pixels.label[i * pixels.label_stride] != own_class) return 0;
    if (pixels.valid != nullptr && !pixels.valid[i * pixels.valid_stride]) return 0;
    const auto confidence = widen(pixels.confidence[i * pixels.confidence_stride]);
    if (confidence != confidence) return 0;
    return make_key<Key>(ordered_bits(confidence), static_cast<int>(i), pixels.index_bits);
  }
};

template <typename Key>
struct KeySource {
  const Key* keys;
  __device__ Key operator()(int64_t i) const { return keys[i]; }
};

template <typename Key>
struct Pool {
  Key key[kCapacity<Key>];
  unsigned bin[kBins];
  int warp_total[kWarps];
  int count;
  Key threshold;  // smaller keys cannot be among the k largest any more
  int digit, above, inside;
};

// Called by whole warps.
template <typename Key>
__device__ void append(Pool<Key>& pool, Key key, bool keep) {
  const unsigned kept = __ballot_sync(kFullWarp, keep);
  if (kept == 0) return;
  const int leader = __ffs(kept) - 1;
  int base = 0;
  if (lane() == leader) base = atomicAdd(&pool.count, __popc(kept));
  base = __shfl_sync(kFullWarp, base, leader);
  if (keep) pool.key[base + __popc(kept & lower_lanes())] = key;
}

// Called by whole warps. Saturated confidences put nearly all keys into one bin, where one atomic
// per lane would queue up; one per warp does not.
template <typename Key>
__device__ void count_digit(Pool<Key>& pool, int digit, bool counts) {
  const unsigned counting = __ballot_sync(kFullWarp, counts);
  if (counting == 0) return;
  const int leader = __ffs(counting) - 1;
  const int common = __shfl_sync(kFullWarp, digit, leader);
  const unsigned same = __ballot_sync(kFullWarp, counts && digit == common);
  if (lane() == leader) {
    atomicAdd(&pool.bin[common], static_cast<unsigned>(__popc(same)));
  } else if (counts && digit != common) {
    atomicAdd(&pool.bin[digit], 1u);
  }
}

// Sets pool.digit to the bin that holds the needed-th largest key, pool.inside to the keys in that
// bin and pool.above to those in higher bins. Ends with a barrier.
template <typename Key>
__device__ void find_digit(Pool<Key>& pool, int needed) {
  // thread 0 owns the highest bins, so that a running sum counts from the top
  const int highest = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsPerThread;
  int own = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) own += static_cast<int>(pool.bin[highest - i]);
  int through = own;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int lower = __shfl_up_sync(kFullWarp, through, offset);
    if (lane() >= offset) through += lower;
  }
  if (lane() == kWarp - 1) pool.warp_total[warp()] = through;
  __syncthreads();
  for (int i = 0; i < warp(); ++i) through += pool.warp_total[i];

  int above = through - own;
  if (above < needed && needed <= through) {
    int i = 0;
    while (above + static_cast<int>(pool.bin[highest - i]) < needed) {
      above += static_cast<int>(pool.bin[highest - i]);
      ++i;
    }
    pool.digit = highest - i;
    pool.above = above;
    pool.inside = static_cast<int>(pool.bin[highest - i]);
  }
  __syncthreads();
}

// A value that exactly k of the pooled keys reach. pool.count must be above k.
template <typename Key>
__device__ Key find_threshold(Pool<Key>& pool, int k, int key_bits) {
  const int count = pool.count;
  Key prefix = 0;  // the digits found so far
  int needed = k;
  int shift = key_bits;
  while (shift > 0) {
    const int bits = min(kRadixBits, shift);
    shift -= bits;
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) pool.bin[i] = 0;
    __syncthreads();
    for (int base = 0; base < count; base += kThreads) {
      const int i = base + static_cast<int>(threadIdx.x);
      const Key key = i < count ? pool.key[i] >> shift : Key{0};
      const int digit = static_cast<int>(key) & ((1 << bits) - 1);
      count_digit(pool, digit, i < count && key >> bits == prefix);
    }
    __syncthreads();
    find_digit(pool, needed);
    prefix = (prefix << bits) | static_cast<Key>(pool.digit);
    needed -= pool.above;
    if (pool.inside == needed) break;
  }
  return prefix << shift;
}

// Reduces the pool to its k largest keys. Begins and ends with the pool at rest.
template <typename Key>
__device__ void keep_largest(Pool<Key>& pool, int k, int key_bits) {
  const int count = pool.count;
  const Key threshold = find_threshold(pool, k, key_bits);  // its barriers: all have read the count
  if (threadIdx.x == 0) {
    pool.count = 0;
    pool.threshold = threshold;
  }
  for (int base = 0; base < count; base += kThreads) {
    const int i = base + static_cast<int>(threadIdx.x);
    const Key key = i < count ? pool.key[i] : Key{0};
    __syncthreads();  // what this tile overwrites has been read: at most as many keys as so far
    append(pool, key, key >= threshold);
  }
  __syncthreads();
}

// Pools the k largest keys that source gives for begin..end-1, fewer if there are fewer.
template <typename Key, typename Source>
__device__ void gather_largest(Pool<Key>& pool, const Source& source, int64_t begin, int64_t end,
                               int k, int key_bits) {
  constexpr int kItems = kRound<Key> / kThreads;
  if (threadIdx.x == 0) {
    pool.count = 0;
    pool.threshold = 1;
  }
  __syncthreads();
  while (begin < end) {
    const int rounds = (kCapacity<Key> - pool.count) / kRound<Key>;
    const Key threshold = pool.threshold;
    __syncthreads();  // all have read the count before the first adds to it
    for (int round = 0; round < rounds && begin < end; ++round, begin += kRound<Key>) {
      Key key[kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int64_t position = begin + i * kThreads + static_cast<int>(threadIdx.x);
        key[i] = position < end ? source(position) : Key{0};
      }
#pragma unroll
      for (int i = 0; i < kItems; ++i) append(pool, key[i], key[i] >= threshold);
    }
    __syncthreads();
    if (pool.count > kCapacity<Key> - kRound<Key>) keep_largest(pool, k, key_bits);
  }
  if (pool.count > k) keep_largest(pool, k, key_bits);
}

// Bitonic sort, largest first; the places up to the next power of two are filled with 0.
template <typename Key>
__device__ void sort_pool(Pool<Key>& pool) {
  const int count = pool.count, thread = static_cast<int>(threadIdx.x);
  int size = 1;
  while (size < count) size *= 2;
  for (int i = count + thread; i < size; i += kThreads) pool.key[i] = 0;
  __syncthreads();
  for (int width = 2; width <= size; width *= 2) {
    for (int stride = width / 2; stride > 0; stride /= 2) {
      for (int pair = thread; pair < size / 2; pair += kThreads) {
        const int i = 2 * pair - (pair & (stride - 1));
        const Key a = pool.key[i], b = pool.key[i + stride];
        if ((a < b) == ((i & width) == 0)) {
          pool.key[i] = b;
          pool.key[i + stride] = a;
        }
      }
      __syncthreads();
    }
  }
}

template <typename Key>
__device__ void write_result(Pool<Key>& pool, int64_t own_class, int64_t k, int index_bits,
                             int64_t* index, int64_t* count) {
  sort_pool(pool);
  for (int64_t i = threadIdx.x; i < k; i += kThreads) {
    index[own_class * k + i] = i < pool.count ? index_of(pool.key[i], index_bits) : -1;
  }
  if (threadIdx.x == 0) count[own_class] = pool.count;
}

// `kept` of the `k` places asked for can be filled at all: min(k, pixels).
template <typename T, typename Key = typename KeyOf<T>::type>
__global__ void __launch_bounds__(kThreads)
    select_kernel(Pixels<T> pixels, int kept, int64_t k, int splits, Key* workspace, int64_t* index,
                  int64_t* count) {
  __shared__ Pool<Key> pool;
  const int own_class = static_cast<int>(blockIdx.x) / splits;
  const int split = static_cast<int>(blockIdx.x) % splits;
  const int64_t share = (pixels.count + splits - 1) / splits;
  const int64_t begin = split * share;
  const int64_t end = begin + share < pixels.count ? begin + share : pixels.count;
  const int key_bits = KeyOf<T>::kConfidenceBits + pixels.index_bits;
  gather_largest(pool, PixelSource<T>{pixels, own_class}, begin, end, kept, key_bits);
  if (splits == 1) {
    write_result(pool, own_class, k, pixels.index_bits, index, count);
    return;
  }
  for (int i = static_cast<int>(threadIdx.x); i < kept; i += kThreads) {
    workspace[blockIdx.x * static_cast<int64_t>(kept) + i] = i < pool.count ? pool.key[i] : Key{0};
  }
}

template <typename Key>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const Key* workspace, int splits, int kept, int64_t k, int index_bits, int key_bits,
                 int64_t* index, int64_t* count) {
  __shared__ Pool<Key> pool;
  const int64_t candidates = static_cast<int64_t>(splits) * kept;
  const KeySource<Key> source = {workspace + blockIdx.x * candidates};
  gather_largest(pool, source, 0, candidates, kept, key_bits);
  write_result(pool, blockIdx.x, k, index_bits, index, count);
}

int splits_of(int64_t pixels) {
  const int64_t splits = (pixels + kSplitPixels - 1) / kSplitPixels;
  return static_cast<int>(std::min(std::max<int64_t>(splits, 1), kMaxSplits));
}

// The bits that the largest index takes, at least 1.
int index_bits_of(int64_t pixels) {
  int bits = 1;
  while ((int64_t{1} << bits) < pixels) ++bits;
  return bits;
}

template <typename T>
int64_t workspace_bytes(int64_t pixels, int64_t num_classes, int64_t k) {
  using Key = typename KeyOf<T>::type;
  const int64_t kept = std::min(k, pixels);
  const int splits = splits_of(pixels);
  const bool fits_grid = num_classes * splits < kMaxPixels;
  if (kept > kMaxChosen<Key> || pixels > kMaxPixels || !fits_grid) return -1;
  return splits == 1 ? 0 : num_classes * splits * kept * static_cast<int64_t>(sizeof(Key));
}

template <typename T>
int select(Pixels<T> pixels, int64_t num_classes, int64_t k, void* workspace, int64_t* index,
           int64_t* count, int device, void* stream) {
  using Key = typename KeyOf<T>::type;
  pixels.index_bits = index_bits_of(pixels.count);
  const int splits = splits_of(pixels.count);
  const int kept = static_cast<int>(std::min(k, pixels.count));
  auto* keys = static_cast<Key*>(workspace);
  const int status =
      launch(select_kernel<T>, static_cast<unsigned>(num_classes * splits), kThreads, device, stream,
             pixels, kept, k, splits, keys, index, count);
  if (status != cudaSuccess || splits == 1) return status;
  const int key_bits = KeyOf<T>::kConfidenceBits + pixels.index_bits;
  return launch(merge_kernel<Key>, static_cast<unsigned>(num_classes), kThreads, device, stream, keys,
                splits, kept, k, pixels.index_bits, key_bits, index, count);
}

}  // namespace
}  // namespace ctt

// Bytes of scratch memory (16-byte aligned) that ctt_cuda_class_topk needs, which may be 0; -1 where
// the selection does not fit shared memory and another backend has to serve.
CTT_EXPORT int64_t ctt_cuda_class_topk_workspace(int64_t pixels, int64_t num_classes, int64_t k,
                                                 int confidence_dtype) {
  using namespace ctt;
  return confidence_dtype == kFloat64 ? workspace_bytes<double>(pixels, num_classes, k)
                                      : workspace_bytes<float>(pixels, num_classes, k);
}

// Strides count elements; `valid` may be null; index (num_classes, k) and count are contiguous.
CTT_EXPORT int ctt_cuda_class_topk(const void* confidence, int confidence_dtype,
                                   int64_t confidence_stride, const int64_t* label,
                                   int64_t label_stride, const bool* valid, int64_t valid_stride,
                                   int64_t pixels, int64_t num_classes, int64_t k, void* workspace,
                                   int64_t* index, int64_t* count, int device, void* stream) {
  using namespace ctt;
  const auto run = [&](auto* data) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    const Pixels<T> source = {data,  confidence_stride, label,  label_stride,
                              valid, valid_stride,      pixels, 0};
    return select(source, num_classes, k, workspace, index, count, device, stream);
  };
  switch (confidence_dtype) {
    case kFloat32: return run(static_cast<const float*>(confidence));
    case kFloat64: return run(static_cast<const double*>(confidence));
    case kFloat16: return run(static_cast<const __half*>(confidence));
    default: return run(static_cast<const __nv_bfloat16*>(confidence));
  }
}
