// What a list of tensors looks like in memory, to be compared with another list in a few tens of
// nanoseconds a tensor. Tensors are read through DLPack's exchange table, a C interface that the
// class torch.Tensor offers from PyTorch 2.10 on, so that nothing of torch is compiled in.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

namespace ctt {

// DLTensor of DLPack 1.
struct DlTensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t ndim;
  std::uint8_t type_code;
  std::uint8_t type_bits;
  std::uint16_t type_lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

using ReadTensor = int (*)(void* object, DlTensor* out);

// The function of an exchange table of DLPack 1, null where there is none. The capsule must live on.
ReadTensor tensor_reader(PyObject* capsule);

class Layout {
 public:
  // Returns false, without a Python error, where an object is no tensor with memory of its own.
  bool record(ReadTensor read, const std::vector<PyObject*>& tensors);

  // Whether these are the same objects in the same places, of the same shapes, strides and types.
  bool matches(const std::vector<PyObject*>& tensors) const;

 private:
  ReadTensor read_ = nullptr;
  std::vector<PyObject*> objects_;   // compared, never used: they may have died
  std::vector<std::int64_t> words_;  // of all tensors, one after the other
};

}  // namespace ctt
