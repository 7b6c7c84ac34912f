#pragma once

#include <cstdint>

#include "dispatch.h"

namespace fbk {

// One batch of recursive least squares (SPEC 4): V <- beta^N V + (1 - beta^N) gamma I + R^T D R with
// D = diag(beta^(N-1), ..., 1), Q = D R V^-1, M = R^T Q, G = w * Q. Statistics and solve are float64. On a GPU all but
// w may have groups as their first dimension.
struct RidgeGainParams {
  const float *R, *w;  // [samples, m], [samples]
  const double* V;     // [m, m]
  double* V_out;       // likewise, on the CPU not V
  float *Q, *M, *G;    // [samples, m], [m, m], [samples, m]; on a GPU M and G, with it w, may be null
  double* scratch;     // [3 samples + 2 m, m]
  double gamma, forgetting;
  int64_t samples, m, groups;
  // on a GPU: parts of the samples for the blocks to share, at most samples / m; 1 where no gain is finite, or null
  int64_t slices = 1;
  int* failed = nullptr;
};

// std::runtime_error where V is not positive definite in float64
void ridge_gain_cpu(const RidgeGainParams& params, Simd simd);
// no exception there, which would need a look from the host: no finite gain
void ridge_gain_cuda(const RidgeGainParams& params, int device, void* stream);

FBK_SIMD_DECLARE(bool ridge_gain(const RidgeGainParams&))

}  // namespace fbk
