// ctt._cpu: addresses, sizes and strides in, nothing of torch, so that one binary fits every torch
// version. ctt/ops/backends/cpu.py has checked the arguments of the kernels, around which the GIL is
// released; ctt/ops/_plans.py calls Layout.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "isa.h"
#include "layout.h"
#include "ops.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;
// (address, dtype code, row stride, column stride)
using MatrixArgs = std::tuple<Address, int, Size, Size>;
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
void contrast(const MatrixArgs& query, const MatrixArgs& positive, const MatrixArgs& grad,
              Address index, Size n, Address label, Address class_weight, Size dim,
              const QueuesArgs& q, Address keys, Address loss, double temperature, int threads,
              Address slope) {
  const ctt::Contrast in{matrix(query),
                         matrix(positive),
                         matrix(grad),
                         at<const Size>(index),
                         at<const Size>(label),
                         at<const double>(class_weight),
                         n,
                         dim,
                         temperature,
                         threads};
  ctt::contrast(in, queues(q), at<const A>(keys), at<A>(loss), at<A>(slope));
}

template <class A>
void def_contrast(py::module_& m, const char* name) {
  m.def(name, &contrast<A>, py::arg("query"), py::arg("positive"), py::arg("grad"),
        py::arg("index"), py::arg("n"), py::arg("label"), py::arg("class_weight"), py::arg("dim"),
        py::arg("queues"), py::arg("keys"), py::arg("loss"), py::arg("temperature"),
        py::arg("threads"), py::arg("slope") = Address{0},
        py::call_guard<py::gil_scoped_release>());
}

// The elements of both sequences, lists or tuples.
std::vector<PyObject*> objects(const py::object& teacher, const py::object& student) {
  std::vector<PyObject*> all;
  for (const py::object& sequence : {teacher, student}) {
    const auto fast = py::reinterpret_steal<py::object>(
        PySequence_Fast(sequence.ptr(), "a list or tuple of tensors"));
    if (!fast) throw py::error_already_set();
    PyObject** first = PySequence_Fast_ITEMS(fast.ptr());
    all.insert(all.end(), first, first + PySequence_Fast_GET_SIZE(fast.ptr()));
  }
  return all;
}

ctt::Layout layout(const py::object& exchange, const py::object& teacher,
                   const py::object& student) {
  const ctt::ReadTensor read = ctt::tensor_reader(exchange.ptr());
  ctt::Layout made;
  if (read == nullptr || !made.record(read, objects(teacher, student))) {
    throw std::invalid_argument("ctt._cpu: these tensors cannot be read through DLPack");
  }
  return made;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  // of this copy of the module alone: a process may hold two, of two versions say
  py::class_<ctt::Layout>(m, "Layout", py::module_local())
      .def(py::init(&layout))
      .def("matches", [](const ctt::Layout& self, const py::object& teacher,
                         const py::object& student) {
        return self.matches(objects(teacher, student));
      });
  ctt::isa();  // says here what is wrong with CTT_CPU_ISA
  m.attr("sources") = CTT_SOURCES;  // their checksum, from setup.py
  m.def("instruction_set", &ctt::isa_name);
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("ema_update", &ema_update, release);
  m.def("class_topk", &class_topk, release);
  m.def("queue_push", &queue_push, release);
  m.def("select_pixels", &select_pixels, release);
  def_contrast<float>(m, "contrast_f32");
  def_contrast<double>(m, "contrast_f64");
}
