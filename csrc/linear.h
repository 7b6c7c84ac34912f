#pragma once

#include "pointwise.h"

namespace fbk {

// z = x W^T and q = p W^T, and what follows them.
struct LinearParams {
  const float *x, *p;   // [samples, inputs], [rows, inputs] or null where both streams are still the same
  const float* weight;  // [units, inputs]
  int64_t inputs;
  PointwiseParams behind;  // of maps of one place, without pooling; of z and q only whether q is null is read
};

void linear_cuda(const LinearParams& params, int device, void* stream);

}  // namespace fbk
