#pragma once

#include "pointwise.h"

namespace fbk {

// z = x W^T and dz = dx W^T, and what follows them.
struct LinearParams {
  const float *x, *dx;  // [samples, inputs], [rows, inputs] or null where it is zero
  const float* weight;  // [units, inputs]
  int64_t inputs;
  PointwiseParams behind;  // of maps of one place, without pooling; z and dz are not read
};

void linear_cuda(const LinearParams& params, int device, void* stream);

}  // namespace fbk
