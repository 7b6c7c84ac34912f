#include <omp.h>

#include <algorithm>
#include <string_view>

#include "noise.h"

namespace fbk {

namespace scalar {

template <NoiseKind kind>
static void run(const NoiseParams& p, int64_t first, int64_t last) {
  for (int64_t t = first * threads_per_counter<kind>; t < last * threads_per_counter<kind>; ++t)
    noise_thread<kind>(p, t);
}

}  // namespace scalar

#ifdef __x86_64__
namespace avx2 {
void gaussian(const NoiseParams& p, int64_t first, int64_t last);
void rademacher(const NoiseParams& p, int64_t first, int64_t last);
}  // namespace avx2
namespace avx512 {
void gaussian(const NoiseParams& p, int64_t first, int64_t last);
void rademacher(const NoiseParams& p, int64_t first, int64_t last);
}  // namespace avx512
#endif

void noise_cpu(const NoiseParams& p, NoiseKind kind, const char* simd, int threads) {
  bool gaussian = kind == NoiseKind::gaussian;
  auto body = gaussian ? scalar::run<NoiseKind::gaussian> : scalar::run<NoiseKind::rademacher>;
#ifdef __x86_64__
  std::string_view path = simd;
  if (path == "avx2") body = gaussian ? avx2::gaussian : avx2::rademacher;
  if (path == "avx512") body = gaussian ? avx512::gaussian : avx512::rademacher;
#else
  (void)simd;
#endif
  int64_t counters = p.samples * p.per_sample(kind);
  int64_t block = gaussian ? 1024 : 32;  // 16 KiB of output, about what one thread writes in the 5 us a fork costs
  threads = int(std::min<int64_t>({threads, omp_get_num_procs(), (counters + block - 1) / block}));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t first = 0; first < counters; first += block) body(p, first, std::min(first + block, counters));
}

}  // namespace fbk
