#include "pointwise.h"

#include <omp.h>

#include <algorithm>

namespace fbk {

void pointwise_cpu(const PointwiseParams& p, Simd simd, int threads) {
  constexpr int64_t block = 1024;  // units; a multiple of the 128 that share a Rademacher counter
  int64_t units = p.window.units(), blocks = (units + block - 1) / block;
  int64_t tasks = (p.samples + (p.q ? p.rows : 0)) * blocks;
  threads = int(std::min<int64_t>({threads, omp_get_num_procs(), tasks / 8 + 1}));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    int64_t row = task / blocks, first = task % blocks * block, last = std::min(first + block, units);
    bool perturbed = row >= p.samples;
    FBK_SIMD_CALL(simd, pointwise(p, perturbed, perturbed ? row - p.samples : row, first, last));
  }
}

void unpool_cpu(const UnpoolParams& p, Simd simd, int threads) {
  threads = int(std::min<int64_t>({threads, omp_get_num_procs(), p.samples}));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < p.samples; ++n) FBK_SIMD_CALL(simd, unpool(p, n));
}

}  // namespace fbk
