// Transposition of a matrix of any storage type to float32, in squares of lanes x lanes in registers.
//
// Reads and writes each element once, but for the last square of a row or column, which is moved back and overlaps its
// neighbour. No arithmetic.

namespace e2cm {
namespace {

// A vector of each of `rows` rows, transposed; zeros for the missing rows.
template <class Source>
void load_transposed(const Source* source, int64_t stride, int64_t rows, Vec (&square)[Vec::lanes]) {
  E2CM_UNROLL for (int v = 0; v < Vec::lanes; ++v) {
    square[v] = v < rows ? Vec::load_as(source + v * stride) : Vec::zero();
  }
  transpose_square(square);
}

// Fewer rows than lanes, a contiguous target: what a vector writes too much is overwritten by the next one.
template <class Source>
void transpose_narrow(const Source* source, int64_t stride, int64_t rows, int64_t columns, float* target) {
  for (int64_t begin = 0; begin < columns; begin += Vec::lanes) {
    const int64_t j = minimum(begin, columns - Vec::lanes);
    Vec square[Vec::lanes];
    load_transposed(source + j, stride, rows, square);
    E2CM_UNROLL for (int v = 0; v < Vec::lanes; ++v) {
      float* const to = target + (j + v) * rows;
      if ((columns - j - v) * rows >= Vec::lanes) {
        Vec::store(to, square[v]);
      } else {
        float last[Vec::lanes];
        Vec::store(last, square[v]);
        std::memcpy(to, last, rows * sizeof(float));
      }
    }
  }
}

template <class Source>
void transpose_as(const Source* source, int64_t stride, int64_t rows, int64_t columns, float* target,
                  int64_t target_stride) {
  if (rows < Vec::lanes && columns >= Vec::lanes && target_stride == rows)
    return transpose_narrow(source, stride, rows, columns, target);
  if (rows < Vec::lanes || columns < Vec::lanes) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) target[j * target_stride + i] = to_float(source[i * stride + j]);
    return;
  }
  for (int64_t at = 0; at < rows; at += Vec::lanes) {
    const int64_t i = minimum(at, rows - Vec::lanes);
    for (int64_t begin = 0; begin < columns; begin += Vec::lanes) {
      const int64_t j = minimum(begin, columns - Vec::lanes);
      Vec square[Vec::lanes];
      load_transposed(source + i * stride + j, stride, Vec::lanes, square);
      E2CM_UNROLL for (int v = 0; v < Vec::lanes; ++v) Vec::store(target + (j + v) * target_stride + i, square[v]);
    }
  }
}

void transpose(const void* source, DType dtype, int64_t stride, int64_t rows, int64_t columns, float* target,
               int64_t target_stride) {
  visit(source, dtype, [&](const auto* typed) { transpose_as(typed, stride, rows, columns, target, target_stride); });
}

}  // namespace
}  // namespace e2cm
