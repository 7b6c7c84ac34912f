#include "activation_cuda.h"
#include "feedback.h"
#include "tile_cuda.h"

namespace fbk {

namespace {

__global__ void __launch_bounds__(threads) feedback_kernel(FeedbackParams p) {
  const int64_t tiles = (p.samples + tile - 1) / tile, m = p.outputs;
  const int64_t n0 = blockIdx.x % tiles * tile, u0 = blockIdx.x / tiles * tile;  // neighbours read the same rows of B
  const int64_t n = n0 + threadIdx.x / 4, u = u0 + threadIdx.x / 4;
  Sums<float> sum{};
  product(sum, Rows<float>{n < p.samples ? p.e + n * m : nullptr, m},
          Rows<float>{u < p.units ? p.B + u * m : nullptr, m}, m, reinterpret_cast<float*>(shared_memory()));
  const int64_t column = u0 + own_column(), count = p.units - column;
  with_activation(p.activation, [&]<Activation phi>() __attribute__((always_inline)) {
    for (int i = 0; i < 4 && n0 + own_row() + i < p.samples; ++i) {
      const int64_t at = (n0 + own_row() + i) * p.units + column;
      if constexpr (phi != Activation::identity) {
        const Quad<float> kept = load_quad(static_cast<const float*>(p.kept) + at, count);
        for (int j = 0; j < 4; ++j) sum[i].v[j] *= derivative<phi>(kept.v[j]);
      }
      store_quad(static_cast<float*>(p.delta) + at, sum[i], count);
    }
  });
}

constexpr size_t update_shared = 2 * tile * pitch * sizeof(float);
static_assert(product_size <= tile * pitch);

// A block has 64 rows of B. The new ones grow in p.out, which the cache keeps, so that the noise is made once for all
// columns.
__global__ void __launch_bounds__(threads) feedback_update_kernel(FeedbackUpdateParams p) {
  float *xi = reinterpret_cast<float*>(shared_memory()), *buffer = xi + tile * pitch;
  const int64_t m = p.outputs, u0 = int64_t(blockIdx.x) * tile, units = p.units - u0 < tile ? p.units - u0 : tile;
  const float* B = p.B + u0 * m;
  float* out = p.out ? p.out + u0 * m : nullptr;
  const int64_t row = threadIdx.x / 4;  // of this thread, of a factor
  const Rows<float> own{row < units ? B + row * m : nullptr, m};
  for (int64_t n = 0; p.out && (n < p.rows || n == 0); n += tile) {
    __syncthreads();  // the noise before is still read
    regenerate<false>(p.noise, p.kind, n, p.rows, u0, xi);
    if (p.R) {  // w xi - B r in its place
      Sums<float> sum{};
      product(sum, Rows<float>{n + row < p.rows ? p.R + (n + row) * m : nullptr, m}, own, m, buffer);
      for (int i = 0; i < 4; ++i) {
        const int64_t s = own_row() + i;
        const float w = n + s < p.rows ? p.w[n + s] : 0;
        for (int j = 0; j < 4; ++j) {
          float& at = xi[s * pitch + own_column() + j];
          at = w * at - sum[i].v[j];
        }
      }
    }
    for (int64_t c = 0; c < m; c += tile) {
      Sums<float> sum{};
      if (n == 0 && p.M) product(sum, own, Columns<float>{p.M + c, m, m, m - c}, m, buffer);
      const int64_t column = c + own_column();
      for (int i = 0; i < 4; ++i)
        if (own_row() + i < units) {
          const Quad<float> old = load_quad((n == 0 ? B : out) + (own_row() + i) * m + column, m - column);
          for (int j = 0; j < 4; ++j) sum[i].v[j] = old.v[j] - sum[i].v[j];
        }
      __syncthreads();
      load_tile((p.R ? p.Q : p.G) + n * m, p.rows - n, m, c, buffer);
      __syncthreads();
      multiply(sum, xi, buffer, tile);
      store_tile(sum, out, units, m, c);
    }
  }
  for (int64_t n = 0; p.prediction && n < p.predicted_rows; n += tile) {
    __syncthreads();  // and all of out is there
    regenerate<true>(p.predicted_noise, p.kind, n, p.predicted_rows, u0, xi);
    for (int64_t c = 0; c < m; c += tile) {
      __syncthreads();
      load_tile(p.out ? out : B, units, m, c, buffer);
      __syncthreads();
      Sums<float> sum{};
      multiply(sum, xi, buffer, tile);
      store_tile(sum, p.prediction + (blockIdx.x * p.predicted_rows + n) * m, p.predicted_rows - n, m, c);
    }
  }
}

}  // namespace

void feedback_cuda(const FeedbackParams& p, int device, void* stream) {
  DeviceGuard guard(device);
  const int64_t tiles = (p.samples + tile - 1) / tile * ((p.units + tile - 1) / tile);
  launch(feedback_kernel, tiles, threads, product_size * sizeof(float), stream, p);
}

void feedback_update_cuda(const FeedbackUpdateParams& p, int device, void* stream) {
  static_assert(p.block_units == tile);
  DeviceGuard guard(device);
  launch(feedback_update_kernel, p.blocks(), threads, update_shared, stream, p);
}

}  // namespace fbk
