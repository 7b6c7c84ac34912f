#include "activation_cuda.h"
#include "linear.h"
#include "matmul_cuda.h"
#include "pointwise_cuda.h"

namespace fbk {

namespace {

// The rows of a tile: 64 samples, or, where the streams differ, 32 of each, which so read the weights once.
struct Place {
  bool perturbed;
  int64_t row;

  __device__ Place(const LinearParams& l, int64_t first, int row_of_tile)
      : perturbed(l.p && row_of_tile >= tile / 2),
        row(l.p ? first / 2 + row_of_tile % (tile / 2) : first + row_of_tile) {}
};

__global__ void __launch_bounds__(threads) linear_kernel(LinearParams l) {
  const PointwiseParams& p = l.behind;
  const int64_t units = p.window.channels, columns = (units + tile - 1) / tile, rows = gridDim.x / columns;
  const int64_t first = blockIdx.x % rows * tile, u0 = blockIdx.x / rows * tile;  // neighbours read the same weights
  const Place from(l, first, int(threadIdx.x) / 4);
  const float* x = (from.perturbed ? l.p : l.x) + from.row * l.inputs;
  const bool inside = from.row < (from.perturbed ? p.rows : p.samples);
  const int64_t unit = u0 + threadIdx.x / 4;
  Sums<float> sum{};
  product(sum, Rows<float>{inside ? x : nullptr, l.inputs},
          Rows<float>{unit < units ? l.weight + unit * l.inputs : nullptr, l.inputs}, l.inputs,
          reinterpret_cast<float*>(shared_memory()));
  const int64_t u = u0 + own_column();
  if (u >= units) return;
  const Quad<float> bias = p.bias ? load_quad(p.bias + u, units - u) : Quad<float>{};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Place to(l, first, own_row() + i);
    Quad<float> z = sum[i], v;
    for (int j = 0; j < 4; ++j) z.v[j] += bias.v[j];
    with_activation(p.activation, [&]<Activation phi>() __attribute__((always_inline)) {
      for (int j = 0; j < 4; ++j) v.v[j] = activate<phi>(z.v[j]);
    });
    if (to.row < (to.perturbed ? p.rows : p.samples)) store_activity(p, to.perturbed, to.row, u, z, v);
  }
}

}  // namespace

void linear_cuda(const LinearParams& l, int device, void* stream) {
  DeviceGuard guard(device);
  auto tiles = [](int64_t n) { return (n + tile - 1) / tile; };
  const PointwiseParams& p = l.behind;
  const int64_t rows = l.p ? 2 * (p.rows > p.samples ? p.rows : p.samples) : p.samples;
  launch(linear_kernel, tiles(rows) * tiles(p.window.channels), threads, product_size * sizeof(float), stream, l);
}

}  // namespace fbk
