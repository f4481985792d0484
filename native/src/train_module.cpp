// Python's view of training: a route, forward and backward over addresses. Callers check dtypes and shapes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include "train.h"

namespace nb = nanobind;
using namespace moestro;
using Address = uintptr_t;
using Strided = std::tuple<Address, int64_t, int64_t, int64_t>;  // where, and the strides in elements

template <class T> static T* at(Address a) { return reinterpret_cast<T*>(a); }
static Stack stack(const Strided& s) { return {at<float>(std::get<0>(s)), std::get<1>(s), std::get<2>(s), std::get<3>(s)}; }

static nb::dict train_features() {
  nb::dict d;
  d["isa"] = train_kernels()->name;
  d["threads"] = team_name();
  return d;
}

void bind_train(nb::module_& m) {
  m.def("train_features", &train_features,
        "{'isa': what training runs on, 'threads': 'openmp' for the loaded runtime's team or 'own'}");

  nb::class_<Route>(m, "Route", "Assignments sorted by expert, stably; ids past the last expert are left out.")
      .def("__init__",
           [](Route* self, Address token, Address expert, size_t count, int experts, int tokens) {
             new (self) Route(train_route(at<int64_t>(token), at<int64_t>(expert), count, experts, tokens));
           },
           nb::arg("token"), nb::arg("expert"), nb::arg("count"), nb::arg("experts"), nb::arg("tokens"),
           "token, expert: addresses of int64 [count]. ValueError for a negative id.")
      .def_prop_ro("rows", &Route::rows);

  nb::class_<Bank>(m, "Bank", "The stacked weights of a layer's experts, by address and strides.")
      .def("__init__",
           [](Bank* self, int experts, int dim, int inner, int out, int act, bool gated, bool interleaved, Strided up,
              Strided down, Address up_bias, Address down_bias) {
             new (self) Bank{experts, dim, inner, out, act, gated, interleaved, stack(up), stack(down),
                             at<float>(up_bias), at<float>(down_bias)};
           },
           nb::arg("experts"), nb::arg("dim"), nb::arg("inner"), nb::arg("out"), nb::arg("act"), nb::arg("gated"),
           nb::arg("interleaved"), nb::arg("up"), nb::arg("down"), nb::arg("up_bias"), nb::arg("down_bias"))
      .def("scratch", &train_scratch, nb::arg("threads"), nb::arg("backward"), "Floats a pass needs.")
      .def("forward",
           [](const Bank& bank, const Route& route, Address x, Address weight, Address pre, Address rows, Address y,
              Address scratch, int threads) {
             nb::gil_scoped_release release;
             train_forward(bank, route, at<float>(x), at<float>(weight), at<float>(pre), at<float>(rows), at<float>(y),
                           at<float>(scratch), threads);
           },
           nb::arg("route"), nb::arg("x"), nb::arg("weight"), nb::arg("pre"), nb::arg("rows"), nb::arg("y"),
           nb::arg("scratch"), nb::arg("threads"))
      .def("backward",
           [](const Bank& bank, const Route& route, Address x, Address weight, size_t assignments, Address grad, Address pre,
              Address rows, Address grad_x, Address grad_weight, Strided up, Strided down, Address up_bias,
              Address down_bias, Address scratch, int threads) {
             const Gradients grads{at<float>(grad), at<float>(pre), at<float>(rows), at<float>(grad_x),
                                   at<float>(grad_weight), stack(up), stack(down), at<float>(up_bias), at<float>(down_bias)};
             nb::gil_scoped_release release;
             train_backward(bank, grads, route, at<float>(x), at<float>(weight), assignments, at<float>(scratch), threads);
           },
           nb::arg("route"), nb::arg("x"), nb::arg("weight"), nb::arg("assignments"), nb::arg("grad"), nb::arg("pre"),
           nb::arg("rows"), nb::arg("grad_x"), nb::arg("grad_weight"), nb::arg("up"), nb::arg("down"), nb::arg("up_bias"),
           nb::arg("down_bias"), nb::arg("scratch"), nb::arg("threads"));
}
