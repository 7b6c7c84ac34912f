#include "ridge_gain.h"

#include <stdexcept>

namespace fbk {

// One thread: at m = 100, N = 64 it takes as long as a few forks.
void ridge_gain_cpu(const RidgeGainParams& p, Simd simd) {
  if (!FBK_SIMD_CALL(simd, ridge_gain(p)))
    throw std::runtime_error("V is not positive definite in float64: regressors too large for gamma, or not finite");
}

}  // namespace fbk
