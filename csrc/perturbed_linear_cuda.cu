#include "activation_cuda.h"
#include "matmul_cuda.h"
#include "perturbed_linear.h"
#include "perturbed_pointwise_cuda.h"

namespace fbk {

namespace {

// The rows of a tile: z of 64 samples, or, where dx is given, by fours z of two samples and dz of the same two, which
// so meet in one thread, and which read the weights once. `place` numbers the rows of dz, each with its sample's z, and
// behind them the samples without.
__device__ int64_t place_of(const PerturbedLinearParams& l, int64_t tile_row) {
  return l.dx ? tile_row / 4 * 2 + tile_row % 2 : tile_row;
}

__host__ __device__ int64_t places(const PerturbedLinearParams& l) {
  const PerturbedPointwiseParams& p = l.behind;
  return l.dx ? p.rows + p.samples - p.noise_rows : p.samples;
}

__device__ int64_t sample_of(const PerturbedLinearParams& l, int64_t place) {
  const PerturbedPointwiseParams& p = l.behind;
  if (!l.dx || place < p.noise_rows) return place;
  return place - (place < p.rows ? p.noise_rows : p.rows - p.noise_rows);
}

__global__ void __launch_bounds__(threads) perturbed_linear_kernel(PerturbedLinearParams l) {
  const PerturbedPointwiseParams& p = l.behind;
  const int64_t units = p.window.channels, columns = (units + tile - 1) / tile, rows = gridDim.x / columns;
  const int64_t first = blockIdx.x % rows * tile, u0 = blockIdx.x / rows * tile;  // neighbours read the same weights
  const int64_t tile_row = first + threadIdx.x / 4, from = place_of(l, tile_row), unit = u0 + threadIdx.x / 4;
  const float* x = from < places(l) ? l.x + sample_of(l, from) * l.inputs : nullptr;
  if (l.dx && tile_row % 4 >= 2) x = from < p.rows ? l.dx + from * l.inputs : nullptr;
  Sums<float> sum{};
  product(sum, Rows<float>{x, l.inputs}, Rows<float>{unit < units ? l.weight + unit * l.inputs : nullptr, l.inputs},
          l.inputs, reinterpret_cast<float*>(shared_memory()));
  const int64_t u = u0 + own_column();
  if (u >= units) return;
  const Quad<float> bias = p.bias ? load_quad(p.bias + u, units - u) : Quad<float>{};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t place = place_of(l, first + own_row() + i), sample = sample_of(l, place);
    if (place >= places(l) || (l.dx && i >= 2)) continue;
    Quad<float> z = sum[i], v, change{};
    for (int j = 0; j < 4; ++j) z.v[j] += bias.v[j];
    with_activation(p.activation, [&]<Activation phi>() __attribute__((always_inline)) {
      for (int j = 0; j < 4; ++j) {
        v.v[j] = activate<phi>(z.v[j]);
        if (l.dx) change.v[j] = add(activate<phi>(add(z.v[j], sum[(i + 2) % 4].v[j])), -v.v[j]);
      }
    });
    const bool again = l.dx && place >= p.noise_rows && place < p.rows;  // of -xi
    if (!again) store_activity(p, sample, u, z, v);
    if (sample >= p.noise_rows) continue;
    const Quad<float> xi = noise_quad(p.noise, p.kind, sample, u);
    store_difference(p, place, u, change, xi);
    if (!l.dx && p.rows > p.noise_rows) store_difference(p, place + p.noise_rows, u, change, xi);
  }
}

}  // namespace

void perturbed_linear_cuda(const PerturbedLinearParams& l, int device, void* stream) {
  DeviceGuard guard(device);
  auto tiles = [](int64_t n) { return (n + tile - 1) / tile; };
  const int64_t rows = places(l) * (l.dx ? 2 : 1);
  launch(perturbed_linear_kernel, tiles(rows) * tiles(l.behind.window.channels), threads, product_size * sizeof(float),
         stream, l);
}

}  // namespace fbk
