#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "pooled_weight_gradient.h"
#include "threads.h"

namespace fbk {

namespace {

template <class T>
struct Buffer {
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory;
  explicit Buffer(int64_t n)
      : memory(static_cast<T*>(std::aligned_alloc(64, size_t((n * int64_t(sizeof(T)) / 64 + 1) * 64)))) {
    if (!memory) throw std::bad_alloc();
  }
  operator T*() const { return memory.get(); }
};

}  // namespace

void pooled_weight_gradient_cpu(const PooledWeightGradientParams& p, Simd simd, int threads) {
  const int64_t lanes = simd == Simd::avx512 ? 16 : simd == Simd::avx2 ? 8 : 4;
  const PooledWeightGradientPlan plan(p, lanes);
  if (plan.image >= 1 << 29)
    throw std::invalid_argument("x is too large: a window's rows of it must be less than 2 GiB");
  threads = std::min(threads, omp_get_num_procs());

  Buffer<int32_t> places(plan.map);
  for (int64_t i = 0; i < plan.map; ++i) {
    int64_t x = i % p.x.out * p.x.stride;
    places[i] =
        int32_t(i / p.x.out * p.y.stride * plan.row + (x % p.x.dilation * plan.cells + x / p.x.dilation) * plan.width);
  }

  // Large tasks share their winners and images; they should leave something to each thread, and fit the L2 cache.
  auto parts = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t vectors = parts(p.outputs, lanes);
  const int64_t block = lanes * std::min(parts(vectors, threads), parts(64, lanes)), blocks = parts(p.outputs, block);
  const int64_t cached = (1 << 18) / (plan.images + block * plan.sums),
                spread = parts(plan.chunks, parts(threads, blocks));
  const int64_t chunks = std::clamp<int64_t>(cached, 1, spread), tasks = blocks * parts(plan.chunks, chunks);

  threads = int(std::min<int64_t>(threads, tasks));
  Buffer<float> maps(threads * lanes * plan.map), packed(threads * (chunks * plan.images + lanes));
  Buffer<float> sums(threads * block * chunks * plan.sums), errors(threads * block * plan.capacity);
  Buffer<int32_t> winners(threads * block * plan.capacity), counts(threads * block);
  bool inside = true;
  std::fill_n(p.bias, p.outputs, 0.0f);
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : inside)
  {
    const int64_t t = omp_get_thread_num();
    PooledWeightGradientTask task{};
    task.places = places;
    task.map = std::fill_n(maps + t * lanes * plan.map, lanes * plan.map, 0.0f) - lanes * plan.map;
    task.images = packed + t * (chunks * plan.images + lanes);
    std::fill_n(task.images + chunks * plan.images, lanes, 0.0f);
    task.sums = sums + t * block * chunks * plan.sums;
    task.errors = errors + t * block * plan.capacity;
    task.winners = winners + t * block * plan.capacity;
    task.counts = counts + t * block;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < tasks; ++i) {
      task.first = i % blocks * block, task.last = std::min(task.first + block, p.outputs);
      task.first_chunk = i / blocks * chunks, task.last_chunk = std::min(task.first_chunk + chunks, plan.chunks);
      inside = FBK_SIMD_CALL(simd, pooled_weight_gradient(p, plan, task)) && inside;
    }
  }
  if (!inside) throw std::invalid_argument("winner must not lie outside the convolution's output");
}

}  // namespace fbk
