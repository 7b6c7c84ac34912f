#include "ridge_gain.h"

#include "cholesky.h"
#include "matmul.h"
#include "simd.h"

namespace fbk::FBK_SIMD {

// C = A B, an element at a time in registers, and handed to emit
template <class Emit>
static FBK_INLINE void product(int64_t rows, int64_t cols, int64_t depth, Strided<double> a, const double* b,
                               Emit emit) {
  outer(0, rows, cols, depth, a, [=](int64_t k) __attribute__((always_inline)) { return b + k * cols; }, emit);
}

bool ridge_gain(const RidgeGainParams& p) {
  const int64_t m = p.m, n = p.samples;
  double *R = p.scratch, *weighted = R + n * m, *Q = weighted + n * m, *S = Q + n * m, *inverse = S + m * m;
  double age = 1;
  for (int64_t i = n - 1; i >= 0; --i, age *= p.forgetting)
    for (int64_t j = 0; j < m; ++j) {
      R[i * m + j] = double(p.R[i * m + j]);
      weighted[i * m + j] = age * R[i * m + j];
    }
  double* V = p.V_out;
  for (int64_t i = 0; i < m * m; ++i) V[i] = age * p.V[i];
  for (int64_t i = 0; i < m; ++i) V[i * m + i] += (1 - age) * p.gamma;
  product(m, m, n, {R, 1, m}, weighted,
          [=](int64_t i, int64_t c, f64v v, int64_t count)
              __attribute__((always_inline)) { put(V + i * m + c, get(V + i * m + c, count) + v, count); });
  memcpy(S, V, size_t(m * m) * sizeof(double));
  if (!inverse_cholesky(S, inverse, m)) return false;
  auto into = [=](double* to) {
    return [=](int64_t i, int64_t c, f64v v, int64_t count)
               __attribute__((always_inline)) { put(to + i * m + c, v, count); };
  };
  product(m, m, m, {inverse, 1, m}, inverse, into(S));  // V^-1 = L^-T L^-1
  product(n, m, m, {weighted, m, 1}, S, into(Q));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      p.Q[i * m + j] = float(Q[i * m + j]);
      p.G[i * m + j] = float(double(p.w[i]) * Q[i * m + j]);
    }
  float* M = p.M;
  product(m, m, n, {R, 1, m}, Q, [=](int64_t i, int64_t c, f64v v, int64_t count) __attribute__((always_inline)) {
    narrow(M + i * m + c, v, count);
  });
  return true;
}

}  // namespace fbk::FBK_SIMD
