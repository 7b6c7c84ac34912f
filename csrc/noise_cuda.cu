#include <algorithm>

#include "cuda.h"
#include "noise.h"

namespace fbk {

namespace {

struct NoiseLaunch {
  NoiseParams noise;
  int64_t threads;
};

template <NoiseKind kind>
__global__ void noise_kernel(NoiseLaunch p) {
  int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; t < p.threads; t += stride)
    noise_thread<kind>(p.noise, t);
}

template <NoiseKind kind>
void run(const NoiseParams& p, void* stream) {
  int64_t threads = p.samples * p.per_sample(kind) * threads_per_counter<kind>;
  constexpr int block = 256;
  launch(noise_kernel<kind>, std::min<int64_t>((threads + block - 1) / block, 0x7fffffff), block, 0, stream,
         NoiseLaunch{p, threads});
}

}  // namespace

void noise_cuda(const NoiseParams& p, NoiseKind kind, int device, void* stream) {
  DeviceGuard guard(device);
  kind == NoiseKind::gaussian ? run<NoiseKind::gaussian>(p, stream) : run<NoiseKind::rademacher>(p, stream);
}

}  // namespace fbk
