#pragma once

#include "cuda.h"
#include "pointwise.h"
#include "quad.h"

namespace fbk {

// Four units of one stream from u on: z before the activation, v behind it and the pooling. Where the perturbed stream
// branches off here, of both.
__device__ __forceinline__ void store_activity(const PointwiseParams& p, bool perturbed, int64_t row, int64_t u,
                                               const Quad<float>& z, const Quad<float>& v) {
  const int64_t units = p.window.units(), at = row * units + u, count = units - u;
  if (!perturbed) {
    store_quad(static_cast<float*>(p.h) + at, v, count);
    if (p.kept) store_quad(static_cast<float*>(p.kept) + at, z, count);
    if (p.q || row >= p.noise_rows) return;
  }
  const bool negative = row >= p.noise_rows;
  const Quad<float> xi = noise_quad(p.noise, p.kind, negative ? row - p.noise_rows : row, u);
  Quad<float> noisy, mirrored;
  for (int i = 0; i < 4; ++i) {
    noisy.v[i] = add(v.v[i], negative ? -xi.v[i] : xi.v[i]);
    mirrored.v[i] = add(v.v[i], -xi.v[i]);
  }
  float* to = static_cast<float*>(p.p) + at;
  store_quad(to, noisy, count);
  if (!perturbed && p.rows > p.noise_rows) store_quad(to + p.noise_rows * units, mirrored, count);
}

}  // namespace fbk
