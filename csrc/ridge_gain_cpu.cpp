#include "ridge_gain.h"

namespace fbk {

// One thread: at m = 100, N = 64 it takes as long as a few forks.
void ridge_gain_cpu(const RidgeGainParams& p, Simd simd) { FBK_SIMD_CALL(simd, ridge_gain(p)); }

}  // namespace fbk
