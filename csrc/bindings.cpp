// pybind11: names, argument names, docstrings; no arithmetic. Tensors arrive as addresses and sizes that
// e2cm_ext/ops/validation.py has checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "api.h"
#include "fast_path.h"
#include "search.h"
#ifdef E2CM_HAVE_CUDA
#include "cuda/launch.h"
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;  // of the first element; 0 stands for "none"

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The structs of api.h as tuples; see _native.pyi.
//   Matrix: data, dtype, rows, dim, stride
//   Numbers: channels, height, width, channels_last; rows and columns of the grids of mean, rms and max; pairs
//   Input: a matrix; and the numbers of the statistics of it, if those are what a head reads
//   Head: kind, vectors, dtype, classes, dim, per_class, center, packed
//   Answers: rows, confidence, prediction, exit, log_probs
//   Departure: rule, threshold, number of the exit, ids
using Matrix = std::tuple<Address, int, int64_t, int64_t, int64_t>;
using Numbers = std::array<int64_t, 11>;
using Input = std::pair<Matrix, std::optional<Numbers>>;
using Head = std::tuple<int, Address, int, int64_t, int64_t, Address, Address, Address>;
using Answers = std::tuple<int64_t, Address, Address, Address, Address>;
using Departure = std::tuple<int, float, int64_t, Address>;

e2cm::Rows rows_at(const Matrix& matrix) {
  const auto [data, dtype, rows, dim, stride] = matrix;
  return {at<const void>(data), static_cast<e2cm::DType>(dtype), rows, dim, stride};
}

e2cm::Pooled pooled_at(const Matrix& x, const Numbers& n) {
  const e2cm::Rows rows = rows_at(x);
  return {{rows.data, rows.dtype, rows.rows, n[0], n[1], n[2], rows.stride, n[3] != 0},
          {{n[4], n[5]}, {n[6], n[7]}, {n[8], n[9]}, n[10]}};
}

e2cm::HeadInput input_at(const Input& input) {
  if (input.second) return pooled_at(input.first, *input.second);
  return rows_at(input.first);
}

e2cm::HeadParams head_at(const Head& head) {
  const auto [kind, vectors, dtype, classes, dim, per_class, center, packed] = head;
  return {static_cast<e2cm::HeadKind>(kind), rows_at({vectors, dtype, classes, dim, dim}), at<const float>(per_class),
          at<const float>(center), at<const void>(packed)};
}

e2cm::Answers answers_at(const Answers& answers, int64_t classes) {
  const auto [rows, confidence, prediction, exit, log_probs] = answers;
  return {rows, classes, at<float>(confidence), at<int64_t>(prediction), at<int64_t>(exit), at<float>(log_probs)};
}

e2cm::Departure departure_at(const Departure& departure) {
  const auto [rule, threshold, exit_number, ids] = departure;
  return {static_cast<e2cm::Rule>(rule), threshold, exit_number, at<const int64_t>(ids)};
}

void class_distances(const Matrix& x, const Head& head, Address out, int threads) {
  py::gil_scoped_release unlocked;
  e2cm::class_distances(rows_at(x), head_at(head), at<float>(out), threads);
}

void pack(Address vectors, int dtype, int64_t classes, int64_t dim, Address center, Address packed, int threads) {
  py::gil_scoped_release unlocked;
  e2cm::pack(rows_at({vectors, dtype, classes, dim, dim}), at<const float>(center), at<void>(packed), threads);
}

uint64_t sampled_hash(Address data, int64_t bytes) { return e2cm::sampled_hash(at<const void>(data), bytes); }

void statistics(const Matrix& x, const Numbers& numbers, Address out, int threads) {
  const e2cm::Pooled pooled = pooled_at(x, numbers);
  py::gil_scoped_release unlocked;
  e2cm::statistics(pooled.maps, pooled.wanted, at<float>(out), threads);
}

void scores(const Input& x, const Head& head, const Answers& out, int threads) {
  py::gil_scoped_release unlocked;
  const e2cm::HeadParams params = head_at(head);
  e2cm::scores(input_at(x), params, answers_at(out, params.vectors.rows), threads);
}

int64_t step(const Input& x, const Head& head, const Departure& departure, const Answers& out, Address keep,
             int threads) {
  py::gil_scoped_release unlocked;
  const e2cm::HeadParams params = head_at(head);
  return e2cm::step(input_at(x), params, departure_at(departure), answers_at(out, params.vectors.rows),
                    at<int64_t>(keep), threads);
}

int64_t decide(const Matrix& scores, Address scale, const Departure& departure, const Answers& out, Address keep,
               int threads) {
  py::gil_scoped_release unlocked;
  const e2cm::Rows rows = rows_at(scores);
  return e2cm::decide(rows, at<const float>(scale), departure_at(departure), answers_at(out, rows.dim),
                      at<int64_t>(keep), threads);
}

int64_t kept_rows(Address mask, int64_t rows, Address keep) {
  py::gil_scoped_release unlocked;
  return e2cm::kept_rows(at<const uint8_t>(mask), rows, at<int64_t>(keep));
}

void gather_rows(Address source, int64_t row_bytes, int64_t source_stride, Address index, int64_t count, Address target,
                 int threads) {
  py::gil_scoped_release unlocked;
  e2cm::gather_rows(at<const void>(source), row_bytes, source_stride, at<const int64_t>(index), count, at<void>(target),
                    threads);
}

#ifdef E2CM_HAVE_CUDA
// All of these put work on a stream. Addresses are of device memory.

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Number of the device, and of a stream of it. They must be given: the CUDA runtime that is linked in here is not
// torch's, and does not know torch's current device.
using Place = std::pair<int, Address>;

cudaStream_t stream_at(const Place& place) {
  check(cudaSetDevice(place.first), "cudaSetDevice");
  return reinterpret_cast<cudaStream_t>(place.second);
}

// Addresses of stays and bad_ids; are rows that do not stay passed over.
using Marks = std::tuple<Address, Address, bool>;
// Without: every row is answered.
using CudaDeparture = std::optional<std::pair<Departure, Marks>>;

e2cm::cuda::Epilogue epilogue_at(const Answers& answers, int64_t classes, const CudaDeparture& departure) {
  e2cm::cuda::Epilogue epilogue{};
  epilogue.out = answers_at(answers, classes);
  if (departure) {
    const auto [rule, threshold, exit_number, ids] = departure_at(departure->first);
    const auto [stays, bad_ids, marked] = departure->second;
    epilogue.ids = ids;
    epilogue.rule = rule;
    epilogue.threshold = threshold;
    epilogue.exit_number = exit_number;
    epilogue.stays = at<uint8_t>(stays);
    epilogue.marked = marked;
    epilogue.bad_ids = at<int64_t>(bad_ids);
  }
  return epilogue;
}

int64_t cuda_exit_workspace(const Input& x, const Head& head) {
  return e2cm::cuda::exit_workspace({input_at(x), head_at(head), nullptr, {}});
}

void cuda_exit(const Input& x, const Head& head, Address distances, const Answers& answers,
               const CudaDeparture& departure, Address workspace, const Place& place) {
  py::gil_scoped_release unlocked;
  const e2cm::HeadParams params = head_at(head);
  const e2cm::cuda::Exit exit{input_at(x), params, at<float>(distances),
                              epilogue_at(answers, params.vectors.rows, departure)};
  check(e2cm::cuda::launch_exit(exit, at<void>(workspace), stream_at(place)), "the exit step");
}

void cuda_decide(const Matrix& scores, Address scale, const Answers& answers, const CudaDeparture& departure,
                 const Place& place) {
  py::gil_scoped_release unlocked;
  const e2cm::Rows rows = rows_at(scores);
  check(e2cm::cuda::launch_decide(rows, at<const float>(scale), epilogue_at(answers, rows.dim, departure),
                                  stream_at(place)),
        "decide");
}

int64_t cuda_statistics_workspace(int64_t rows, const Numbers& numbers) {
  const e2cm::Pooled pooled = pooled_at({0, 0, rows, 0, 0}, numbers);
  return e2cm::cuda::statistics_workspace(rows, pooled.maps.channels, pooled.wanted);
}

void cuda_statistics(const Matrix& x, const Numbers& numbers, Address out, Address workspace, const Place& place) {
  const e2cm::Pooled pooled = pooled_at(x, numbers);
  py::gil_scoped_release unlocked;
  check(
      e2cm::cuda::launch_statistics(pooled.maps, pooled.wanted, at<float>(out), at<void>(workspace), stream_at(place)),
      "statistics");
}

void cuda_kept_rows(Address mask, int64_t rows, Address ids, Address keep, Address kept_ids, Address count,
                    Address workspace, const Place& place) {
  py::gil_scoped_release unlocked;
  check(e2cm::cuda::launch_kept_rows(at<const uint8_t>(mask), rows, at<const int64_t>(ids), at<int64_t>(keep),
                                     at<int64_t>(kept_ids), at<int64_t>(count), at<void>(workspace), stream_at(place)),
        "kept_rows");
}

void cuda_gather_rows(Address source, int64_t row_bytes, int64_t source_stride, Address index, Address counted,
                      int64_t most, Address target, const Place& place) {
  py::gil_scoped_release unlocked;
  check(e2cm::cuda::launch_gather_rows(at<const void>(source), row_bytes, source_stride, at<const int64_t>(index),
                                       at<const int64_t>(counted), most, at<void>(target), stream_at(place)),
        "gather_rows");
}
#endif

py::dict build_info() {
  py::dict info;
  info["version"] = E2CM_VERSION;
  info["compiler"] = E2CM_COMPILER;
  info["isa"] = e2cm::isa_in_use();
  info["isa_available"] = py::str(e2cm::isa_available()).attr("split")(",");
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef E2CM_HAVE_CUDA
  info["cuda_archs"] = py::str(E2CM_CUDA_ARCHS).attr("replace")(";", ",").attr("split")(",");
#else
  info["cuda_archs"] = py::list();
#endif
  return info;
}

// ---- the threshold search

using e2cm::ThresholdSearch;

std::unique_ptr<ThresholdSearch> threshold_search(Address confidence, Address correct, int64_t rows, int64_t exits,
                                                  Address stage_flops, Address head_flops) {
  py::gil_scoped_release unlocked;
  return std::make_unique<ThresholdSearch>(e2cm::RecordView{at<const float>(confidence), at<const uint8_t>(correct),
                                                            rows, exits, at<const double>(stage_flops),
                                                            at<const double>(head_flops)});
}

void sort(ThresholdSearch& self, int64_t first, int64_t count, int threads) {
  py::gil_scoped_release unlocked;
  self.sort(first, count, threads);
}

void search(const ThresholdSearch& self, int64_t first, int64_t count, int64_t targets, uint64_t seed,
            Address thresholds, Address flops, Address accuracy, int threads) {
  py::gil_scoped_release unlocked;
  self.search(first, count, targets, seed, {at<float>(thresholds), at<double>(flops), at<double>(accuracy)}, threads);
}

void ascend(const ThresholdSearch& self, int64_t first, int64_t count, int64_t prices, Address thresholds,
            Address flops, Address accuracy, int threads) {
  py::gil_scoped_release unlocked;
  self.ascend(first, count, prices, {at<float>(thresholds), at<double>(flops), at<double>(accuracy)}, threads);
}

void replay(const ThresholdSearch& self, int64_t count, Address thresholds, Address flops, Address accuracy,
            int threads) {
  py::gil_scoped_release unlocked;
  self.replay(count, {at<float>(thresholds), at<double>(flops), at<double>(accuracy)}, threads);
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "Kernels of e2cm_ext. Addresses and sizes in, numbers out; nothing here is checked: use e2cm_ext.ops.";
  e2cm::isa_in_use();  // a wrong E2CM_ISA throws at import, not in the middle of the first batch

  m.def("class_distances", &class_distances, "Distances of all rows to all means, [rows, classes] float32.",
        py::arg("x"), py::arg("head"), py::arg("out"), py::arg("threads"));
  m.def("packed_bytes", &e2cm::packed_bytes, "Room that pack needs; 0: there is nothing to be made.",
        py::arg("classes"), py::arg("dim"));
  m.def("pack", &pack, "Means or weights in the form that rows are multiplied with.", py::arg("vectors"),
        py::arg("dtype"), py::arg("classes"), py::arg("dim"), py::arg("center"), py::arg("packed"), py::arg("threads"));
  m.def("sampled_hash", &sampled_hash, "If this differs, so does the memory.", py::arg("data"), py::arg("bytes"));
  m.def("statistics", &statistics, "Statistics of all rows, float32.", py::arg("x"), py::arg("statistics"),
        py::arg("out"), py::arg("threads"));
  m.def("scores", &scores, "Confidence, prediction and log-probabilities of all rows.", py::arg("x"), py::arg("head"),
        py::arg("out"), py::arg("threads"));
  m.def("step", &step, "Answers of the rows that leave; returns how many stay, their numbers in keep.", py::arg("x"),
        py::arg("head"), py::arg("departure"), py::arg("out"), py::arg("keep"), py::arg("threads"));
  m.def("decide", &decide, "step for scores that another head has made.", py::arg("scores"), py::arg("scale"),
        py::arg("departure"), py::arg("out"), py::arg("keep"), py::arg("threads"));
  m.def("kept_rows", &kept_rows, "The numbers of the true bytes of mask; returns their count.", py::arg("mask"),
        py::arg("rows"), py::arg("keep"));
  m.def("gather_rows", &gather_rows, "target[i] = source[index[i]], row by row.", py::arg("source"),
        py::arg("row_bytes"), py::arg("source_stride"), py::arg("index"), py::arg("count"), py::arg("target"),
        py::arg("threads"));
#ifdef E2CM_HAVE_CUDA
  m.def("cuda_exit_workspace", &cuda_exit_workspace, "Bytes that cuda_exit needs.", py::arg("x"), py::arg("head"));
  m.def("cuda_exit", &cuda_exit, "A head's distances, scores or departures on a CUDA stream.", py::arg("x"),
        py::arg("head"), py::arg("distances"), py::arg("answers"), py::arg("departure"), py::arg("workspace"),
        py::arg("place"));
  m.def("cuda_decide", &cuda_decide, "decide on a CUDA stream.", py::arg("scores"), py::arg("scale"),
        py::arg("answers"), py::arg("departure"), py::arg("place"));
  m.def("cuda_statistics_workspace", &cuda_statistics_workspace, "Bytes that cuda_statistics needs.", py::arg("rows"),
        py::arg("statistics"));
  m.def("cuda_statistics", &cuda_statistics, "statistics on a CUDA stream.", py::arg("x"), py::arg("statistics"),
        py::arg("out"), py::arg("workspace"), py::arg("place"));
  m.def("cuda_kept_rows_workspace", &e2cm::cuda::kept_rows_workspace, "Bytes that cuda_kept_rows needs.",
        py::arg("rows"));
  m.def("cuda_kept_rows", &cuda_kept_rows, "kept_rows on a CUDA stream, with their ids; the count goes to memory.",
        py::arg("mask"), py::arg("rows"), py::arg("ids"), py::arg("keep"), py::arg("kept_ids"), py::arg("count"),
        py::arg("workspace"), py::arg("place"));
  m.def("cuda_gather_rows", &cuda_gather_rows, "gather_rows on a CUDA stream; as many rows as memory says.",
        py::arg("source"), py::arg("row_bytes"), py::arg("source_stride"), py::arg("index"), py::arg("counted"),
        py::arg("most"), py::arg("target"), py::arg("place"));
#endif
  e2cm::bind_fast_path(m);
  m.def("build_info", &build_info, "How this module was built, and the instruction set it uses.");

  py::class_<ThresholdSearch>(m, "ThresholdSearch", "See csrc/search.h; use e2cm_ext.calibration.")
      .def(py::init(&threshold_search), py::arg("confidence"), py::arg("correct"), py::arg("rows"), py::arg("exits"),
           py::arg("stage_flops"), py::arg("head_flops"))
      .def("sort", &sort, "Each exit once, while the record is still there.", py::arg("first"), py::arg("count"),
           py::arg("threads"))
      .def("search", &search, "The paper's search for count of the targets.", py::arg("first"), py::arg("count"),
           py::arg("targets"), py::arg("seed"), py::arg("thresholds"), py::arg("flops"), py::arg("accuracy"),
           py::arg("threads"))
      .def("ascend", &ascend, "Coordinate ascent from the thresholds given, which are replaced.", py::arg("first"),
           py::arg("count"), py::arg("prices"), py::arg("thresholds"), py::arg("flops"), py::arg("accuracy"),
           py::arg("threads"))
      .def("replay", &replay, "FLOPs and accuracy of given thresholds.", py::arg("count"), py::arg("thresholds"),
           py::arg("flops"), py::arg("accuracy"), py::arg("threads"));
}
