#include <algorithm>

#include "noise.h"
#include "threads.h"

namespace fbk {

void noise_cpu(const NoiseParams& p, NoiseKind kind, Simd simd, int threads) {
  int64_t counters = p.samples * p.per_sample(kind);
  // 16 KiB of output, about what one thread writes in the 5 us a fork costs
  int64_t block = kind == NoiseKind::gaussian ? 1024 : 32;
  threads = int(std::min<int64_t>({threads, omp_get_num_procs(), (counters + block - 1) / block}));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t first = 0; first < counters; first += block)
    FBK_SIMD_CALL(simd, noise(p, kind, first, std::min(first + block, counters)));
}

}  // namespace fbk
