#pragma once

#include <cmath>

#include "matmul_cuda.h"
#include "ridge_gain.h"

namespace fbk {

constexpr int panel = 32, inverse_pitch = panel + 1;
constexpr size_t ridge_gain_shared = (panel * inverse_pitch + 2 * panel * pitch) * sizeof(double);
static_assert(product_size <= 2 * panel * pitch && panel * inverse_pitch <= panel * pitch);

__device__ inline int64_t tiles(int64_t n) { return (n + tile - 1) / tile; }

__device__ inline Rows<double> row_of(const double* matrix, int64_t m, int64_t first, int64_t rows, int64_t from,
                                      int64_t depth) {
  const int64_t row = first + threadIdx.x / 4;
  return {row < rows ? matrix + row * m + from : nullptr, depth};
}

// emit(i, j, four sums over the rows n of A[n, i] B[n, j .. j + 3]) of all i and j, of m rows and columns. The sums of
// slices of the rows stand in `parts`, of n m numbers, until all are there.
template <class Emit>
__device__ inline void moments(const Team& team, const double* A, const double* B, int64_t n, int64_t m, int64_t slices,
                               double* parts, double* shared, Emit emit) {
  const int64_t side = tiles(m), depth = (n + slices - 1) / slices;
  for (int64_t job = team.rank; job < slices * side * side; job += team.size) {
    const int64_t slice = job / (side * side), i0 = job / side % side * tile, j0 = job % side * tile;
    const int64_t first = slice * depth, rest = n - first < depth ? n - first : depth;
    Sums<double> sum{};
    product(sum, Columns<double>{A + first * m + i0, m, rest, m - i0},
            Columns<double>{B + first * m + j0, m, rest, m - j0}, rest, shared);
    for (int64_t i = i0 + own_row(), r = 0; r < 4 && i + r < m; ++r) {
      const int64_t j = j0 + own_column();
      if (slices == 1)
        emit(i + r, j, sum[r]);
      else
        store_quad(parts + (slice * m + i + r) * m + j, sum[r], m - j);
    }
  }
  if (slices == 1) return;
  team.sync();
  const int64_t quads = (m + 3) / 4;
  for (int64_t at = team.rank * threads + threadIdx.x; at < m * quads; at += team.size * threads) {
    const int64_t i = at / quads, j = at % quads * 4;
    Quad<double> sum{};
    for (int64_t slice = 0; slice < slices; ++slice) {
      const Quad<double> part = load_quad(parts + (slice * m + i) * m + j, m - j);
      for (int c = 0; c < 4; ++c) sum.v[c] += part.v[c];
    }
    emit(i, j, sum);
  }
}

// X <- L^-1 of the diagonal block A = L L^T at k0, by elimination on [A | I]; not-a-number from a pivot on that is not
// positive. `work` is as large as X.
__device__ inline void invert_factor(const double* A, int64_t m, int64_t k0, double* X, double* work) {
  const int i = int(threadIdx.x) / 8, first = int(threadIdx.x) % 8;
  for (int j = first; j < panel; j += 8) {
    const bool inside = k0 + i < m && k0 + j < m;
    work[i * inverse_pitch + j] = inside ? A[(k0 + i) * m + k0 + j] : i == j;
    X[i * inverse_pitch + j] = i == j;
  }
  auto positive = [](double pivot) { return pivot > 0 && pivot < INFINITY ? pivot : double(NAN); };
  for (int k = 0; k < panel; ++k) {
    __syncthreads();
    const double factor = work[i * inverse_pitch + k] / positive(work[k * inverse_pitch + k]);
    for (int j = first; i > k && j < panel; j += 8) {
      double* row = j > k ? work : X;
      row[i * inverse_pitch + j] -= factor * row[k * inverse_pitch + j];
    }
  }
  const double scale = 1 / ::sqrt(positive(work[i * inverse_pitch + i]));
  for (int j = first; j < panel; j += 8) X[i * inverse_pitch + j] *= scale;
}

// a <- 64 rows of A at the panel
__device__ inline void load_panel(const double* A, int64_t m, int64_t first, int64_t rows, int64_t k0, double* a) {
  const Rows<double> own = row_of(A, m, first, rows, k0, m - k0);
  for (int k = 0; k < panel; k += chunk) own.put(a + k * pitch, own.fetch(k));
}

// a <- a X^T or, backwards, a X; and the rows go to `to`, unless it is null
template <bool backwards>
__device__ inline void solve(double* a, const double* X) {
  const int row = int(threadIdx.x) % tile, first = int(threadIdx.x) / tile * 8;
  double sum[8] = {};
  __syncthreads();
  for (int k = 0; k < panel; ++k) {
    const double x = a[k * pitch + row];
    for (int c = 0; c < 8; ++c)
      sum[c] += x * (backwards ? X[k * inverse_pitch + first + c] : X[(first + c) * inverse_pitch + k]);
  }
  __syncthreads();
  for (int c = 0; c < 8; ++c) a[(first + c) * pitch + row] = sum[c];
  __syncthreads();
}

// emit(row, column, number) of the panel a, column by column of a row
template <class Emit>
__device__ inline void each(const double* a, int64_t first, int64_t rows, int64_t k0, int64_t m, Emit emit) {
  const int k = int(threadIdx.x) % panel;
  for (int64_t i = threadIdx.x / panel; i < tile && first + i < rows && k0 + k < m; i += threads / panel)
    emit(first + i, k0 + k, a[k * pitch + i]);
}

// the tile of A [rows, m] at (i0, j0) -= a^T b
__device__ inline void subtract(double* A, int64_t m, int64_t i0, int64_t rows, int64_t j0, const double* a,
                                const double* b) {
  Sums<double> sum{};
  multiply(sum, a, b, panel);
  const int64_t j = j0 + own_column();
  for (int64_t i = i0 + own_row(), r = 0; r < 4 && i + r < rows; ++r) {
    Quad<double> at = load_quad(A + (i + r) * m + j, m - j);
    for (int c = 0; c < 4; ++c) at.v[c] -= sum[r].v[c];
    store_quad(A + (i + r) * m + j, at, m - j);
  }
}

// V = L L^T in panels, the weighted regressors D R as further rows below V: they become Y = D R L^-T on the way, and
// Q = Y L^-1 on the way back. A step reads the panel k and writes what lies beyond it, so one barrier of all blocks
// parts it from the next; each block inverts the panel's diagonal block and solves the rows that it needs for itself.
__device__ inline void ridge_gain(const RidgeGainParams& p, const Team& team, int64_t group, char* shared) {
  const int64_t n = p.samples, m = p.m;
  double* X = reinterpret_cast<double*>(shared);
  double *a = X + panel * inverse_pitch, *b = a + panel * pitch;
  double *exact = p.scratch + group * (3 * n + 2 * m) * m, *Y = exact + n * m, *Z = Y + n * m, *S = Z + n * m,
         *L = S + m * m;
  const float* R = p.R + group * n * m;
  float *Q = p.Q + group * n * m, *G = p.G + group * n * m, *M = p.M + group * m * m;
  const double *V = p.V + group * m * m, keep = ::pow(p.forgetting, double(n));
  double* V_out = p.V_out + group * m * m;

  for (int64_t at = team.rank * threads + threadIdx.x; at < n * m; at += team.size * threads) {
    exact[at] = double(R[at]);
    Y[at] = p.forgetting < 1 ? exact[at] * ::pow(p.forgetting, double(n - 1 - at / m)) : exact[at];
  }
  team.sync();
  moments(team, exact, Y, n, m, p.slices, Z, a, [&](int64_t i, int64_t j, Quad<double> sum) {
    const Quad<double> old = load_quad(V + i * m + j, m - j);
    for (int c = 0; c < 4; ++c) sum.v[c] += keep * old.v[c] + (i == j + c ? (1 - keep) * p.gamma : 0);
    store_quad(V_out + i * m + j, sum, m - j);
    store_quad(S + i * m + j, sum, m - j);
  });

  for (int64_t k0 = 0; k0 < m; k0 += panel) {
    team.sync();
    const int64_t k1 = k0 + panel, left = m > k1 ? m - k1 : 0, side = tiles(left), columns = side > 0 ? side : 1;
    const int64_t jobs = (side + tiles(n)) * columns;
    if (team.rank < jobs || team.rank == 0) invert_factor(S, m, k0, X, a);
    if (team.rank == 0) {
      __syncthreads();
      for (int i = int(threadIdx.x) / panel, j = int(threadIdx.x) % panel; i < panel; i += threads / panel)
        if (k0 + i < m && k0 + j < m) L[(k0 + i) * m + k0 + j] = X[i * inverse_pitch + j];
    }
    for (int64_t job = team.rank; job < jobs; job += team.size) {
      const int64_t row = job / columns, column = job % columns, j0 = k1 + column * tile;
      const bool sample = row >= side;
      if (!sample && column > row) continue;
      const int64_t i0 = sample ? (row - side) * tile : k1 + row * tile, rows = sample ? n : m;
      __syncthreads();
      load_panel(sample ? Y : S, m, i0, rows, k0, a);
      if (left > 0) load_panel(S, m, j0, m, k0, b);
      solve<false>(a, X);
      if (column == 0)
        each(a, i0, rows, k0, m, [&](int64_t i, int64_t k, double v) { (sample ? Z : L)[i * m + k] = v; });
      if (left == 0) continue;
      solve<false>(b, X);
      subtract(sample ? Y : S, m, i0, rows, j0, a, b);
    }
  }
  for (int64_t k0 = (m - 1) / panel * panel; k0 >= 0; k0 -= panel) {
    team.sync();
    const int64_t columns = k0 > 0 ? tiles(k0) : 1;
    for (int64_t job = team.rank; job < tiles(n) * columns; job += team.size) {
      const int64_t i0 = job / columns * tile, column = job % columns, j0 = column * tile;
      __syncthreads();
      load_panel(Z, m, i0, n, k0, a);
      for (int i = int(threadIdx.x) / panel, j = int(threadIdx.x) % panel; i < panel; i += threads / panel)
        X[i * inverse_pitch + j] = k0 + i < m && k0 + j < m ? L[(k0 + i) * m + k0 + j] : 0;
      solve<true>(a, X);
      if (column == 0)
        each(a, i0, n, k0, m, [&](int64_t i, int64_t k, double q) {
          Y[i * m + k] = q, Q[i * m + k] = float(q);
          if (p.G) G[i * m + k] = float(double(p.w[i]) * q);
          if (p.failed && q - q != 0) *p.failed = 1;
        });
      if (k0 == 0) continue;
      const Columns<double> above{L + k0 * m + j0, m, m - k0 < panel ? m - k0 : panel, k0 - j0};
      for (int k = 0; k < panel; k += chunk) above.put(b + k * pitch, above.fetch(k));
      __syncthreads();
      subtract(Z, m, i0, n, j0, a, b);
    }
  }
  team.sync();
  if (!p.M) return;
  moments(team, exact, Y, n, m, p.slices, Z, a, [&](int64_t i, int64_t j, const Quad<double>& sum) {
    Quad<float> rounded;
    for (int c = 0; c < 4; ++c) rounded.v[c] = float(sum.v[c]);
    store_quad(M + i * m + j, rounded, m - j);
  });
}

}  // namespace fbk
