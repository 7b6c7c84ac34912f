#include <algorithm>
#include <cfloat>

#include "mirror.h"
#include "tile_cuda.h"

namespace fbk {

namespace {

// Layers by value: a table on the GPU would have to be copied there in each step.
struct MirrorLaunch {
  static constexpr int most = 32;
  MirrorLayer layers[most];
  int count;
  NoiseKind kind;
  float* responses;   // rate Xi D^T of each layer, [samples, outputs]
  MirrorSums* parts;  // of each block that responds
};
static_assert(sizeof(MirrorLaunch) <= 4096);

static_assert(mirror_tile == tile);

FBK_INLINE int64_t mirror_learning(const MirrorLayer& l) {
  return mirror_tiles(l.outputs) * mirror_tiles(l.noise.units);
}

// The layer of this block, the block's number in it, and what the layers before it take of responses and parts.
struct Place {
  int layer = 0;
  int64_t block = blockIdx.x, responses = 0, parts = 0;

  template <class Blocks>
  __device__ Place(const MirrorLaunch& p, Blocks blocks) {
    for (; block >= blocks(p.layers[layer]); ++layer) {
      block -= blocks(p.layers[layer]);
      responses += p.layers[layer].outputs * p.layers[layer].noise.samples;
      parts += mirror_responding(p.layers[layer]);
    }
  }
};

// The sums over all threads, for thread 0; `shared` holds 2 * threads numbers.
__device__ inline MirrorSums total(MirrorSums own, float* shared) {
  MirrorSums* all = reinterpret_cast<MirrorSums*>(shared);
  __syncthreads();
  all[threadIdx.x] = own;
  for (int half = threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) {
      all[threadIdx.x].unexplained += all[threadIdx.x + half].unexplained;
      all[threadIdx.x].weight += all[threadIdx.x + half].weight;
    }
  }
  return all[threadIdx.x];
}

constexpr size_t mirror_shared = 2 * tile * pitch * sizeof(float);

// A block has 64 samples' responses of 64 outputs.
__global__ void __launch_bounds__(threads) mirror_respond_kernel(MirrorLaunch p) {
  float *xi = reinterpret_cast<float*>(shared_memory()), *D = xi + tile * pitch;
  const Place place(p, mirror_responding);
  const MirrorLayer& l = p.layers[place.layer];
  const int64_t units = l.noise.units, samples = l.noise.samples;
  const int64_t n = place.block / mirror_tiles(l.outputs) * tile, row = place.block % mirror_tiles(l.outputs) * tile;
  Sums<float> sum{};
  MirrorSums own{};
  for (int64_t u = 0; u < units; u += tile) {
    __syncthreads();  // the tiles before are still read
    regenerate<true>(l.noise, p.kind, n, samples, u, xi);
    const int64_t c = own_column(), count = units - u - c;
    for (int i = int(threadIdx.x) / 16; i < tile; i += threads / 16) {
      Quad<float> w{}, b{};
      if (row + i < l.outputs) {
        w = load_quad(l.W + (row + i) * units + u + c, count);
        b = load_quad(l.B + (row + i) * units + u + c, count);
      }
      for (int j = 0; j < 4; ++j) {
        D[(c + j) * pitch + i] = w.v[j] - b.v[j];
        if (n == 0) own.weight += w.v[j] * w.v[j];
      }
    }
    __syncthreads();
    multiply(sum, xi, D, tile);
  }
  const float rate = l.rate(p.kind);
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      own.unexplained += sum[i].v[j] * sum[i].v[j];
      sum[i].v[j] *= rate;
    }
  store_tile(sum, p.responses + place.responses + n * l.outputs, samples - n, l.outputs, row);
  own = total(own, xi);
  if (threadIdx.x == 0) p.parts[blockIdx.x] = own;
}

// A block has 64 rows and 64 columns of a layer's B.
__global__ void __launch_bounds__(threads) mirror_learn_kernel(MirrorLaunch p) {
  float *xi = reinterpret_cast<float*>(shared_memory()), *response = xi + tile * pitch;
  const Place place(p, mirror_learning);
  const MirrorLayer& l = p.layers[place.layer];
  const int64_t units = l.noise.units, samples = l.noise.samples;
  const int64_t row = place.block / mirror_tiles(units) * tile, u = place.block % mirror_tiles(units) * tile;
  Sums<float> sum{};
  for (int64_t n = 0; n < samples; n += tile) {
    __syncthreads();  // the tiles before are still read
    regenerate<false>(l.noise, p.kind, n, samples, u, xi);
    load_tile(p.responses + place.responses + n * l.outputs, samples - n, l.outputs, row, response);
    __syncthreads();
    multiply(sum, response, xi, tile);
  }
  const int64_t c = u + own_column();
  for (int i = 0; i < 4; ++i)
    if (row + own_row() + i < l.outputs) {
      const int64_t at = (row + own_row() + i) * units + c;
      Quad<float> b = load_quad(l.B + at, units - c);
      for (int j = 0; j < 4; ++j) b.v[j] += sum[i].v[j];
      store_quad(l.out + at, b, units - c);
    }
  if (place.block != 0) return;
  MirrorSums own{};
  for (int64_t i = threadIdx.x; i < mirror_responding(l); i += threads) {
    own.unexplained += p.parts[place.parts + i].unexplained;
    own.weight += p.parts[place.parts + i].weight;
  }
  own = total(own, xi);
  const float size = float(samples) * own.weight;
  if (threadIdx.x == 0) *l.residual = own.unexplained / (size > FLT_MIN ? size : FLT_MIN);
}

}  // namespace

void mirror_cuda(const std::vector<MirrorLayer>& layers, NoiseKind kind, float* scratch, int device, void* stream) {
  DeviceGuard guard(device);
  for (size_t begin = 0; begin < layers.size(); begin += MirrorLaunch::most) {
    MirrorLaunch p{};
    p.count = int(std::min<size_t>(layers.size() - begin, MirrorLaunch::most));
    p.kind = kind;
    int64_t respond = 0, learn = 0;
    for (int i = 0; i < p.count; ++i) {
      p.layers[i] = layers[begin + size_t(i)];
      respond += mirror_responding(p.layers[i]), learn += mirror_learning(p.layers[i]);
    }
    p.parts = reinterpret_cast<MirrorSums*>(scratch);
    p.responses = scratch + 2 * respond;
    launch(mirror_respond_kernel, respond, threads, mirror_shared, stream, p);
    launch(mirror_learn_kernel, learn, threads, mirror_shared, stream, p);
  }
}

}  // namespace fbk
