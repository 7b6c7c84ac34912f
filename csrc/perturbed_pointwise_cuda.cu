#include "activation_cuda.h"
#include "perturbed_pointwise_cuda.h"

namespace fbk {

namespace {

constexpr int block = 256;

// What a window gives for `width` neighbouring channels, behind scale, bias and the activation before the pooling.
struct Pooled {
  Quad<float> z, v;
  Quad<int> place;
};

__device__ inline float phi_of(Activation kind, float z) {
  return with_activation(kind, [z]<Activation phi>() { return activate<phi>(z); });
}

// dz: null where it is zero
template <int width>
__device__ inline Pooled pooled(const PerturbedPointwiseParams& p, const float* map, const float* dz, int64_t y,
                                int64_t x, int64_t c, Activation inner) {
  const Window& w = p.window;
  const bool average = p.pool == Pool::avg;
  Pooled best{{}, {}, {-1, -1, -1, -1}};
  const Quad<float> scale = p.scale ? load_quad(p.scale + c, width) : Quad<float>{1, 1, 1, 1};
  const Quad<float> bias = p.bias ? load_quad(p.bias + c, width) : Quad<float>{};
  const int64_t y0 = y * w.stride_h - w.padding_h, x0 = x * w.stride_w - w.padding_w;
  for (int64_t ky = 0; ky < w.kernel_h; ++ky)
    for (int64_t kx = 0; kx < w.kernel_w; ++kx) {
      if (y0 + ky < 0 || y0 + ky >= w.height || x0 + kx < 0 || x0 + kx >= w.width) continue;
      const int64_t at = ((y0 + ky) * w.width + x0 + kx) * w.channels + c;
      const Quad<float> loaded = load_quad(map + at, width), change = dz ? load_quad(dz + at, width) : Quad<float>{};
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const float z = fma(change.v[i], scale.v[i], fma(loaded.v[i], scale.v[i], bias.v[i])), v = phi_of(inner, z);
        // the first place that is inside, later ones if they are larger; not-a-number wins as it does in torch
        const bool takes = best.place.v[i] < 0 || v > best.v.v[i] || v != v;
        best.v.v[i] = average ? best.v.v[i] + v : takes ? v : best.v.v[i];
        best.z.v[i] = takes ? z : best.z.v[i];
        best.place.v[i] = takes ? int(ky * w.kernel_w + kx) : best.place.v[i];
      }
    }
  if (average)
    for (int i = 0; i < width; ++i) best.v.v[i] *= 1.0f / float(w.kernel_h * w.kernel_w);  // padding counts
  return best;
}

// Four neighbouring units of a sample from u on, behind both.
template <int width>
__device__ inline Pooled activity(const PerturbedPointwiseParams& p, const float* map, const float* dz, int64_t u) {
  const Window& w = p.window;
  // max-pooling commutes with what does not decrease: one activation a window
  const bool inside =
      p.pool != Pool::none && !p.pool_first && (p.pool == Pool::avg || p.activation == Activation::gelu);
  const Activation inner = inside ? p.activation : Activation::identity;
  const Activation outer = inside ? Activation::identity : p.activation;
  Pooled all{};
#pragma unroll
  for (int i = 0; i < 4; i += width) {
    if (u + i >= w.units()) continue;
    const int64_t pixel = (u + i) / w.channels, c = u + i - pixel * w.channels, y = pixel / w.out_width;
    const Pooled best = pooled<width>(p, map, dz, y, pixel - y * w.out_width, c, inner);
    for (int j = 0; j < width; ++j)
      all.z.v[i + j] = best.z.v[j], all.v.v[i + j] = best.v.v[j], all.place.v[i + j] = best.place.v[j];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) all.v.v[i] = phi_of(outer, all.v.v[i]);
  return all;
}

// A thread has four neighbouring units of a sample, which share a counter; they are channels of one place where
// channels come in fours. It reads z again for each difference, from the cache, and needs fewer registers than for all
// at once.
template <int width>
__global__ void __launch_bounds__(block, 3) perturbed_pointwise_kernel(PerturbedPointwiseParams p) {
  const int64_t units = p.window.units(), quads = (units + 3) / 4;
  const int64_t size = p.window.height * p.window.width * p.window.channels;
  const int64_t t = int64_t(blockIdx.x) * block + threadIdx.x;
  if (t >= p.samples * quads) return;
  const int64_t sample = t / quads, u = (t - sample * quads) * 4;
  const float* map = static_cast<const float*>(p.z) + sample * size;
  const Pooled clean = activity<width>(p, map, nullptr, u);
  if (p.winner) {
    Quad<uint8_t> place;
    for (int i = 0; i < 4; ++i) place.v[i] = uint8_t(clean.place.v[i]);
    store_quad(p.winner + sample * units + u, place, units - u);
  }
  store_activity(p, sample, u, clean.z, clean.v);
  if (sample >= p.noise_rows) return;
  const Quad<float> xi = noise_quad(p.noise, p.kind, sample, u);
#pragma unroll 1
  for (int64_t row = sample; row < p.rows; row += p.noise_rows) {
    Quad<float> change{};
    if (p.dz) {
      const Pooled moved = activity<width>(p, map, static_cast<const float*>(p.dz) + row * size, u);
      for (int i = 0; i < 4; ++i) change.v[i] = add(moved.v.v[i], -clean.v.v[i]);
    }
    store_difference(p, row, u, change, xi);
  }
}

template <int width>
__global__ void __launch_bounds__(block) unpool_kernel(UnpoolParams p) {
  const Window& w = p.window;
  const int64_t at = (int64_t(blockIdx.x) * block + threadIdx.x) * width;
  if (at >= p.samples * w.height * w.width * w.channels) return;
  const int64_t pixel = at / w.channels, c = at - pixel * w.channels, line = pixel / w.width,
                x = pixel - line * w.width;
  const int64_t sample = line / w.height, y = line - sample * w.height;
  const float* delta = static_cast<const float*>(p.delta) + sample * w.units() + c;
  const uint8_t* winner = p.winner + sample * w.units() + c;
  // window i covers i * stride - padding to i * stride - padding + kernel - 1
  auto first = [](int64_t i, int64_t kernel, int64_t stride) { return i < kernel ? 0 : (i - kernel) / stride + 1; };
  const int64_t py = y + w.padding_h, px = x + w.padding_w;
  Quad<float> sum{};
  for (int64_t wy = first(py, w.kernel_h, w.stride_h); wy < w.out_height && wy * w.stride_h <= py; ++wy)
    for (int64_t wx = first(px, w.kernel_w, w.stride_w); wx < w.out_width && wx * w.stride_w <= px; ++wx) {
      const int64_t place = (py - wy * w.stride_h) * w.kernel_w + px - wx * w.stride_w;
      const int64_t from = (wy * w.out_width + wx) * w.channels;
      const Quad<float> d = load_quad(delta + from, width);
      const Quad<uint8_t> won = load_quad(winner + from, width);
      for (int i = 0; i < width; ++i) sum.v[i] += won.v[i] == place ? d.v[i] : 0;
    }
  store_quad(static_cast<float*>(p.out) + at, sum, width);
}

int64_t blocks(int64_t items) { return (items + block - 1) / block; }

}  // namespace

void perturbed_pointwise_cuda(const PerturbedPointwiseParams& p, int device, void* stream) {
  DeviceGuard guard(device);
  const int64_t items = p.samples * ((p.window.units() + 3) / 4);
  launch(p.window.channels % 4 == 0 ? perturbed_pointwise_kernel<4> : perturbed_pointwise_kernel<1>, blocks(items),
         block, 0, stream, p);
}

void unpool_cuda(const UnpoolParams& p, int device, void* stream) {
  DeviceGuard guard(device);
  const Window& w = p.window;
  const int64_t items = p.samples * w.height * w.width * w.channels;
  if (w.channels % 4 == 0)
    launch(unpool_kernel<4>, blocks(items / 4), block, 0, stream, p);
  else
    launch(unpool_kernel<1>, blocks(items), block, 0, stream, p);
}

}  // namespace fbk
