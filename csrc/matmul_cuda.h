#pragma once

#include "cuda.h"
#include "quad.h"

// Matrix products of a block of 256 threads: tiles of 64 x 64, of which each thread holds 4 x 4 numbers. In shared
// memory the factors stand depth first, as rows of `pitch` numbers.
namespace fbk {

constexpr int threads = 256, tile = 64, chunk = 16, pitch = tile + 4;
constexpr int product_size = 4 * chunk * pitch;  // numbers of shared memory: two chunks of both factors

template <class T>
using Sums = Quad<T>[4];

// The row and the column of this thread's first number.
__device__ inline int own_row() { return int(threadIdx.x) / 16 * 4; }
__device__ inline int own_column() { return int(threadIdx.x) % 16 * 4; }

// sum += a^T b
template <class T>
__device__ inline void multiply(Sums<T>& sum, const T* a, const T* b, int depth) {
  a += own_row(), b += own_column();
  for (int k = 0; k < depth; ++k, a += pitch, b += pitch) {
    Quad<T> x = *reinterpret_cast<const Quad<T>*>(a), y = *reinterpret_cast<const Quad<T>*>(b);
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) sum[i].v[j] += x.v[i] * y.v[j];
  }
}

// A factor whose rows run along the depth: `row` is number threadIdx.x / 4 of the tile, null beyond the last.
template <class T>
struct Rows {
  const T* row;
  int64_t depth;

  __device__ Quad<T> fetch(int64_t k) const {
    k += threadIdx.x % 4 * 4;
    return row ? load_quad(row + k, depth - k) : Quad<T>{};
  }
  __device__ void put(T* to, const Quad<T>& q) const {
    for (unsigned i = 0; i < 4; ++i) to[(threadIdx.x % 4 * 4 + i) * pitch + threadIdx.x / 4] = q.v[i];
  }
};

// A factor whose rows run across the tile, which begins at `from` and has `count` columns.
template <class T>
struct Columns {
  const T* from;
  int64_t stride, depth, count;

  __device__ Quad<T> fetch(int64_t k) const {
    k += threadIdx.x / 16;
    return k < depth ? load_quad(from + k * stride + own_column(), count - own_column()) : Quad<T>{};
  }
  __device__ void put(T* to, const Quad<T>& q) const {
    *reinterpret_cast<Quad<T>*>(to + threadIdx.x / 16 * pitch + own_column()) = q;
  }
};

// sum += A B; the next chunk is on its way while one is multiplied
template <class T, class A, class B>
__device__ inline void product(Sums<T>& sum, A a, B b, int64_t depth, T* shared) {
  Quad<T> x = a.fetch(0), y = b.fetch(0);
  __syncthreads();  // what is still read there
  for (int64_t k = 0, odd = 0; k < depth; k += chunk, odd ^= 1) {
    T *at = shared + odd * (product_size / 2), *bt = at + chunk * pitch;
    a.put(at, x), b.put(bt, y);
    __syncthreads();
    x = a.fetch(k + chunk), y = b.fetch(k + chunk);
    multiply(sum, at, bt, chunk);
  }
}

}  // namespace fbk
