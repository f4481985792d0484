// Python's view: `features`, `choose`, single kernels for tests, and the token step.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <stdexcept>

#include "model.h"

namespace nb = nanobind;
using namespace moestro;

template <class T> using In1 = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T> using In2 = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T> using Out2 = nb::ndarray<nb::numpy, T, nb::ndim<2>>;
template <class T> using Out1 = nb::ndarray<nb::numpy, T, nb::ndim<1>>;

template <class T> static T* fresh(size_t n, nb::capsule& owner) {
  T* data = new T[n ? n : 1]();
  owner = nb::capsule(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return data;
}

template <class T> static Out2<T> array2(size_t rows, size_t columns, T** data) {
  nb::capsule owner;
  *data = fresh<T>(rows * columns, owner);
  return Out2<T>(*data, {rows, columns}, owner);
}

static nb::dict features() {
  nb::dict d;
  nb::list all;
  for (const Kernels* const* k = available(); *k; ++k) all.append((*k)->name);
  d["isa"] = current()->name;
  d["available"] = all;
  return d;
}

static void choose_by_name(const std::string& name) {
  if (!choose(name.c_str())) throw std::invalid_argument("instruction set '" + name + "' does not run here");
}

static nb::tuple quantise_rows(In2<float> x) {
  const int rows = (int)x.shape(0), k = (int)x.shape(1), groups = (k + kGroup - 1) / kGroup;
  int8_t* codes;
  float* scales;
  int32_t* sums;
  auto a = array2<int8_t>(rows, (size_t)groups * kGroup, &codes);
  auto b = array2<float>(rows, groups, &scales);
  auto c = array2<int32_t>(rows, groups, &sums);
  bool finite = true;
  for (int r = 0; r < rows; ++r)
    finite &= current()->quantise(x.data() + (size_t)r * k, k, codes + (size_t)r * groups * kGroup, kGroup,
                                  scales + (size_t)r * groups, 1, sums + (size_t)r * groups);
  return nb::make_tuple(a, b, c, finite);
}

// y = x W^T, one thread; tiles: force or forbid the kernel for many rows (-1: as the step would choose).
static Out2<float> linear(const Matrix& m, In2<float> x, int tiles) {
  const int rows = (int)x.shape(0);
  if ((int)x.shape(1) != m.k) throw std::invalid_argument("linear: the rows have another width than the matrix");
  const Kernels* k = current();
  const size_t ld = (size_t)m.blocks() * 16;
  std::vector<float> padded((size_t)rows * ld);
  {
    nb::gil_scoped_release release;
    if (!is_quantised(m.layout)) {
      k->block_float(m.layout, m.data(), m.k, x.data(), m.k, nullptr, rows, m.blocks(), padded.data(), ld);
    } else {
      Buffer codes, scales, sums, panel;
      const int groups = m.groups(), tall = (rows + 15) / 16 * 16;
      QRows q{codes.get<int8_t>((size_t)tall * groups * kGroup), scales.get<float>((size_t)tall * groups),
              sums.get<int32_t>((size_t)tall * groups), groups, k->tiles && (tiles < 0 ? rows > kFewRows : tiles > 0)};
      for (int r = 0; r < rows; ++r) {
        const float* v = x.data() + (size_t)r * m.k;
        if (q.tiled) {
          const size_t cell = (size_t)(r / 16) * groups;
          k->quantise(v, m.k, q.codes + cell * 1024 + r % 16 * 64, 1024, q.scales + cell * 16 + r % 16, 16, nullptr);
        } else {
          const size_t cell = (size_t)r * groups;
          k->quantise(v, m.k, q.codes + cell * 64, 64, q.scales + cell, 1, q.sums + cell);
        }
      }
      uint8_t* scratch = panel.get<uint8_t>((size_t)groups * (1024 + 64));
      k->enter();
      for (int b = 0; b < m.blocks(); ++b)
        m.multiply(*k, b, q, nullptr, rows, padded.data() + b * 16, ld, scratch);
      k->leave();
    }
  }
  float* y;
  auto out = array2<float>(rows, m.n, &y);
  for (int r = 0; r < rows; ++r) std::memcpy(y + (size_t)r * m.n, padded.data() + r * ld, m.n * sizeof(float));
  return out;
}

static Out1<float> activation(int act, In1<float> x) {
  nb::capsule owner;
  const size_t n = x.shape(0), tall = (n + 15) / 16 * 16;
  std::vector<float> in(tall, 0.0f);
  std::memcpy(in.data(), x.data(), n * sizeof(float));
  float* y = fresh<float>(tall, owner);
  current()->activate(act, in.data(), nullptr, (int)tall, 1.0f, y);
  return Out1<float>(y, {n}, owner);
}

template <class T> static Out2<T> copied(const T* data, size_t rows, size_t columns, size_t ld) {
  T* out;
  auto a = array2<T>(rows, columns, &out);
  for (size_t r = 0; r < rows; ++r) std::memcpy(out + r * columns, data + r * ld, columns * sizeof(T));
  return a;
}

void bind_train(nb::module_& m);  // train_module.cpp

NB_MODULE(_native, m) {
  bind_train(m);
  m.doc() = "Kernels of Moestro's engine.";
  m.def("features", &features, "{'isa': what runs, 'available': what could run here, best first}");
  m.def("choose", &choose_by_name, nb::arg("isa"), "Use one of features()['available'] for what is built from now on.");
  m.def("quantise", &quantise_rows, nb::arg("x"), "Rows [R, K] -> int8 codes, scales and sums per group of 64, all finite?");
  m.def("linear", &linear, nb::arg("matrix"), nb::arg("x"), nb::arg("tiles") = -1);
  m.def("activation", &activation, nb::arg("act"), nb::arg("x"));
  m.attr("GROUP") = kGroup;
  m.attr("PAGE") = kLanes;

  nb::class_<Matrix>(m, "Matrix")
      .def("__init__",
           [](Matrix* self, int layout, int n, int k, uintptr_t at, size_t size, uintptr_t words) {
             new (self) Matrix{layout, n, k, at, size, words};
           },
           nb::arg("layout"), nb::arg("n"), nb::arg("k"), nb::arg("at"), nb::arg("size") = 0, nb::arg("words") = 0)
      .def(nb::init<>())
      .def_ro("layout", &Matrix::layout).def_ro("n", &Matrix::n).def_ro("k", &Matrix::k).def_ro("at", &Matrix::at)
      .def_prop_ro("nbytes", &Matrix::bytes);
  nb::class_<Ffn>(m, "Ffn").def(nb::init<>()).def_rw("gate", &Ffn::gate).def_rw("up", &Ffn::up).def_rw("down", &Ffn::down)
      .def_rw("act", &Ffn::act);
#define RW(type, name) .def_rw(#name, &type::name)
  nb::class_<LayerSpec>(m, "LayerSpec").def(nb::init<>())
      RW(LayerSpec, attention_norm) RW(LayerSpec, attention_norm_bias) RW(LayerSpec, ffn_norm) RW(LayerSpec, ffn_norm_bias)
      RW(LayerSpec, q) RW(LayerSpec, k) RW(LayerSpec, v) RW(LayerSpec, o) RW(LayerSpec, q_bias) RW(LayerSpec, k_bias)
      RW(LayerSpec, v_bias) RW(LayerSpec, o_bias) RW(LayerSpec, q_norm) RW(LayerSpec, k_norm) RW(LayerSpec, qk_norm)
      RW(LayerSpec, window) RW(LayerSpec, rope) RW(LayerSpec, attention_scale) RW(LayerSpec, attention_softcap)
      RW(LayerSpec, router) RW(LayerSpec, router_bias) RW(LayerSpec, select_bias) RW(LayerSpec, router_kind)
      RW(LayerSpec, top_k) RW(LayerSpec, groups) RW(LayerSpec, top_groups) RW(LayerSpec, ahead) RW(LayerSpec, renormalise)
      RW(LayerSpec, route_scale) RW(LayerSpec, experts) RW(LayerSpec, expert) RW(LayerSpec, shared)
      RW(LayerSpec, shared_gate) RW(LayerSpec, slabs) RW(LayerSpec, kinds) RW(LayerSpec, kind_of);
  nb::class_<ModelSpec>(m, "ModelSpec").def(nb::init<>())
      RW(ModelSpec, hidden) RW(ModelSpec, heads) RW(ModelSpec, kv_heads) RW(ModelSpec, head_dim) RW(ModelSpec, vocab)
      RW(ModelSpec, pages) RW(ModelSpec, rotary) RW(ModelSpec, layer_norm) RW(ModelSpec, rope_interleaved)
      RW(ModelSpec, eps) RW(ModelSpec, norm_add) RW(ModelSpec, embed_scale) RW(ModelSpec, residual_scale)
      RW(ModelSpec, logit_scale) RW(ModelSpec, logit_softcap) RW(ModelSpec, rope_factor) RW(ModelSpec, embedding)
      RW(ModelSpec, head) RW(ModelSpec, final_norm) RW(ModelSpec, final_norm_bias) RW(ModelSpec, inv_freq)
      RW(ModelSpec, layers);
#undef RW

  using Free = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<Model>(m, "Model")
      .def(nb::init<ModelSpec, int>(), nb::arg("spec"), nb::arg("threads"))
      .def("begin",
           [](Model& s, In1<int32_t> tokens, In1<int32_t> positions, In1<int32_t> rows_of, In2<int32_t> tables) {
             const size_t rows = tokens.shape(0);
             if (positions.shape(0) != rows || rows_of.shape(0) != rows)
               throw std::invalid_argument("tokens, positions and rows_of differ in length");
             nb::gil_scoped_release release;
             s.begin(tokens.data(), positions.data(), rows_of.data(), (int)rows, tables.data(), (int)tables.shape(0),
                     (int)tables.shape(1));
           },
           nb::arg("tokens"), nb::arg("positions"), nb::arg("rows_of"), nb::arg("tables"))
      .def("attention", &Model::attention, nb::arg("layer"), Free())
      .def("chosen",
           [](const Model& s, int layer) {
             const LayerSpec& l = s.spec().layers.at(layer);
             const size_t k = l.experts ? l.top_k : 0;
             if (s.chosen(layer).size() != s.rows() * k) throw std::invalid_argument("chosen: the layer was not routed yet");
             return nb::make_tuple(copied(s.chosen(layer).data(), s.rows(), k, k),
                                   copied(s.weighed(layer).data(), s.rows(), k, k));
           },
           nb::arg("layer"), "(ids int32 [R, k], weights float32 [R, k]) of a layer's own router, best first")
      .def("scores",
           [](const Model& s, int layer) {
             const LayerSpec& l = s.spec().layers.at(layer);
             if (!s.scores(layer) || (int)s.chosen(layer).size() != s.rows() * l.top_k)
               throw std::invalid_argument("scores: the layer was not routed yet");
             return copied(s.scores(layer), s.rows(), l.experts, (size_t)l.router.blocks() * 16);
           },
           nb::arg("layer"), "router logits float32 [R, experts] of the layer whose attention ran last, or of one routed ahead")
      .def("peek",
           [](Model& s, int layer, int other) {
             const int experts = s.spec().layers.at(other).experts;
             float* out;
             auto a = array2<float>(s.rows(), experts, &out);
             nb::gil_scoped_release release;
             s.peek(layer, other, out);
             return a;
           },
           nb::arg("layer"), nb::arg("other"),
           "router logits float32 [R, experts] of layer `other` for what the experts of `layer` are given; before the next"
           " layer's attention")
      .def("thin",
           [](Model& s, In2<float> ratios, In1<int32_t> rows) {
             for (const LayerSpec& l : s.spec().layers)
               if ((int)ratios.shape(1) < l.top_k) throw std::invalid_argument("thin: fewer ranks than experts a token");
             if (ratios.shape(0) != s.spec().layers.size() || (int)rows.shape(0) != s.rows())
               throw std::invalid_argument("thin: ratios must be [layers, ranks], rows [rows]");
             s.thin(ratios.data(), (int)ratios.shape(1), rows.data());
           },
           nb::arg("ratios"), nb::arg("rows"), "Rows that are not 0 leave out experts in this step, after begin")
      .def("routes",
           [](Model& s, int layer, In2<int32_t> ids, In2<float> weights) {
             if ((int)ids.shape(0) != s.rows() || weights.shape(0) != ids.shape(0) || weights.shape(1) != ids.shape(1))
               throw std::invalid_argument("routes: ids and weights must be [rows, k]");
             s.routes(layer, ids.data(), weights.data(), (int)ids.shape(1));
           },
           nb::arg("layer"), nb::arg("ids"), nb::arg("weights"))
      .def("experts",
           [](Model& s, int layer, In1<int32_t> ids, In1<int64_t> slabs) {
             if (ids.shape(0) != slabs.shape(0)) throw std::invalid_argument("experts: one slab address an id");
             std::vector<uintptr_t> at(slabs.data(), slabs.data() + slabs.shape(0));
             nb::gil_scoped_release release;
             s.experts(layer, ids.data(), at.data(), (int)at.size());
           },
           nb::arg("layer"), nb::arg("ids"), nb::arg("slabs"))
      .def("finish", &Model::finish, nb::arg("layer"), Free())
      .def("run", &Model::run, nb::arg("from_layer"), nb::arg("to_layer"), Free())
      .def("logits",
           [](Model& s, In1<int32_t> want) {
             float* out;
             auto a = array2<float>(want.shape(0), s.spec().vocab, &out);
             nb::gil_scoped_release release;
             s.logits(want.data(), (int)want.shape(0), out);
             return a;
           },
           nb::arg("want"))
      .def("hidden",
           [](const Model& s) {
             float* out;
             auto a = array2<float>(s.rows(), s.spec().hidden, &out);
             s.read_hidden(out);
             return a;
           })
      .def("copy_page", &Model::copy_page, nb::arg("src"), nb::arg("dst"))
      .def_prop_ro("page_bytes", &Model::page_bytes);
}
