#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// What every *_cuda.cu needs of the CUDA runtime. A kernel takes one struct by value, and of shared memory the dynamic
// alone. tests/emulation has a cuda_runtime.h with which g++ compiles the same sources, to run blocks and threads on
// the CPU.
namespace fbk {

inline void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the runtime keeps it, and would report it to torch
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

struct DeviceGuard {
  int previous;
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous));
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous); }
};

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// The blocks that wait for each other inside a kernel: a block's own threads, a cluster's (compute capability 9) or
// all.
enum class Span { block, cluster, grid };

template <class Params>
void launch(void (*kernel)(Params), int64_t grid, int block, size_t shared, void* stream, Params params,
            Span span = Span::block) {
  if (grid == 0) return;
  cudaLaunchAttribute together{};
  together.id = span == Span::grid ? cudaLaunchAttributeCooperative : cudaLaunchAttributeClusterDimension;
  if (span == Span::grid)
    together.val.cooperative = 1;
  else
    together.val.clusterDim = {unsigned(grid), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid)), config.blockDim = dim3(unsigned(block));
  config.dynamicSmemBytes = shared, config.stream = cudaStream_t(stream);
  config.attrs = &together, config.numAttrs = span == Span::block ? 0 : 1;
  check(cudaLaunchKernelEx(&config, kernel, params));
}

// Blocks of one launch that work on the same thing.
struct Team {
  int64_t rank, size;
  Span span;

  __device__ void sync() const {
    if (span == Span::block) return __syncthreads();
    if (span == Span::grid) return cooperative_groups::this_grid().sync();
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#endif
  }
};

__device__ inline char* shared_memory() {
#ifdef FBK_EMULATED
  return emulated_shared_memory();
#else
  extern __shared__ double memory[];
  return reinterpret_cast<char*>(memory);
#endif
}

}  // namespace fbk
