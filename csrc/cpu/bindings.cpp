// ctt._cpu: addresses, sizes and strides in, nothing of torch, so that one binary fits every torch
// version. ctt/ops/backends/cpu.py is the only caller and has checked the arguments. The GIL is
// released around every kernel.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;
// (address, dtype code, row stride, column stride)
using MatrixArgs = std::tuple<Address, int, Size, Size>;
// (rows' address, labels' address, b, D, threads)
using BlockArgs = std::tuple<Address, Address, Size, Size, int>;
// (begins' address, sizes' address, banks, C, m)
using QueuesArgs = std::tuple<Address, Address, Size, Size, Size>;

ctt::DType dtype_of(int code) {
  if (code < 0 || code > 3) throw std::invalid_argument("ctt._cpu: unknown dtype code");
  return static_cast<ctt::DType>(code);
}

template <class T>
T* at(Address address) {
  return ctt::pointer<T>(address);
}

ctt::Matrix matrix(const MatrixArgs& m) {
  return {std::get<0>(m), dtype_of(std::get<1>(m)), std::get<2>(m), std::get<3>(m)};
}

ctt::Block block(const BlockArgs& b) {
  return {at<const Size>(std::get<0>(b)), at<const Size>(std::get<1>(b)), std::get<2>(b),
          std::get<3>(b), std::get<4>(b)};
}

ctt::Queues queues(const QueuesArgs& q) {
  return {at<const Size>(std::get<0>(q)), at<const Size>(std::get<1>(q)), std::get<2>(q),
          std::get<3>(q), std::get<4>(q)};
}

void ema_update(const std::vector<Address>& teacher, const std::vector<Address>& student,
                const std::vector<Size>& size, const std::vector<int>& teacher_dtype,
                const std::vector<int>& student_dtype, double decay, int threads) {
  std::vector<ctt::EmaPair> pairs;
  for (std::size_t i = 0; i < size.size(); ++i) {
    pairs.push_back({teacher.at(i), student.at(i), size[i], dtype_of(teacher_dtype.at(i)),
                     dtype_of(student_dtype.at(i))});
  }
  ctt::ema_update(pairs, decay, threads);
}

void class_topk(Address confidence, int dtype, Address label, Address valid, Size n, Size k,
                Size num_classes, Address index, Address count, int threads) {
  const ctt::TopkInput in{confidence, at<const Size>(label), at<const bool>(valid),
                          n,          k,                     num_classes};
  ctt::class_topk(in, dtype_of(dtype), at<Size>(index), at<Size>(count), threads);
}

void queue_push(const MatrixArgs& features, Size n, Address index, Size k, Address keys, int dtype,
                Size num_classes, Size capacity, Size dim, Address count, Address cursor,
                int threads) {
  const ctt::PushInput in{at<const Size>(index), at<Size>(count), at<Size>(cursor), n, k,
                          num_classes,           capacity,        dim};
  ctt::queue_push(in, matrix(features), keys, dtype_of(dtype), threads);
}

Size select_pixels(Address label, Address mask, Size n, Address held, Size banks,
                   Size num_classes, bool need_own, Address index, Address pixels) {
  return ctt::select_pixels(at<const Size>(label), at<const bool>(mask), n, at<const Size>(held),
                            banks, num_classes, need_own, at<Size>(index), at<Size>(pixels));
}

template <class A>
void gather_unit(const BlockArgs& b, const MatrixArgs& source, Address unit,
                 Address inverse_norm) {
  ctt::gather_unit(block(b), matrix(source), at<A>(unit), at<A>(inverse_norm));
}

template <class A>
void info_nce_rows(const BlockArgs& b, const QueuesArgs& q, double temperature, Address score,
                   Address loss, Address factor) {
  ctt::info_nce_rows(block(b), queues(q), temperature, at<A>(score), at<A>(loss), at<A>(factor));
}

template <class A>
void pair_info_nce_rows(const BlockArgs& b, const QueuesArgs& q, double temperature, Address unit,
                        Address score, Address positive, Address loss, Address factor) {
  ctt::pair_info_nce_rows(block(b), queues(q), temperature, at<const A>(unit), at<A>(score),
                          at<A>(positive), at<A>(loss), at<A>(factor));
}

template <class A>
void scatter_gradient(const BlockArgs& b, Address unit, Address inverse_norm, Address factor,
                      Address class_weight, Address slope, const MatrixArgs& grad) {
  ctt::scatter_gradient(block(b), at<const A>(unit), at<const A>(inverse_norm),
                        at<const A>(factor), at<const double>(class_weight), at<A>(slope),
                        matrix(grad));
}

template <class A>
void define_contrast(py::module_& m, const std::string& suffix) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def(("gather_unit_" + suffix).c_str(), &gather_unit<A>, release);
  m.def(("info_nce_rows_" + suffix).c_str(), &info_nce_rows<A>, release);
  m.def(("pair_info_nce_rows_" + suffix).c_str(), &pair_info_nce_rows<A>, release);
  m.def(("scatter_gradient_" + suffix).c_str(), &scatter_gradient<A>, release);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("ema_update", &ema_update, release);
  m.def("class_topk", &class_topk, release);
  m.def("queue_push", &queue_push, release);
  m.def("select_pixels", &select_pixels, release);
  define_contrast<float>(m, "f32");
  define_contrast<double>(m, "f64");
}
