#include "perturbed_pointwise.h"

#include <algorithm>

#include "threads.h"

namespace fbk {

void perturbed_pointwise_cpu(const PerturbedPointwiseParams& p, Simd simd, int threads) {
  constexpr int64_t block = 1024;  // units; a multiple of the 128 that share a Rademacher counter
  int64_t units = p.window.units(), blocks = (units + block - 1) / block, tasks = p.samples * blocks;
  threads = int(std::min<int64_t>({threads, omp_get_num_procs(), (tasks + (p.dz ? p.rows * blocks : 0)) / 8 + 1}));
  // the first samples, which are perturbed, cost the most; the blocks of one read the same lines
  int64_t chunk = std::max<int64_t>(std::min(blocks, tasks / (4 * threads)), 1);
#pragma omp parallel for schedule(static, chunk) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    int64_t first = task % blocks * block;
    FBK_SIMD_CALL(simd, perturbed_pointwise(p, task / blocks, first, std::min(first + block, units)));
  }
}

void unpool_cpu(const UnpoolParams& p, Simd simd, int threads) {
  threads = int(std::min<int64_t>({threads, omp_get_num_procs(), p.samples}));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < p.samples; ++n) FBK_SIMD_CALL(simd, unpool(p, n));
}

}  // namespace fbk
