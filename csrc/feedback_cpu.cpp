#include "feedback.h"

#include <algorithm>

#include "threads.h"

namespace fbk {

void feedback_update_cpu(const FeedbackUpdateParams& p, Simd simd, int threads) {
  int64_t tasks = p.tasks(), elements = p.predicted_rows * p.outputs;
  threads = int(std::min<int64_t>({threads, omp_get_num_procs(), tasks}));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) FBK_SIMD_CALL(simd, feedback_update(p, task));
    if (p.prediction) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < elements; ++i) {
        float sum = 0;
        for (int64_t task = 0; task < tasks; ++task) sum += p.prediction[(1 + task) * elements + i];
        p.prediction[i] = sum;
      }
    }
  }
}

void feedback_cpu(const FeedbackParams& p, Simd simd, int threads) {
  int64_t blocks = (p.units + feedback_block - 1) / feedback_block;
  threads = int(std::min<int64_t>({threads, omp_get_num_procs(), p.samples * p.units * p.outputs / (1 << 16) + 1}));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < blocks; ++block)
    FBK_SIMD_CALL(simd, feedback(p, block * feedback_block, std::min((block + 1) * feedback_block, p.units)));
}

}  // namespace fbk
