#include "perturbed_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "threads.h"

namespace fbk {

// log sum_k exp(y_k)
static double log_sum(const double* y, int64_t classes) {
  double top = *std::max_element(y, y + classes), sum = 0;
  for (int64_t k = 0; k < classes; ++k) sum += std::exp(y[k] - top);
  return top + std::log(sum);
}

static void sample(const PerturbedCrossEntropyParams& p, int64_t n) {
  int64_t K = p.classes, target = std::max<int64_t>(p.target[n], 0);
  bool counts = p.target[n] != ignored_target, finite = true;
  auto loss = [&](const double* y, double sum) { return p.scale * (counts ? sum - y[target] : 0); };

  const double* y = p.logits + n * K;
  double sum = log_sum(y, K), L = loss(y, sum), factor = counts ? p.scale : p.scale * 0;  // of an infinite scale NaN
  p.losses[n] = float(L);
  for (int64_t k = 0; k < K; ++k) {
    double e = factor * (std::exp(y[k] - sum) - (k == target));
    p.e[n * K + k] = float(e);
    finite &= std::isfinite(e);
  }
  if (n >= p.rows) return;

  double dL = 0;
  float* dy = p.dy + n * K;
  if (p.perturbed) {
    const double* plus = p.perturbed + n * K;
    const double* minus = p.antithetic ? plus + p.rows * K : y;
    double half = p.antithetic ? 0.5 : 1;
    dL = half * (loss(plus, log_sum(plus, K)) - (p.antithetic ? loss(minus, log_sum(minus, K)) : L));
    for (int64_t k = 0; k < K; ++k) {
      double d = half * (plus[k] - minus[k]);
      dy[k] = float(d);
      finite &= std::isfinite(d);
    }
  }
  p.ok[n] = finite && std::isfinite(L) && std::isfinite(dL);
  p.dL[n] = p.ok[n] ? float(dL) : 0;
  if (!p.perturbed || !p.ok[n]) std::fill_n(dy, K, 0.0f);
}

void perturbed_cross_entropy_cpu(const PerturbedCrossEntropyParams& p, int threads) {
  for (int64_t n = 0; n < p.samples; ++n)
    if (p.target[n] != ignored_target && (p.target[n] < 0 || p.target[n] >= p.classes))
      throw std::out_of_range("target must be a class in [0, " + std::to_string(p.classes) + ") or -100, got " +
                              std::to_string(p.target[n]));
  // an exponential takes some 5 ns, a fork 5 us
  threads = int(std::min<int64_t>({threads, omp_get_num_procs(), p.samples * p.classes / (1 << 12) + 1}));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < p.samples; ++n) sample(p, n);
}

}  // namespace fbk
