#pragma once

#include <cstdint>

#include "simd.h"

// Matrix products for *_simd.cpp: tiles of accumulators in registers. No element's summation order depends on where its
// tile lies, so results do not depend on how rows and columns are cut into calls and threads.
namespace fbk {

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef f32v type;
};
template <>
struct VectorOf<double> {
  typedef f64v type;
};

// half of the butterfly that swaps bit `half` of the lane with that of the row; a pack, for gcc folds no loop into a
// mask
template <int half, bool upper, int... lane>
FBK_INLINE f32v unzip(f32v a, f32v b) {
  if constexpr (sizeof...(lane) < lanes)
    return unzip<half, upper, lane..., sizeof...(lane)>(a, b);
  else
    return FBK_SHUFFLE(a, b, ((lane & half ? lanes : 0) + (lane & ~half) + (upper ? half : 0))...);
}

// v[i] <- column i of the lanes x lanes matrix whose rows are v
template <int half = 1>
FBK_INLINE void transpose(f32v (&v)[lanes]) {
#pragma GCC unroll 64
  for (int i = 0; i < lanes; ++i)
    if (!(i & half)) {
      f32v low = unzip<half, false>(v[i], v[i + half]), high = unzip<half, true>(v[i], v[i + half]);
      v[i] = low, v[i + half] = high;
    }
  if constexpr (2 * half < lanes) transpose<2 * half>(v);
}

// lane i of the result is the sum of v[i]
template <int half = 1>
FBK_INLINE f32v sums(f32v (&v)[lanes]) {
#pragma GCC unroll 64
  for (int i = 0; i < lanes; i += 2 * half)
    v[i] = unzip<half, false>(v[i], v[i + half]) + unzip<half, true>(v[i], v[i + half]);
  if constexpr (2 * half < lanes) return sums<2 * half>(v);
  return v[0];
}

// to[c * to_stride + r] = from(r)[c]
template <class From>
FBK_INLINE void transpose(int64_t rows, int64_t cols, From from, float* to, int64_t to_stride) {
  for (int64_t c = 0; c < cols; c += lanes)
    for (int64_t r = 0; r < rows; r += lanes) {
      int64_t height = rows - r < lanes ? rows - r : lanes, width = cols - c < lanes ? cols - c : lanes;
      f32v v[lanes];
#pragma GCC unroll 64
      for (int i = 0; i < lanes; ++i) {
        const float* row = from(r + (i < height ? i : height - 1)) + c;
        v[i] = width == lanes ? load(row) : load(row, width);
      }
      transpose(v);
#pragma GCC unroll 64
      for (int i = 0; i < lanes; ++i) {
        if (i >= width) break;
        float* at = to + (c + i) * to_stride + r;
        height == lanes ? store(at, v[i]) : store(at, v[i], height);
      }
    }
}

// Tiles of the dot form: as many accumulators as there are lanes, so that one transposed reduction serves them all.
constexpr int dot_cols = 4, dot_rows = lanes / dot_cols;

// to[i * stride + j] = sum_k A[i, k] B[j, k]: a(i) and b(j) point to rows, of which those of B are read from afar once.
template <class A, class B>
FBK_INLINE void dot(int64_t rows, int64_t cols, int64_t depth, A a, B b, float* to, int64_t stride) {
  constexpr int64_t near = 2 * dot_cols;  // rows of B that the nearest cache keeps
  const int64_t whole = depth / lanes * lanes, rest = depth - whole;
  auto tile = [&](int64_t i0, int64_t j0) __attribute__((always_inline)) {
    // rows beyond the edge repeat the last one
    const float *p[dot_rows], *q[dot_cols];
#pragma GCC unroll 8
    for (int i = 0; i < dot_rows; ++i) p[i] = a(i0 + i < rows ? i0 + i : rows - 1);
#pragma GCC unroll 8
    for (int j = 0; j < dot_cols; ++j) q[j] = b(j0 + j < cols ? j0 + j : cols - 1);
    f32v sum[lanes] = {};
    auto add = [&](auto get) __attribute__((always_inline)) {
      f32v y[dot_cols];
#pragma GCC unroll 8
      for (int j = 0; j < dot_cols; ++j) y[j] = get(q[j]);
#pragma GCC unroll 8
      for (int i = 0; i < dot_rows; ++i) {
        f32v x = get(p[i]);
#pragma GCC unroll 8
        for (int j = 0; j < dot_cols; ++j) sum[i * dot_cols + j] = mul_add(x, y[j], sum[i * dot_cols + j]);
      }
    };
    for (int64_t k = 0; k < whole; k += lanes)
      add([k](const float* row) __attribute__((always_inline)) { return load(row + k); });
    if (rest) add([=](const float* row) __attribute__((always_inline)) { return load(row + whole, rest); });
    float out[lanes];
    store(out, sums(sum));
    for (int i = 0; i < dot_rows && i0 + i < rows; ++i) {
      float* at = to + (i0 + i) * stride + j0;
      if (cols - j0 >= dot_cols)
        memcpy(at, out + i * dot_cols, dot_cols * sizeof(float));
      else
        memcpy(at, out + i * dot_cols, size_t(cols - j0) * sizeof(float));
    }
  };
  for (int64_t j0 = 0; j0 < cols; j0 += near)
    for (int64_t i0 = 0; i0 < rows; i0 += dot_rows)
      for (int64_t j = j0; j < cols && j < j0 + near; j += dot_cols) tile(i0, j);
}

// One factor of the outer form, element (i, k) at data[i * row + k * col].
template <class T>
struct Strided {
  const T* data;
  int64_t row, col;
};

template <int rows, int vectors, bool tail, class T, class B, class Emit>
FBK_INLINE void outer_tile(int64_t i0, int64_t c0, int64_t height, int64_t rest, int64_t depth, Strided<T> a, B b,
                           Emit& emit) {
  using V = typename VectorOf<T>::type;
  constexpr int width = bytes / int(sizeof(T));
  const T* p[rows];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) p[i] = a.data + (i0 + (i < height ? i : height - 1)) * a.row;
  V sum[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const T* from = b(k) + c0;
    V y[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      y[v] = tail && v == vectors - 1 ? load(from + v * width, rest) : load(from + v * width);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      V x = broadcast(p[i][k * a.col]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[i][v] = mul_add(x, y[v], sum[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    if (i >= height) break;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) emit(i0 + i, c0 + v * width, sum[i][v], tail && v == vectors - 1 ? rest : width);
  }
}

template <int vectors, bool tail, class T, class B, class Emit>
FBK_INLINE void outer_columns(int64_t first, int64_t last, int64_t c, int64_t rest, int64_t depth, Strided<T> a, B b,
                              Emit& emit) {
  constexpr int rows = vectors == 1 ? 12 : 6;
  for (int64_t i = first; i < last; i += rows) {
    if (last - i > rows / 2)
      outer_tile<rows, vectors, tail>(i, c, last - i, rest, depth, a, b, emit);
    else
      outer_tile<rows / 2, vectors, tail>(i, c, last - i, rest, depth, a, b, emit);
  }
}

// C[i, :] = sum_k A(i, k) B[k, :] for the rows [first, last) of C: b(k) points to a row, emit(i, c, vector, n) takes
// the n elements from column c on.
template <class T, class B, class Emit>
FBK_INLINE void outer(int64_t first, int64_t last, int64_t cols, int64_t depth, Strided<T> a, B b, Emit emit) {
  constexpr int width = bytes / int(sizeof(T)), most = lanes == 16 ? 4 : 2;
  int64_t c = 0;
  for (; c + most * width <= cols; c += most * width) outer_columns<most, false>(first, last, c, 0, depth, a, b, emit);
  int64_t rest = cols % width;
  if constexpr (most == 4)
    if (c + 2 * width <= cols) {
      outer_columns<2, false>(first, last, c, 0, depth, a, b, emit);
      c += 2 * width;
    }
  if (cols - c > width) {
    outer_columns<2, true>(first, last, c, rest, depth, a, b, emit);
  } else if (cols - c == width) {
    outer_columns<1, false>(first, last, c, 0, depth, a, b, emit);
  } else if (c < cols) {
    outer_columns<1, true>(first, last, c, rest, depth, a, b, emit);
  }
}

}  // namespace fbk
