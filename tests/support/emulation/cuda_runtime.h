#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

// As much of CUDA as csrc/*.cu use, for g++: each CUDA thread is a fiber, which runs up to its next barrier. A launch
// returns when it is through. In what order the blocks, the warps and the lanes take their turns between two barriers is
// drawn anew each time, from the seed FBK_EMULATED_ORDER, so that a missing barrier changes results. What the hardware
// may not survive is reported: a barrier that some threads of a block, warp or grid do not reach.
// FBK_EMULATED_SMS multiprocessors, 4 where it is not set, of compute capability FBK_EMULATED_CAPABILITY, or 8, each with
// FBK_EMULATED_SHARED bytes of shared memory.

#define FBK_EMULATED
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __grid_constant__

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration = 9, cudaErrorCooperativeLaunchTooLarge = 720, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrCooperativeLaunch
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
using cudaStream_t = void*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace fbk::emulation {

enum class Barrier { none, warp, block, grid };
constexpr unsigned warp_size = 32;
constexpr size_t stack_size = 1 << 16;

struct Thread {
  unsigned index = 0, block = 0;
  char* shared = nullptr;
  Barrier waits = Barrier::none;
  bool done = false, started = false;
  uint64_t slot[2];  // what it hands to the other lanes of its warp
  int exchanges = 0;
  Thread* warp = nullptr;  // its first lane
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };
  std::vector<Copy> copies;  // asynchronous ones, made as late as can be: when they are waited for
  ucontext_t context;
  jmp_buf place;
};

struct Launch {
  std::vector<Thread> threads;
  jmp_buf scheduler;
  Thread* now = nullptr;
  unsigned grid = 0, block = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};

inline Launch* launch_ = nullptr;
inline cudaError_t error_ = cudaSuccess;
inline std::string message_;
inline Thread& self() { return *launch_->now; }

[[gnu::noinline]] inline void wait(Barrier kind) {
  Thread& t = self();
  t.waits = kind;
  if (_setjmp(t.place) == 0) _longjmp(launch_->scheduler, 1);
}

inline void enter() {
  launch_->body(launch_->argument);
  self().done = true;
  _longjmp(launch_->scheduler, 1);
}

[[gnu::noinline]] inline void resume(Thread& t) {
  launch_->now = &t;
  if (_setjmp(launch_->scheduler) != 0) return;
  if (!t.started) {
    t.started = true;
    setcontext(&t.context);
  }
  _longjmp(t.place, 1);
}

// [first, last) has come to a barrier of the kind: lets it go on. False where only some are there.
inline bool release(Thread* first, Thread* last, Barrier kind) {
  auto there = std::count_if(first, last, [=](Thread& t) { return t.waits == kind && !t.done; });
  auto live = std::count_if(first, last, [](Thread& t) { return !t.done; });
  if (there == 0 || there != last - first) return there == 0 && live == 0;
  for (Thread* t = first; t != last; ++t) t->waits = Barrier::none;
  return true;
}

inline int setting(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text ? atoi(text) : otherwise;
}

inline std::mt19937 order_;

inline std::vector<unsigned> turns(unsigned n) {
  std::vector<unsigned> all(n);
  std::iota(all.begin(), all.end(), 0u);
  std::shuffle(all.begin(), all.end(), order_);
  return all;
}

inline bool runnable(const Thread& t) { return !t.done && t.waits == Barrier::none; }

// Up to where every thread of [first, last), a warp, is done or waits for more than the warp.
inline void run_warp(Thread* first, Thread* last) {
  do {
    for (unsigned i : turns(unsigned(last - first)))
      if (runnable(first[i])) resume(first[i]);
  } while (release(first, last, Barrier::warp) && std::any_of(first, last, runnable));
}

inline void run_block(Thread* first, Thread* last) {
  const unsigned warps = unsigned(last - first + warp_size - 1) / warp_size;
  do {
    for (unsigned w : turns(warps)) {
      Thread* lane = first + w * warp_size;
      run_warp(lane, std::min(lane + warp_size, last));
    }
  } while (release(first, last, Barrier::block) && std::any_of(first, last, runnable));
}

// The blocks one after the other, or, if they wait for each other, all at once.
inline void run(unsigned grid, unsigned block, size_t shared, bool cooperative, void (*body)(void*), void* argument) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  order_.seed(unsigned(setting("FBK_EMULATED_ORDER", 0)));
  const unsigned together = cooperative ? grid : 1;
  Launch launch;
  launch.grid = grid, launch.block = block, launch.body = body, launch.argument = argument;
  launch.threads.resize(size_t(together) * block);
  while (stacks.size() < launch.threads.size()) stacks.push_back(std::make_unique_for_overwrite<char[]>(stack_size));
  std::vector<std::vector<double>> memory(together, std::vector<double>(shared / sizeof(double) + 1));
  launch_ = &launch;
  for (unsigned first = 0; first < grid; first += together) {
    for (size_t i = 0; i < launch.threads.size(); ++i) {
      Thread& t = launch.threads[i];
      const unsigned b = unsigned(i / block);
      t = {};
      t.index = unsigned(i % block), t.block = first + b;
      t.shared = reinterpret_cast<char*>(memory[b].data());
      t.warp = &launch.threads[i - i % block % warp_size];
      std::fill(memory[b].begin(), memory[b].end(), NAN);  // CUDA does not clear it either
      getcontext(&t.context);
      t.context.uc_stack = {stacks[i].get(), 0, stack_size};
      t.context.uc_link = nullptr;
      makecontext(&t.context, enter, 0);
    }
    Thread *begin = launch.threads.data(), *end = begin + launch.threads.size();
    do {
      for (unsigned b : turns(together)) run_block(begin + b * block, begin + (b + 1) * block);
    } while (cooperative && release(begin, end, Barrier::grid) && std::any_of(begin, end, runnable));
    if (!std::all_of(begin, end, [](Thread& t) { return t.done; })) {
      error_ = cudaErrorLaunchFailure;
      message_ = "a barrier that some threads do not reach";
      break;
    }
  }
  launch_ = nullptr;
}

template <class T>
T exchange(T value, unsigned lane) {
  static_assert(sizeof(T) <= 8);
  Thread& t = self();
  const int now = t.exchanges++ % 2;
  memcpy(&t.slot[now], &value, sizeof value);
  wait(Barrier::warp);
  memcpy(&value, &t.warp[lane].slot[now], sizeof value);
  return value;
}

}  // namespace fbk::emulation

// of the thread that runs; only x is used
template <unsigned (*get)()>
struct Coordinate {
  struct {
    operator unsigned() const { return get(); }
  } x;
};
inline constexpr Coordinate<[] { return fbk::emulation::self().index; }> threadIdx;
inline constexpr Coordinate<[] { return fbk::emulation::self().block; }> blockIdx;
inline constexpr Coordinate<[] { return fbk::emulation::launch_->block; }> blockDim;
inline constexpr Coordinate<[] { return fbk::emulation::launch_->grid; }> gridDim;

inline char* emulated_shared_memory() { return fbk::emulation::self().shared; }
inline void __syncthreads() { fbk::emulation::wait(fbk::emulation::Barrier::block); }
inline void __syncwarp() { fbk::emulation::wait(fbk::emulation::Barrier::warp); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return fbk::emulation::exchange(value, (threadIdx.x % 32) ^ unsigned(mask));
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return fbk::emulation::exchange(value, unsigned(lane));
}

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P), P params) {
  struct Call {
    void (*kernel)(P);
    P params;
  } call{kernel, params};
  const unsigned grid = config->gridDim.x, block = config->blockDim.x;
  const bool together = config->numAttrs > 0;
  using namespace fbk::emulation;
  if (grid == 0 || block == 0 || block > 1024) return error_ = cudaErrorInvalidConfiguration;
  if (together && int(grid) > setting("FBK_EMULATED_SMS", 4)) return error_ = cudaErrorCooperativeLaunchTooLarge;
  auto body = [](void* data) { static_cast<Call*>(data)->kernel(static_cast<Call*>(data)->params); };
  run(grid, block, config->dynamicSmemBytes, together, body, &call);
  return error_;
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*)(P...), cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int, size_t) {
  return *blocks = 1, cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return std::exchange(fbk::emulation::error_, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorLaunchFailure ? fbk::emulation::message_.c_str() : e == cudaSuccess ? "no error" : "invalid launch";
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount             ? fbk::emulation::setting("FBK_EMULATED_SMS", 4)
           : which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? fbk::emulation::setting("FBK_EMULATED_SHARED", 232448)
           : which == cudaDevAttrComputeCapabilityMajor       ? fbk::emulation::setting("FBK_EMULATED_CAPABILITY", 8)
                                                              : 1;
  return cudaSuccess;
}
