#pragma once

#include "matmul_cuda.h"
#include "noise.h"

// Tiles of 64 x 64 in shared memory.
namespace fbk {

// to[s][u], or to[u][s], is the noise of the samples from n on and the units from u0 on; zero from sample `rows` on
template <bool units_first>
__device__ inline void regenerate(const NoiseParams& noise, NoiseKind kind, int64_t n, int64_t rows, int64_t u0,
                                  float* to) {
  const int u = own_column();
  for (int s = int(threadIdx.x) / 16; s < tile; s += threads / 16) {
    Quad<float> xi{};
    if (n + s < rows) xi = noise_quad(noise, kind, n + s, u0 + u);
    if constexpr (units_first)
      for (int i = 0; i < 4; ++i) to[(u + i) * pitch + s] = xi.v[i];
    else
      *reinterpret_cast<Quad<float>*>(to + s * pitch + u) = xi;
  }
}

// up to 64 rows of a matrix of m columns, from column c on; zero beyond its edges
__device__ inline void load_tile(const float* from, int64_t rows, int64_t m, int64_t c, float* to) {
  c += own_column();
  for (int k = int(threadIdx.x) / 16; k < tile; k += threads / 16)
    *reinterpret_cast<Quad<float>*>(to + k * pitch + own_column()) =
        k < rows ? load_quad(from + k * m + c, m - c) : Quad<float>{};
}

__device__ inline void store_tile(const Sums<float>& sum, float* to, int64_t rows, int64_t m, int64_t c) {
  c += own_column();
  for (int i = 0; i < 4; ++i)
    if (own_row() + i < rows) store_quad(to + (own_row() + i) * m + c, sum[i], m - c);
}

}  // namespace fbk
