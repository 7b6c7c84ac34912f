#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

// float64 linear algebra of the ridge regression, for *_simd.cpp.
namespace fbk {

FBK_INLINE f64v get(const double* from, int64_t n) { return n == bytes / 8 ? load(from) : load(from, n); }
FBK_INLINE void put(double* to, f64v v, int64_t n) { n == bytes / 8 ? store(to, v) : store(to, v, n); }
FBK_INLINE void narrow(float* to, f64v v, int64_t n) {
  typedef float f32h __attribute__((vector_size(bytes / 2)));
  f32h half = __builtin_convertvector(v, f32h);
  if (n == bytes / 8)
    memcpy(to, &half, sizeof half);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = half[i];
}

// y <- y + a x over n elements
FBK_INLINE void add_scaled(double* y, double a, const double* x, int64_t n) {
  constexpr int width = bytes / 8;
  int64_t i = 0;
  for (; i + width <= n; i += width) store(y + i, mul_add(broadcast(a), load(x + i), load(y + i)));
  if (i < n) store(y + i, mul_add(broadcast(a), load(x + i, n - i), load(y + i, n - i)), n - i);
}

// A [n, n] symmetric, is overwritten; inverse <- L^-1, lower triangular, of A = L L^T. Elimination on [A | I].
// False where A is not positive definite.
FBK_INLINE bool inverse_cholesky(double* A, double* inverse, int64_t n) {
  memset(inverse, 0, size_t(n * n) * sizeof(double));
  for (int64_t k = 0; k < n; ++k) {
    double* row = A + k * n;
    double* own = inverse + k * n;
    if (!(row[k] > 0)) return false;
    double scale = 1 / std::sqrt(row[k]);
    own[k] = 1;
    for (int64_t j = k; j < n; ++j) row[j] *= scale;
    for (int64_t j = 0; j <= k; ++j) own[j] *= scale;
    for (int64_t i = k + 1; i < n; ++i) {
      add_scaled(A + i * n + i, -row[i], row + i, n - i);
      add_scaled(inverse + i * n, -row[i], own, k + 1);
    }
  }
  return true;
}

}  // namespace fbk
