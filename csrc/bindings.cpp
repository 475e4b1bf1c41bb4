// pybind11: names, argument names, docstrings; no arithmetic. Tensors arrive as addresses and sizes, checked in ops.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

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

e2cm::Rows rows_at(Address data, int dtype, int64_t rows, int64_t dim, int64_t stride) {
  return {at<const void>(data), static_cast<e2cm::DType>(dtype), rows, dim, stride};
}

void class_distances(Address x, int x_dtype, int64_t rows, int64_t dim, int64_t x_stride, Address means,
                     int means_dtype, int64_t classes, Address center, Address packed, Address out, int threads) {
  py::gil_scoped_release unlocked;
  const e2cm::ClassMeans head{rows_at(means, means_dtype, classes, dim, dim), at<const float>(center), nullptr,
                              at<const void>(packed)};
  e2cm::class_distances(rows_at(x, x_dtype, rows, dim, x_stride), head, at<float>(out), threads);
}

// What a head looks at: the rows of x themselves, or the statistics of x as maps.
struct X {
  Address data;
  int dtype;
  int64_t rows, dim, stride;
};
// Channels, height, width, channels_last; rows and columns of the grids of means, root mean squares and maxima; pairs.
using Numbers = std::array<int64_t, 11>;
using Statistics = std::optional<Numbers>;

e2cm::Pooled pooled_at(const X& x, const Numbers& n) {
  return {{at<const void>(x.data), static_cast<e2cm::DType>(x.dtype), x.rows, n[0], n[1], n[2], x.stride, n[3] != 0},
          {{n[4], n[5]}, {n[6], n[7]}, {n[8], n[9]}, n[10]}};
}

template <class Body>
auto with_features(const X& x, const Statistics& statistics, const Body& body) {
  if (statistics) return body(pooled_at(x, *statistics));
  return body(rows_at(x.data, x.dtype, x.rows, x.dim, x.stride));
}

void pack(Address vectors, int dtype, int64_t classes, int64_t dim, Address center, Address packed, int threads) {
  py::gil_scoped_release unlocked;
  e2cm::pack(rows_at(vectors, dtype, classes, dim, dim), at<const float>(center), at<void>(packed), threads);
}

uint64_t sampled_hash(Address data, int64_t bytes) { return e2cm::sampled_hash(at<const void>(data), bytes); }

void statistics(Address x, int x_dtype, int64_t rows, int64_t dim, int64_t x_stride, const Numbers& numbers,
                Address out, int threads) {
  const e2cm::Pooled pooled = pooled_at({x, x_dtype, rows, dim, x_stride}, numbers);
  py::gil_scoped_release unlocked;
  e2cm::statistics(pooled.maps, pooled.wanted, at<float>(out), threads);
}

void class_scores(Address x, int x_dtype, int64_t rows, int64_t dim, int64_t x_stride, Address means, int means_dtype,
                  int64_t classes, int64_t means_dim, Address center, Address packed, Address scale, Address confidence,
                  Address prediction, Address log_probs, const Statistics& statistics, int threads) {
  py::gil_scoped_release unlocked;
  const e2cm::ClassMeans head{rows_at(means, means_dtype, classes, means_dim, means_dim), at<const float>(center),
                              at<const float>(scale), at<const void>(packed)};
  const e2cm::Answers out{rows, classes, at<float>(confidence), at<int64_t>(prediction), nullptr, at<float>(log_probs)};
  with_features({x, x_dtype, rows, dim, x_stride}, statistics,
                [&](const auto& features) { e2cm::class_scores(features, head, out, threads); });
}

void linear_scores(Address x, int x_dtype, int64_t rows, int64_t dim, int64_t x_stride, Address weight,
                   int weight_dtype, int64_t classes, int64_t weight_dim, Address packed, Address bias,
                   Address confidence, Address prediction, Address log_probs, const Statistics& statistics,
                   int threads) {
  py::gil_scoped_release unlocked;
  const e2cm::Linear head{rows_at(weight, weight_dtype, classes, weight_dim, weight_dim), at<const float>(bias),
                          at<const void>(packed)};
  const e2cm::Answers out{rows, classes, at<float>(confidence), at<int64_t>(prediction), nullptr, at<float>(log_probs)};
  with_features({x, x_dtype, rows, dim, x_stride}, statistics,
                [&](const auto& features) { e2cm::linear_scores(features, head, out, threads); });
}

int64_t exit_step(Address x, int x_dtype, int64_t rows, int64_t dim, int64_t x_stride, Address means, int means_dtype,
                  int64_t classes, int64_t means_dim, Address center, Address packed, Address scale, int rule,
                  float threshold, int64_t exit_number, Address ids, int64_t out_rows, Address confidence,
                  Address prediction, Address exit, Address log_probs, Address keep, const Statistics& statistics,
                  int threads) {
  py::gil_scoped_release unlocked;
  const e2cm::ClassMeans head{rows_at(means, means_dtype, classes, means_dim, means_dim), at<const float>(center),
                              at<const float>(scale), at<const void>(packed)};
  const e2cm::Departure departure{static_cast<e2cm::Rule>(rule), threshold, exit_number, at<const int64_t>(ids)};
  const e2cm::Answers out{
      out_rows, classes, at<float>(confidence), at<int64_t>(prediction), at<int64_t>(exit), at<float>(log_probs)};
  return with_features({x, x_dtype, rows, dim, x_stride}, statistics, [&](const auto& features) {
    return e2cm::exit_step(features, head, departure, out, at<int64_t>(keep), threads);
  });
}

int64_t linear_step(Address x, int x_dtype, int64_t rows, int64_t dim, int64_t x_stride, Address weight,
                    int weight_dtype, int64_t classes, int64_t weight_dim, Address packed, Address bias, int rule,
                    float threshold, int64_t exit_number, Address ids, int64_t out_rows, Address confidence,
                    Address prediction, Address exit, Address log_probs, Address keep, const Statistics& statistics,
                    int threads) {
  py::gil_scoped_release unlocked;
  const e2cm::Linear head{rows_at(weight, weight_dtype, classes, weight_dim, weight_dim), at<const float>(bias),
                          at<const void>(packed)};
  const e2cm::Departure departure{static_cast<e2cm::Rule>(rule), threshold, exit_number, at<const int64_t>(ids)};
  const e2cm::Answers out{
      out_rows, classes, at<float>(confidence), at<int64_t>(prediction), at<int64_t>(exit), at<float>(log_probs)};
  return with_features({x, x_dtype, rows, dim, x_stride}, statistics, [&](const auto& features) {
    return e2cm::linear_step(features, head, departure, out, at<int64_t>(keep), threads);
  });
}

int64_t decide(Address scores, int scores_dtype, int64_t rows, int64_t classes, int64_t scores_stride, Address scale,
               int rule, float threshold, int64_t exit_number, Address ids, int64_t out_rows, Address confidence,
               Address prediction, Address exit, Address log_probs, Address keep, int threads) {
  py::gil_scoped_release unlocked;
  const e2cm::Departure departure{static_cast<e2cm::Rule>(rule), threshold, exit_number, at<const int64_t>(ids)};
  const e2cm::Answers out{
      out_rows, classes, at<float>(confidence), at<int64_t>(prediction), at<int64_t>(exit), at<float>(log_probs)};
  return e2cm::decide(rows_at(scores, scores_dtype, rows, classes, scores_stride), at<const float>(scale), departure,
                      out, at<int64_t>(keep), threads);
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

// Number of the device, and of a stream of it. The runtime that is linked in knows nothing of what torch has told its
// own.
using Place = std::pair<int, Address>;

cudaStream_t stream_at(const Place& place) {
  check(cudaSetDevice(place.first), "cudaSetDevice");
  return reinterpret_cast<cudaStream_t>(place.second);
}

// Rule, threshold, number of the exit, ids, stays, bad_ids; are rows marked. Without: every row is answered.
using CudaDeparture = std::optional<std::tuple<int, float, int64_t, Address, Address, Address, bool>>;
// Rows; confidence, prediction, exit, log_probs.
using CudaAnswers = std::tuple<int64_t, Address, Address, Address, Address>;

e2cm::cuda::Epilogue epilogue_at(const CudaAnswers& answers, int64_t classes, const CudaDeparture& departure) {
  const auto [rows, confidence, prediction, exit, log_probs] = answers;
  e2cm::cuda::Epilogue epilogue{};
  epilogue.out = {
      rows, classes, at<float>(confidence), at<int64_t>(prediction), at<int64_t>(exit), at<float>(log_probs)};
  if (departure) {
    const auto [rule, threshold, number, ids, stays, bad_ids, marked] = *departure;
    epilogue.ids = at<const int64_t>(ids);
    epilogue.rule = static_cast<e2cm::Rule>(rule);
    epilogue.threshold = threshold;
    epilogue.exit_number = number;
    epilogue.stays = at<uint8_t>(stays);
    epilogue.marked = marked;
    epilogue.bad_ids = at<int64_t>(bad_ids);
  }
  return epilogue;
}

e2cm::cuda::Exit exit_at(const X& x, const Statistics& statistics, Address vectors, int64_t classes, int64_t dim,
                         bool squares) {
  e2cm::cuda::Exit exit{};
  exit.statistics = statistics.has_value();
  if (statistics)
    exit.pooled = pooled_at(x, *statistics);
  else
    exit.x = rows_at(x.data, x.dtype, x.rows, x.dim, x.stride);
  exit.vectors = rows_at(vectors, static_cast<int>(e2cm::DType::f32), classes, dim, dim);
  exit.squares = squares;
  return exit;
}

int64_t cuda_exit_workspace(int64_t rows, int64_t classes, int64_t dim, const Statistics& statistics) {
  return e2cm::cuda::exit_workspace(exit_at({0, 0, rows, dim, dim}, statistics, 0, classes, dim, true));
}

void cuda_exit(Address x, int x_dtype, int64_t rows, int64_t dim, int64_t x_stride, const Statistics& statistics,
               Address vectors, int64_t classes, int64_t vectors_dim, bool squares, Address center, Address per_class,
               Address distances, const CudaAnswers& answers, const CudaDeparture& departure, Address workspace,
               const Place& place) {
  py::gil_scoped_release unlocked;
  e2cm::cuda::Exit exit =
      exit_at({x, x_dtype, rows, dim, x_stride}, statistics, vectors, classes, vectors_dim, squares);
  exit.center = at<const float>(center);
  exit.per_class = at<const float>(per_class);
  exit.distances = at<float>(distances);
  exit.epilogue = epilogue_at(answers, classes, departure);
  check(e2cm::cuda::launch_exit(exit, at<void>(workspace), stream_at(place)), "the exit step");
}

void cuda_decide(Address scores, int scores_dtype, int64_t rows, int64_t classes, int64_t scores_stride, Address scale,
                 const CudaAnswers& answers, const CudaDeparture& departure, const Place& place) {
  py::gil_scoped_release unlocked;
  check(e2cm::cuda::launch_decide(rows_at(scores, scores_dtype, rows, classes, scores_stride), at<const float>(scale),
                                  epilogue_at(answers, classes, departure), stream_at(place)),
        "decide");
}

int64_t cuda_statistics_workspace(int64_t rows, const Numbers& statistics) {
  const e2cm::Pooled pooled = pooled_at({0, 0, rows, 0, 0}, statistics);
  return e2cm::cuda::statistics_workspace(rows, pooled.maps.channels, pooled.wanted);
}

void cuda_statistics(Address x, int x_dtype, int64_t rows, int64_t dim, int64_t x_stride, const Numbers& statistics,
                     Address out, Address workspace, const Place& place) {
  const e2cm::Pooled pooled = pooled_at({x, x_dtype, rows, dim, x_stride}, statistics);
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
  e2cm::isa_in_use();  // a wrong E2CM_ISA is told at import, not in the middle of the first batch

  m.def("class_distances", &class_distances, "Distances of all rows to all means, [rows, classes] float32.",
        py::arg("x"), py::arg("x_dtype"), py::arg("rows"), py::arg("dim"), py::arg("x_stride"), py::arg("means"),
        py::arg("means_dtype"), py::arg("classes"), py::arg("center"), py::arg("packed"), py::arg("out"),
        py::arg("threads"));
  m.def("packed_bytes", &e2cm::packed_bytes, "Room that pack needs; 0: there is nothing to be made.",
        py::arg("classes"), py::arg("dim"));
  m.def("pack", &pack, "Means or weights in the form that rows are multiplied with.", py::arg("vectors"),
        py::arg("dtype"), py::arg("classes"), py::arg("dim"), py::arg("center"), py::arg("packed"), py::arg("threads"));
  m.def("sampled_hash", &sampled_hash, "If this differs, so does the memory.", py::arg("data"), py::arg("bytes"));
  m.def("statistics", &statistics, "Statistics of all rows, float32.", py::arg("x"), py::arg("x_dtype"),
        py::arg("rows"), py::arg("dim"), py::arg("x_stride"), py::arg("statistics"), py::arg("out"),
        py::arg("threads"));
  m.def("class_scores", &class_scores, "Confidence, prediction and log-probabilities of all rows.", py::arg("x"),
        py::arg("x_dtype"), py::arg("rows"), py::arg("dim"), py::arg("x_stride"), py::arg("means"),
        py::arg("means_dtype"), py::arg("classes"), py::arg("means_dim"), py::arg("center"), py::arg("packed"),
        py::arg("scale"), py::arg("confidence"), py::arg("prediction"), py::arg("log_probs"), py::arg("statistics"),
        py::arg("threads"));
  m.def("linear_scores", &linear_scores, "class_scores of a linear head.", py::arg("x"), py::arg("x_dtype"),
        py::arg("rows"), py::arg("dim"), py::arg("x_stride"), py::arg("weight"), py::arg("weight_dtype"),
        py::arg("classes"), py::arg("weight_dim"), py::arg("packed"), py::arg("bias"), py::arg("confidence"),
        py::arg("prediction"), py::arg("log_probs"), py::arg("statistics"), py::arg("threads"));
  m.def("exit_step", &exit_step, "Answers of the rows that leave; returns how many stay, their numbers in keep.",
        py::arg("x"), py::arg("x_dtype"), py::arg("rows"), py::arg("dim"), py::arg("x_stride"), py::arg("means"),
        py::arg("means_dtype"), py::arg("classes"), py::arg("means_dim"), py::arg("center"), py::arg("packed"),
        py::arg("scale"), py::arg("rule"), py::arg("threshold"), py::arg("exit_number"), py::arg("ids"),
        py::arg("out_rows"), py::arg("confidence"), py::arg("prediction"), py::arg("exit"), py::arg("log_probs"),
        py::arg("keep"), py::arg("statistics"), py::arg("threads"));
  m.def("linear_step", &linear_step, "exit_step of a linear head.", py::arg("x"), py::arg("x_dtype"), py::arg("rows"),
        py::arg("dim"), py::arg("x_stride"), py::arg("weight"), py::arg("weight_dtype"), py::arg("classes"),
        py::arg("weight_dim"), py::arg("packed"), py::arg("bias"), py::arg("rule"), py::arg("threshold"),
        py::arg("exit_number"), py::arg("ids"), py::arg("out_rows"), py::arg("confidence"), py::arg("prediction"),
        py::arg("exit"), py::arg("log_probs"), py::arg("keep"), py::arg("statistics"), py::arg("threads"));
  m.def("decide", &decide, "exit_step for scores that another head has made.", py::arg("scores"),
        py::arg("scores_dtype"), py::arg("rows"), py::arg("classes"), py::arg("scores_stride"), py::arg("scale"),
        py::arg("rule"), py::arg("threshold"), py::arg("exit_number"), py::arg("ids"), py::arg("out_rows"),
        py::arg("confidence"), py::arg("prediction"), py::arg("exit"), py::arg("log_probs"), py::arg("keep"),
        py::arg("threads"));
  m.def("kept_rows", &kept_rows, "The numbers of the true bytes of mask; returns their count.", py::arg("mask"),
        py::arg("rows"), py::arg("keep"));
  m.def("gather_rows", &gather_rows, "target[i] = source[index[i]], row by row.", py::arg("source"),
        py::arg("row_bytes"), py::arg("source_stride"), py::arg("index"), py::arg("count"), py::arg("target"),
        py::arg("threads"));
#ifdef E2CM_HAVE_CUDA
  m.def("cuda_exit_workspace", &cuda_exit_workspace, "Bytes that cuda_exit needs.", py::arg("rows"), py::arg("classes"),
        py::arg("dim"), py::arg("statistics"));
  m.def("cuda_exit", &cuda_exit, "A head's distances, scores or departures on a CUDA stream.", py::arg("x"),
        py::arg("x_dtype"), py::arg("rows"), py::arg("dim"), py::arg("x_stride"), py::arg("statistics"),
        py::arg("vectors"), py::arg("classes"), py::arg("vectors_dim"), py::arg("squares"), py::arg("center"),
        py::arg("per_class"), py::arg("distances"), py::arg("answers"), py::arg("departure"), py::arg("workspace"),
        py::arg("place"));
  m.def("cuda_decide", &cuda_decide, "decide on a CUDA stream.", py::arg("scores"), py::arg("scores_dtype"),
        py::arg("rows"), py::arg("classes"), py::arg("scores_stride"), py::arg("scale"), py::arg("answers"),
        py::arg("departure"), py::arg("place"));
  m.def("cuda_statistics_workspace", &cuda_statistics_workspace, "Bytes that cuda_statistics needs.", py::arg("rows"),
        py::arg("statistics"));
  m.def("cuda_statistics", &cuda_statistics, "statistics on a CUDA stream.", py::arg("x"), py::arg("x_dtype"),
        py::arg("rows"), py::arg("dim"), py::arg("x_stride"), py::arg("statistics"), py::arg("out"),
        py::arg("workspace"), py::arg("place"));
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
