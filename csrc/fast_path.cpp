// exit_step, linear_step and decide on Python's own objects: the arguments are read, the exit is computed and its
// results are returned without going back to Python.
//
// An exit of a small network is a few microseconds of arithmetic. To ask eleven tensors for their dtype, shape, strides
// and address through Python takes longer than that. Here torch fills a struct per tensor (see tensor_view.h).
//
// Only the common case is done here: plain strided tensors on the CPU, of dtypes and shapes that fit, dense in one
// memory order, so that nothing has to be converted or copied. Anything else falls back: the function returns None,
// without an error and before anything is written. Then the validated path (e2cm_ext/ops/validation.py) takes one
// argument after the other, converts what can be converted and says what is wrong with the rest. So every test here may
// be too strict, and none may be too lax: what it lets through must be what validation.py would let through unchanged.
#include "fast_path.h"

#include <memory>
#include <new>
#include <stdexcept>
#include <utility>

#include "api.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace e2cm {
namespace {

using dlpack::Tensor;

constexpr int kMaxDims = 5;  // [batch, channels, depth, height, width]

// What must be known of torch. Written once, when e2cm_ext.ops is imported; never freed, as torch is never unloaded.
struct Torch {
  const dlpack::Exchange* exchange = nullptr;  // null: this torch has none, every call falls back
  PyObject* tensor = nullptr;                  // types
  PyObject* parameter = nullptr;
  PyObject* decisions = nullptr;
  PyObject* statistics = nullptr;
  PyObject* is_neg = nullptr;  // methods of torch.Tensor
  PyObject* new_empty_strided = nullptr;
  PyObject* numbers = nullptr;  // the name of an attribute of Statistics
};
Torch torch;

class Unlocked {  // py::gil_scoped_release asks for pybind11's internals first, which takes longer than the release
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(state_); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* const state_;
};

// ---- one tensor

bool is_type(PyObject* object, PyObject* type) { return reinterpret_cast<PyObject*>(Py_TYPE(object)) == type; }

// Subclasses may mean anything by their data.
bool is_plain(PyObject* object) { return is_type(object, torch.tensor) || is_type(object, torch.parameter); }

// The values are those in memory, not their negatives. May run Python (a TorchFunctionMode) and lets go of the
// interpreter for a moment: to be asked before anything is read.
bool is_literal(PyObject* object) {
  PyObject* const answer = PyObject_Vectorcall(torch.is_neg, &object, 1, nullptr);
  if (!answer) PyErr_Clear();
  Py_XDECREF(answer);
  return answer == Py_False;
}

bool read(PyObject* object, Tensor& t) {
  if (torch.exchange->view(object, &t) != 0) {  // no memory (sparse, meta, wrapped by functorch), no such dtype
    PyErr_Clear();
    return false;
  }
  if (t.device.type != dlpack::kCPU || t.dtype.lanes != 1 || t.byte_offset != 0) return false;
  if (t.data) return true;
  for (int d = 0; d < t.ndim; ++d)  // numbers without memory: torch._efficientzerotensor
    if (t.shape[d] == 0) return true;
  return false;
}

bool is_dtype(const Tensor& t, uint8_t code, int bits) { return t.dtype.code == code && t.dtype.bits == bits; }
bool is_float32(const Tensor& t) { return is_dtype(t, dlpack::kFloat, 32); }
bool is_int64(const Tensor& t) { return is_dtype(t, dlpack::kInt, 64); }

bool feature_dtype(const Tensor& t, DType& dtype) {
  if (is_float32(t))
    dtype = DType::f32;
  else if (is_dtype(t, dlpack::kBfloat, 16))
    dtype = DType::bf16;
  else if (is_dtype(t, dlpack::kFloat, 16))
    dtype = DType::f16;
  else
    return false;
  return true;
}

// Are the dimensions from `first` on dense, with `channels` (if there is one) innermost and the others in their order?
// A tensor without elements is dense for torch whatever its strides, but not here: only the first size may be 0.
bool is_dense(const Tensor& t, int first, int channels = -1) {
  int64_t expected = 1;
  const auto fits = [&](int d) {
    if (t.shape[d] != 1 && t.strides[d] != expected) return false;
    expected *= t.shape[d];
    return true;
  };
  if (channels >= 0 && !fits(channels)) return false;
  for (int d = t.ndim - 1; d >= first; --d)
    if (d != channels && !fits(d)) return false;
  return true;
}

bool is_vector(const Tensor& t, int64_t size) {
  return t.ndim == 1 && t.shape[0] == size && (size <= 1 || t.strides[0] == 1);
}

bool is_matrix(const Tensor& t, int64_t rows, int64_t columns) {
  return t.ndim == 2 && t.shape[0] == rows && t.shape[1] == columns && (rows == 0 || is_dense(t, 0));
}

// ---- several

// x [B, ...] whose samples are dense, in the order of their dimensions or in channels_last.
struct Batch {
  const void* data;
  dlpack::DataType dtype;
  int ndim;
  int64_t shape[kMaxDims];  // copies: torch's own may change while other threads run
  int64_t rows, dim, stride;
  bool channels_last;

  bool take(const Tensor& t) {
    data = t.data;
    dtype = t.dtype;
    ndim = t.ndim;
    if (ndim < 2 || ndim > kMaxDims) return false;
    dim = 1;
    for (int d = 0; d < ndim; ++d) {
      shape[d] = t.shape[d];
      if (d > 0) dim *= shape[d];
    }
    if (dim == 0) return false;
    rows = shape[0];
    stride = rows > 1 ? t.strides[0] : dim;
    channels_last = false;
    if (is_dense(t, 1)) return true;
    channels_last = ndim >= 4;
    return channels_last && is_dense(t, 1, 1);
  }

  // Is t dense in the same order, with the shape of a sample behind its first `lead` dimensions?
  bool is_order_of(const Tensor& t, int lead) const {
    if (t.ndim == lead + 1 && t.shape[lead] == dim && !channels_last) return is_dense(t, 0);
    if (t.ndim - lead != ndim - 1) return false;
    for (int d = 1; d < ndim; ++d)
      if (t.shape[lead + d - 1] != shape[d]) return false;
    return channels_last ? is_dense(t, 0, lead) : is_dense(t, 0);
  }
};

// x, or the statistics of x that a head reads.
struct Input {
  HeadInput value;
  bool pooled = false;
  int64_t size = 0;  // numbers per sample

  bool take(PyObject* statistics, const Batch& x, DType dtype) {
    value = Rows{x.data, dtype, x.rows, x.dim, x.stride};
    size = x.dim;
    if (statistics == Py_None) return true;
    int64_t n[8];
    if (!is_type(statistics, torch.statistics) || !numbers_of(statistics, n)) return false;
    const bool last = n[7] != 0;
    if (x.ndim > 4 || (last && x.channels_last)) return false;
    Maps maps{x.data, dtype, x.rows, x.shape[last ? x.ndim - 1 : 1], 1, 1, x.stride, last || x.channels_last};
    if (x.ndim > 2) maps.height = x.shape[last ? 1 : 2];
    if (x.ndim > 3) maps.width = x.shape[last ? 2 : 3];
    for (int i = 0; i < 6; i += 2)
      if (n[i] > maps.height || n[i + 1] > maps.width) return false;
    if (n[6] > (maps.channels + 1) / 2) return false;
    const Statistics wanted{{n[0], n[1]}, {n[2], n[3]}, {n[4], n[5]}, n[6]};
    value = Pooled{maps, wanted};
    pooled = true;
    size = wanted.size(maps.channels);
    return true;
  }

 private:
  // Statistics has checked them when it was made.
  static bool numbers_of(PyObject* statistics, int64_t (&numbers)[8]) {
    const py::object all = py::reinterpret_steal<py::object>(PyObject_GetAttr(statistics, torch.numbers));
    if (!all) PyErr_Clear();
    if (!all || !PyTuple_CheckExact(all.ptr()) || PyTuple_GET_SIZE(all.ptr()) != 8) return false;
    for (int i = 0; i < 8; ++i) {
      PyObject* const number = PyTuple_GET_ITEM(all.ptr(), i);
      int overflow = 0;
      if (!PyLong_CheckExact(number)) return false;
      numbers[i] = PyLong_AsLongLongAndOverflow(number, &overflow);
      if (overflow) return false;
    }
    return true;
  }
};

// What all three functions have in common.
struct Call {
  PyObject *x_object, *ids_object;
  Batch x;
  int64_t row_bytes, stride_bytes;
  Departure departure;
  Answers out;
  int threads;

  // The arguments that are no tensors.
  bool take_rule(PyObject* threshold, PyObject* rule, PyObject* exit, PyObject* thread_count) {
    if (!PyFloat_CheckExact(threshold) || !PyUnicode_CheckExact(rule) || !PyLong_CheckExact(exit) ||
        !PyLong_CheckExact(thread_count))
      return false;
    const double limit = PyFloat_AS_DOUBLE(threshold);
    if (limit != limit) return false;
    departure.threshold = static_cast<float>(limit);
    if (PyUnicode_CompareWithASCIIString(rule, "confidence") == 0)
      departure.rule = Rule::confidence;
    else if (PyUnicode_CompareWithASCIIString(rule, "entropy") == 0)
      departure.rule = Rule::entropy;
    else
      return false;
    int overflow = 0;
    departure.exit_number = PyLong_AsLongLongAndOverflow(exit, &overflow);
    threads = static_cast<int>(PyLong_AsLong(thread_count));
    return overflow == 0;
  }

  bool take_x(PyObject* object, const Tensor& t) {
    x_object = object;
    if (!x.take(t) || t.dtype.bits % 8 != 0) return false;
    const int64_t size = t.dtype.bits / 8;
    row_bytes = x.dim * size;
    stride_bytes = x.stride * size;
    return true;
  }

  bool take_ids(PyObject* object, const Tensor& t) {
    ids_object = object;
    departure.ids = static_cast<const int64_t*>(t.data);
    return is_int64(t) && is_vector(t, x.rows);
  }

  bool take_out(const Tensor& prediction, const Tensor& confidence, const Tensor& exit, const Tensor* log_probs,
                int64_t classes) {
    if (prediction.ndim != 1) return false;
    const int64_t rows = prediction.shape[0];
    if (!is_int64(prediction) || !is_float32(confidence) || !is_int64(exit) || !is_vector(prediction, rows) ||
        !is_vector(confidence, rows) || !is_vector(exit, rows))
      return false;
    if (log_probs && !(is_float32(*log_probs) && is_matrix(*log_probs, rows, classes))) return false;
    out = {rows,
           classes,
           static_cast<float*>(confidence.data),
           static_cast<int64_t*>(prediction.data),
           static_cast<int64_t*>(exit.data),
           log_probs ? static_cast<float*>(log_probs->data) : nullptr};
    return true;
  }
};

// A tensor, or None where that is allowed.
struct Argument {
  PyObject* object;
  bool optional = false;
  Tensor view{};

  const Tensor* get() const { return object == Py_None ? nullptr : &view; }
};

// All of them are asked for lazy negatives before the first is read: see is_literal.
template <size_t n>
bool read_all(Argument (&arguments)[n]) {
  for (const Argument& a : arguments)
    if (!is_plain(a.object) && !(a.optional && a.object == Py_None)) return false;
  for (const Argument& a : arguments)
    if (a.object != Py_None && !is_literal(a.object)) return false;
  for (Argument& a : arguments)
    if (a.object != Py_None && !read(a.object, a.view)) return false;
  return true;
}

bool is_out(PyObject* out) {
  return (is_type(out, torch.decisions) || PyTuple_CheckExact(out)) && PyTuple_GET_SIZE(out) == 4;
}

// ---- results

// A new tensor of the dtype of `like`; null with a Python exception set. Of torch's ways of making one this is the
// quickest to call: 1.5 microseconds, where new_empty and empty take 2.3 and build the same.
PyObject* new_tensor(PyObject* like, dlpack::DataType dtype, const int64_t* shape, const int64_t* strides, int ndim,
                     void*& data) {
  const py::object sizes = py::reinterpret_steal<py::object>(PyTuple_New(ndim));
  const py::object steps = py::reinterpret_steal<py::object>(PyTuple_New(ndim));
  if (!sizes || !steps) return nullptr;
  for (int d = 0; d < ndim; ++d) {
    PyObject *const size = PyLong_FromLongLong(shape[d]), *const step = PyLong_FromLongLong(strides[d]);
    PyTuple_SET_ITEM(sizes.ptr(), d, size);
    PyTuple_SET_ITEM(steps.ptr(), d, step);
    if (!size || !step) return nullptr;
  }
  PyObject* const arguments[] = {like, sizes.ptr(), steps.ptr()};
  PyObject* const made = PyObject_Vectorcall(torch.new_empty_strided, arguments, 3, nullptr);
  if (!made) return nullptr;
  Tensor t;
  bool fits = is_plain(made) && read(made, t) && t.ndim == ndim && is_dtype(t, dtype.code, dtype.bits);
  for (int d = 0; fits && d < ndim; ++d) fits = t.shape[d] == shape[d] && t.strides[d] == strides[d];
  if (fits) {
    data = t.data;
    return made;
  }
  Py_DECREF(made);  // a TorchFunctionMode may answer anything
  PyErr_SetString(PyExc_RuntimeError, "torch made another tensor than the one that was asked for");
  return nullptr;
}

PyObject* pair(PyObject* a, PyObject* b) {  // takes over both
  PyObject* const both = PyTuple_New(2);
  if (!both) {
    Py_DECREF(a);
    Py_DECREF(b);
    return nullptr;
  }
  PyTuple_SET_ITEM(both, 0, a);
  PyTuple_SET_ITEM(both, 1, b);
  return both;
}

// (survivors, their ids): x and ids themselves if all survive.
PyObject* survivors(const Call& call, const int64_t* keep, int64_t count) {
  const Batch& x = call.x;
  if (count == x.rows) {
    Py_INCREF(call.x_object);
    Py_INCREF(call.ids_object);
    return pair(call.x_object, call.ids_object);
  }
  int64_t shape[kMaxDims], strides[kMaxDims], step = 1;
  for (int d = 0; d < x.ndim; ++d) shape[d] = x.shape[d];
  shape[0] = count;
  const auto place = [&](int d) {
    strides[d] = step;
    step *= shape[d];
  };
  if (x.channels_last) place(1);
  for (int d = x.ndim - 1; d >= 0; --d)
    if (!(x.channels_last && d == 1)) place(d);

  constexpr dlpack::DataType int64{dlpack::kInt, 64, 1};
  void *moved = nullptr, *numbers = nullptr;
  py::object rows =
      py::reinterpret_steal<py::object>(new_tensor(call.x_object, x.dtype, shape, strides, x.ndim, moved));
  if (!rows) return nullptr;
  const int64_t one = 1;
  py::object ids = py::reinterpret_steal<py::object>(new_tensor(call.ids_object, int64, &count, &one, 1, numbers));
  if (!ids) return nullptr;
  {
    Unlocked unlocked;
    gather_rows(x.data, call.row_bytes, call.stride_bytes, keep, count, moved, call.threads);
    gather_rows(call.departure.ids, 8, 8, keep, count, numbers, 1);
  }
  return pair(rows.release().ptr(), ids.release().ptr());
}

// compute(keep) is the kernel. Exceptions become Python's as pybind11 would have it: C++ must not unwind into Python.
template <class Compute>
PyObject* run(const Call& call, const Compute& compute) {
  try {
    constexpr int64_t kFew = 256;
    int64_t few[kFew];
    std::unique_ptr<int64_t[]> many;
    if (call.x.rows > kFew) many.reset(new int64_t[static_cast<size_t>(call.x.rows)]);
    int64_t* const keep = many ? many.get() : few;
    int64_t count;
    {
      Unlocked unlocked;
      count = compute(keep);
    }
    return survivors(call, keep, count);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::out_of_range& error) {
    PyErr_SetString(PyExc_IndexError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// ---- the functions

PyObject* fall_back() { Py_RETURN_NONE; }

// Is t a vector of input.size numbers for each of some classes, in the memory order of the input?
bool is_head(const Tensor& t, const Batch& x, const Input& input) {
  if (t.ndim < 2 || t.shape[0] < 1) return false;
  return input.pooled ? input.size > 0 && is_matrix(t, t.shape[0], input.size) : x.is_order_of(t, 1);
}

bool is_center(const Tensor* t, const Batch& x, const Input& input) {
  return !t || (is_float32(*t) && (input.pooled ? is_vector(*t, input.size) : x.is_order_of(*t, 0)));
}

// May t be what `pack` has made of these vectors? Null: it has made nothing.
bool is_packed(const Tensor* t, int64_t classes, int64_t dim) {
  return !t || (is_dtype(*t, dlpack::kUInt, 8) && is_vector(*t, packed_bytes(classes, dim)));
}

// exit_step: (x, means, scale, threshold, ids, out, center, statistics, rule, exit, packed, threads)
// linear_step: (x, weight, bias, threshold, ids, out, statistics, rule, exit, packed, threads)
template <HeadKind kind>
PyObject* try_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr int has_center = kind == HeadKind::distances;
  if (count != 11 + has_center)
    return PyErr_Format(PyExc_TypeError, "%s takes %d arguments, not %zd",
                        has_center ? "try_exit_step" : "try_linear_step", 11 + has_center, count);
  PyObject *const out = args[5], *const center_object = has_center ? args[6] : Py_None;
  PyObject* const* const rest = args + 6 + has_center;
  Call call;
  if (!torch.exchange || !call.take_rule(args[3], rest[1], rest[2], rest[4]) || !is_out(out)) return fall_back();
  Argument tensors[] = {{args[0]},
                        {args[1]},
                        {args[2]},
                        {args[4]},
                        {center_object, true},
                        {rest[3], true},
                        {PyTuple_GET_ITEM(out, 0)},
                        {PyTuple_GET_ITEM(out, 1)},
                        {PyTuple_GET_ITEM(out, 2)},
                        {PyTuple_GET_ITEM(out, 3), true}};
  if (!read_all(tensors)) return fall_back();
  const Tensor &x = tensors[0].view, &vectors = tensors[1].view, &per_class = tensors[2].view;
  const Tensor *const center = tensors[4].get(), *const packed = tensors[5].get();
  DType dtype, vectors_dtype;
  Input input;
  if (!feature_dtype(x, dtype) || !feature_dtype(vectors, vectors_dtype) || !call.take_x(args[0], x))
    return fall_back();
  if (!input.take(rest[0], call.x, dtype) || !is_head(vectors, call.x, input)) return fall_back();
  const int64_t classes = vectors.shape[0];
  if (!is_float32(per_class) || !is_vector(per_class, classes)) return fall_back();
  if (!is_center(center, call.x, input) || !is_packed(packed, classes, input.size)) return fall_back();
  if (!call.take_ids(args[4], tensors[3].view)) return fall_back();
  if (!call.take_out(tensors[6].view, tensors[7].view, tensors[8].view, tensors[9].get(), classes)) return fall_back();

  const HeadParams head{kind,
                        {vectors.data, vectors_dtype, classes, input.size, input.size},
                        static_cast<const float*>(per_class.data),
                        center ? static_cast<const float*>(center->data) : nullptr,
                        packed ? packed->data : nullptr};
  return run(call,
             [&](int64_t* keep) { return step(input.value, head, call.departure, call.out, keep, call.threads); });
}

PyObject* try_decide(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 9) return PyErr_Format(PyExc_TypeError, "try_decide takes 9 arguments, not %zd", count);
  Call call;
  PyObject* const out = args[4];
  if (!torch.exchange || !call.take_rule(args[2], args[6], args[7], args[8]) || !is_out(out)) return fall_back();
  Argument tensors[] = {{args[0]},
                        {args[1]},
                        {args[3]},
                        {args[5], true},
                        {PyTuple_GET_ITEM(out, 0)},
                        {PyTuple_GET_ITEM(out, 1)},
                        {PyTuple_GET_ITEM(out, 2)},
                        {PyTuple_GET_ITEM(out, 3), true}};
  if (!read_all(tensors)) return fall_back();
  const Tensor &x = tensors[0].view, &scores = tensors[1].view;
  const Tensor* const scale = tensors[3].get();
  const bool moves = x.dtype.code == dlpack::kInt || x.dtype.code == dlpack::kUInt || x.dtype.code == dlpack::kFloat ||
                     x.dtype.code == dlpack::kBfloat || x.dtype.code == dlpack::kBool;
  if (!moves || !call.take_x(args[0], x)) return fall_back();  // complex: it might be a lazy conjugate
  DType dtype;
  Batch logits;
  if (!feature_dtype(scores, dtype) || scores.ndim != 2 || !logits.take(scores) || logits.rows != call.x.rows)
    return fall_back();
  if (scale && !(is_float32(*scale) && is_vector(*scale, logits.dim))) return fall_back();
  if (!call.take_ids(args[3], tensors[2].view)) return fall_back();
  if (!call.take_out(tensors[4].view, tensors[5].view, tensors[6].view, tensors[7].get(), logits.dim))
    return fall_back();

  const Rows rows{scores.data, dtype, logits.rows, logits.dim, logits.stride};
  const float* const divisor = scale ? static_cast<const float*>(scale->data) : nullptr;
  return run(call, [&](int64_t* keep) { return decide(rows, divisor, call.departure, call.out, keep, call.threads); });
}

// False if this torch cannot show its tensors to C: then every call falls back.
bool register_torch_types(const py::object& tensor, const py::object& parameter, const py::object& decisions,
                          const py::object& statistics) {
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  const dlpack::Exchange* exchange = nullptr;
  if (PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule))
    exchange = dlpack::usable(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  Torch met;
  met.exchange = exchange;
  met.is_neg = py::object(tensor.attr("is_neg")).release().ptr();
  met.new_empty_strided = py::object(tensor.attr("new_empty_strided")).release().ptr();
  met.tensor = py::object(tensor).release().ptr();
  met.parameter = py::object(parameter).release().ptr();
  met.decisions = py::object(decisions).release().ptr();
  met.statistics = py::object(statistics).release().ptr();
  met.numbers = PyUnicode_InternFromString("numbers");
  torch = met;
  return exchange != nullptr;
}

// Plain functions of Python: the conversions of pybind11 would take as long as everything that is done here.
template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
void add(py::module_& m, const char* name, const char* doc) {
  static PyMethodDef method{name, nullptr, METH_FASTCALL, doc};
  method.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
  const py::object owner = m.attr("__name__");
  m.add_object(name, py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, m.ptr(), owner.ptr())));
}

}  // namespace

void bind_fast_path(py::module_& m) {
  m.def("register_torch_types", &register_torch_types,
        "Whether this torch can show its tensors to C; to be called once.", py::arg("tensor"), py::arg("parameter"),
        py::arg("decisions"), py::arg("statistics"));
  add<try_step<HeadKind::distances>>(
      m, "try_exit_step",
      "(x, means, scale, threshold, ids, out, center, statistics, rule, exit, packed, threads) -> "
      "(survivors, ids), or None if the validated path must take the call.");
  add<try_step<HeadKind::logits>>(
      m, "try_linear_step",
      "(x, weight, bias, threshold, ids, out, statistics, rule, exit, packed, threads) -> (survivors, ids), "
      "or None if the validated path must take the call.");
  add<try_decide>(m, "try_decide",
                  "(x, scores, threshold, ids, out, scale, rule, exit, threads) -> (survivors, ids), or None if the "
                  "validated path must take the call.");
}

}  // namespace e2cm
