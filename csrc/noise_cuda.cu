#include <algorithm>
#include <stdexcept>
#include <string>

#include "noise.h"

namespace fbk {

static void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

struct DeviceGuard {
  int previous;
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous));
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous); }
};

template <NoiseKind kind>
__global__ void noise_kernel(NoiseParams p, int64_t threads) {
  int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; t < threads; t += stride) noise_thread<kind>(p, t);
}

template <NoiseKind kind>
static void launch(const NoiseParams& p, cudaStream_t stream) {
  int64_t threads = p.samples * p.per_sample(kind) * threads_per_counter<kind>;
  constexpr int block = 256;
  auto grid = unsigned(std::min<int64_t>((threads + block - 1) / block, 0x7fffffff));
  if (grid > 0) noise_kernel<kind><<<grid, block, 0, stream>>>(p, threads);
  check(cudaGetLastError());
}

void noise_cuda(const NoiseParams& p, NoiseKind kind, int device, void* stream) {
  DeviceGuard guard(device);
  if (kind == NoiseKind::gaussian) {
    launch<NoiseKind::gaussian>(p, cudaStream_t(stream));
  } else {
    launch<NoiseKind::rademacher>(p, cudaStream_t(stream));
  }
}

}  // namespace fbk
