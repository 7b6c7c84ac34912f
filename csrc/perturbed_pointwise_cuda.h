#pragma once

#include "cuda.h"
#include "perturbed_pointwise.h"
#include "quad.h"

namespace fbk {

// Four units of a sample from u on: z before the activation, v behind it and the pooling.
__device__ __forceinline__ void store_activity(const PerturbedPointwiseParams& p, int64_t sample, int64_t u,
                                               const Quad<float>& z, const Quad<float>& v) {
  const int64_t units = p.window.units(), at = sample * units + u, count = units - u;
  store_quad(static_cast<float*>(p.h) + at, v, count);
  if (p.kept) store_quad(static_cast<float*>(p.kept) + at, z, count);
}

// Of the difference: `change` is that of v.
__device__ __forceinline__ void store_difference(const PerturbedPointwiseParams& p, int64_t row, int64_t u,
                                                 const Quad<float>& change, const Quad<float>& xi) {
  const int64_t units = p.window.units();
  const float sign = row < p.noise_rows ? 1.0f : -1.0f;
  Quad<float> d;
  for (int i = 0; i < 4; ++i) d.v[i] = add(change.v[i], sign * xi.v[i]);
  store_quad(static_cast<float*>(p.d) + row * units + u, d, units - u);
}

}  // namespace fbk
