// Exponential moving average of all tensors of all pairs in one launch.
//
//     teacher <- keep * teacher + mix * student,   mix = 1 - keep
//
// The list of tensors travels as a kernel parameter (constant memory, copied by the launch), so that
// no table on the device has to be allocated, uploaded, or kept alive for as long as a captured
// graph may be replayed.

#include <algorithm>

#include "common.cuh"

namespace ctt {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;
// Elements that one block updates: 32 KiB of float32 reads are in flight per block, and several
// blocks share a multiprocessor, which is more than the latency of device memory asks for.
constexpr int kChunk = 4096;
constexpr int kMaxUnroll = 4;

#if CUDART_VERSION >= 12010
constexpr int kParameterBytes = 32764;  // CUDA C++ Programming Guide, __global__ parameters
#else
constexpr int kParameterBytes = 4096;
#endif

struct Decay {
  double keep, mix;
  const void* pointer;  // when not null, keep is read from there as `dtype`
  int dtype;
};

struct Entry {
  void* teacher;
  const void* student;
  unsigned first_chunk;  // chunks of the entries before this one
  uint16_t last_count;   // elements in the last chunk
  uint8_t teacher_dtype, student_dtype;
};

constexpr int kHeaderBytes = sizeof(Decay) + 16;
constexpr int kMaxEntries = (kParameterBytes - kHeaderBytes) / static_cast<int>(sizeof(Entry));

struct Table {
  Decay decay;
  int entries;
  unsigned chunks;
  Entry entry[kMaxEntries];
};
static_assert(sizeof(Table) <= kParameterBytes, "the table must fit the kernel parameters");

template <int Bytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};

template <typename T, int Count>
struct alignas(sizeof(T) * Count) Vector {
  T value[Count];
};

// Nothing is read twice before far more than the L2 cache has gone by: stream.
template <typename V>
__device__ V load_streaming(const V* source) {
  using Word = typename WordOf<sizeof(V)>::type;
  const Word word = __ldcs(reinterpret_cast<const Word*>(source));
  V result;
  memcpy(&result, &word, sizeof(V));
  return result;
}

template <typename V>
__device__ void store_streaming(V* target, const V& vector) {
  using Word = typename WordOf<sizeof(V)>::type;
  Word word;
  memcpy(&word, &vector, sizeof(V));
  __stcs(reinterpret_cast<Word*>(target), word);
}

template <typename W>
struct Weights {
  W keep, mix;
};

// 1 - keep is rounded to the type of the tensor, as the expression `1 - decay` is.
template <typename W, typename T>
__device__ Weights<W> read_weights(const void* pointer) {
  const auto keep = widen(*static_cast<const T*>(pointer));
  return {static_cast<W>(keep), static_cast<W>(widen(narrow<T>(1 - keep)))};
}

template <typename W>
__device__ Weights<W> weights(const Decay& decay) {
  if (decay.pointer == nullptr) return {static_cast<W>(decay.keep), static_cast<W>(decay.mix)};
  switch (decay.dtype) {
    case kFloat32: return read_weights<W, float>(decay.pointer);
    case kFloat64: return read_weights<W, double>(decay.pointer);
    case kFloat16: return read_weights<W, __half>(decay.pointer);
    default: return read_weights<W, __nv_bfloat16>(decay.pointer);
  }
}

template <typename T, typename S>
__device__ T blend(T teacher, S student, Weights<Wide<T>> w) {
  return narrow<T>(w.keep * widen(teacher) + w.mix * static_cast<Wide<T>>(widen(student)));
}

template <typename T, typename S, int Count>
__device__ Vector<T, Count> blend(Vector<T, Count> teacher, Vector<S, Count> student,
                                  Weights<Wide<T>> w) {
#pragma unroll
  for (int i = 0; i < Count; ++i) teacher.value[i] = blend(teacher.value[i], student.value[i], w);
  return teacher;
}

template <typename T, typename S>
__device__ void update_chunk(T* teacher, const S* student, int count, const Decay& decay) {
  constexpr size_t kWidest = sizeof(T) > sizeof(S) ? sizeof(T) : sizeof(S);
  constexpr int kCount = kVectorBytes / static_cast<int>(kWidest);
  constexpr int kSteps = kChunk / (kThreads * kCount);
  constexpr int kUnroll = kSteps < kMaxUnroll ? kSteps : kMaxUnroll;
  using TeacherVector = Vector<T, kCount>;
  using StudentVector = Vector<S, kCount>;

  const int thread = static_cast<int>(threadIdx.x);
  const Weights<Wide<T>> w = weights<Wide<T>>(decay);
  auto* teachers = reinterpret_cast<TeacherVector*>(teacher);
  const auto* students = reinterpret_cast<const StudentVector*>(student);
  const bool aligned = reinterpret_cast<uintptr_t>(teacher) % sizeof(TeacherVector) == 0 &&
                       reinterpret_cast<uintptr_t>(student) % sizeof(StudentVector) == 0;

  if (aligned && count == kChunk) {
    for (int step = 0; step < kSteps; step += kUnroll) {
      TeacherVector t[kUnroll];
      StudentVector s[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        t[i] = load_streaming(teachers + (step + i) * kThreads + thread);
        s[i] = load_streaming(students + (step + i) * kThreads + thread);
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        store_streaming(teachers + (step + i) * kThreads + thread, blend(t[i], s[i], w));
      }
    }
    return;
  }

  const int vectors = aligned ? count / kCount : 0;
#pragma unroll 2
  for (int i = thread; i < vectors; i += kThreads) {
    const TeacherVector t = load_streaming(teachers + i);
    store_streaming(teachers + i, blend(t, load_streaming(students + i), w));
  }
#pragma unroll 2
  for (int i = vectors * kCount + thread; i < count; i += kThreads) {
    teacher[i] = blend(teacher[i], student[i], w);
  }
}

template <typename T>
__device__ void update_chunk_of(const Entry& entry, int64_t start, int count, const Decay& decay) {
  T* teacher = static_cast<T*>(entry.teacher) + start;
  switch (entry.student_dtype) {
    case kFloat32:
      return update_chunk(teacher, static_cast<const float*>(entry.student) + start, count, decay);
    case kFloat64:
      return update_chunk(teacher, static_cast<const double*>(entry.student) + start, count, decay);
    case kFloat16:
      return update_chunk(teacher, static_cast<const __half*>(entry.student) + start, count, decay);
    default:
      return update_chunk(teacher, static_cast<const __nv_bfloat16*>(entry.student) + start, count,
                          decay);
  }
}

// The last entry that starts at or before `chunk`; the same for the whole block, so the constant
// cache serves it.
__device__ int find_entry(const Table& table, unsigned chunk) {
  int low = 0, high = table.entries - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.entry[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

__global__ void __launch_bounds__(kThreads) ema_kernel(const __grid_constant__ Table table) {
  const unsigned chunk = blockIdx.x;
  const int found = find_entry(table, chunk);
  const Entry& entry = table.entry[found];
  const unsigned next = found + 1 < table.entries ? table.entry[found + 1].first_chunk : table.chunks;
  const int count = chunk + 1 == next ? entry.last_count : kChunk;
  const int64_t start = static_cast<int64_t>(chunk - entry.first_chunk) * kChunk;
  switch (entry.teacher_dtype) {
    case kFloat32: return update_chunk_of<float>(entry, start, count, table.decay);
    case kFloat64: return update_chunk_of<double>(entry, start, count, table.decay);
    case kFloat16: return update_chunk_of<__half>(entry, start, count, table.decay);
    default: return update_chunk_of<__nv_bfloat16>(entry, start, count, table.decay);
  }
}

}  // namespace

// As the caller lists a tensor and its counterpart; `count` elements, at least 1, in one dense block
// of memory each.
struct EmaPair {
  void* teacher;
  const void* student;
  int64_t count;
  int32_t teacher_dtype, student_dtype;
};

}  // namespace ctt

// `decay_pointer` null: the weight is `decay`; else it is read on the device when the kernel runs.
// One launch for up to kMaxEntries (more than 1,300) pairs.
CTT_EXPORT int ctt_cuda_ema_update(const ctt::EmaPair* pairs, int64_t count, double decay,
                                   const void* decay_pointer, int decay_dtype, int device,
                                   void* stream) {
  using namespace ctt;
  Table table;
  table.decay = {decay, 1.0 - decay, decay_pointer, decay_dtype};
  for (int64_t done = 0; done < count; done += table.entries) {
    table.entries = static_cast<int>(std::min<int64_t>(count - done, kMaxEntries));
    table.chunks = 0;
    for (int i = 0; i < table.entries; ++i) {
      const EmaPair& pair = pairs[done + i];
      const int64_t chunks = (pair.count + kChunk - 1) / kChunk;
      table.entry[i] = {pair.teacher,
                        pair.student,
                        table.chunks,
                        static_cast<uint16_t>(pair.count - (chunks - 1) * kChunk),
                        static_cast<uint8_t>(pair.teacher_dtype),
                        static_cast<uint8_t>(pair.student_dtype)};
      table.chunks += static_cast<unsigned>(chunks);
    }
    const int status = launch(ema_kernel, table.chunks, kThreads, device, stream, table);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}
