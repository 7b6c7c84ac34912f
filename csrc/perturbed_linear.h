#pragma once

#include "perturbed_pointwise.h"

namespace fbk {

// z = x W^T and dz = dx W^T, and what follows them.
struct PerturbedLinearParams {
  const float *x, *dx;  // [samples, inputs], [rows, inputs] or null where it is zero
  const float* weight;  // [units, inputs]
  int64_t inputs;
  PerturbedPointwiseParams behind;  // of maps of one place, without pooling; z and dz are not read
};

void perturbed_linear_cuda(const PerturbedLinearParams& params, int device, void* stream);

}  // namespace fbk
