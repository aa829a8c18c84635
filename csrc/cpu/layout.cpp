#include "layout.h"

namespace ctt {
namespace {

// DLPackExchangeAPI of DLPack 1; functions that are not called have no type here.
struct ExchangeTable {
  std::uint32_t major;
  std::uint32_t minor;
  void* older;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  ReadTensor read;
  void* current_stream;
};

std::int64_t address(const void* p) {
  return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(p));
}

bool read_tensor(ReadTensor read, PyObject* object, DlTensor* out) {
  if (read(object, out) != 0) {
    PyErr_Clear();
    return false;
  }
  return true;
}

// The words of one tensor, passed one after the other to `take`; false where one is refused.
template <class Take>
bool describe(const DlTensor& t, Take&& take) {
  const std::int64_t type = (std::int64_t{t.type_code} << 32) | (std::int64_t{t.type_bits} << 16) |
                            std::int64_t{t.type_lanes};
  const std::int64_t device = (std::int64_t{t.device_type} << 32) | std::int64_t{t.device_id};
  if (!take(address(t.data) + static_cast<std::int64_t>(t.byte_offset)) || !take(type) ||
      !take(device) || !take(t.ndim)) {
    return false;
  }
  for (std::int32_t i = 0; i < t.ndim; ++i) {
    if (!take(t.shape[i]) || !take(t.strides == nullptr ? -1 : t.strides[i])) return false;
  }
  return true;
}

}  // namespace

ReadTensor tensor_reader(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dlpack_exchange_api")) return nullptr;
  const auto* table =
      static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  return table->major == 1 ? table->read : nullptr;
}

bool Layout::record(ReadTensor read, const std::vector<PyObject*>& tensors) {
  read_ = read;
  objects_ = tensors;
  words_.clear();
  for (PyObject* object : tensors) {
    DlTensor t;
    if (!read_tensor(read, object, &t)) return false;
    describe(t, [&](std::int64_t word) {
      words_.push_back(word);
      return true;
    });
  }
  return true;
}

bool Layout::matches(const std::vector<PyObject*>& tensors) const {
  if (tensors != objects_) return false;
  auto word = words_.begin();
  for (PyObject* object : tensors) {
    DlTensor t;
    if (!read_tensor(read_, object, &t)) return false;
    const bool same = describe(
        t, [&](std::int64_t now) { return word != words_.end() && *word++ == now; });
    if (!same) return false;
  }
  return word == words_.end();
}

}  // namespace ctt
