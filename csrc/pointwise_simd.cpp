#include "pointwise.h"

#include "activation.h"
#include "simd.h"

namespace fbk::FBK_SIMD {

constexpr int64_t block = 1024;
typedef uint8_t u8v __attribute__((vector_size(lanes)));

template <class T>
FBK_INLINE f32v load_some(const T* from, int64_t n) {
  return n >= lanes ? load(from) : load(from, n);
}
template <class T>
FBK_INLINE void store_some(T* to, f32v v, int64_t n) {
  n >= lanes ? store(to, v) : store(to, v, n);
}

// What one window gives for a vector of channels, [n <= lanes]; inner: the activation that comes before the pooling
template <class T, Pool pool, Activation inner>
FBK_INLINE f32v pooled(const Window& w, const T* map, f32v scale, f32v bias, int64_t y, int64_t x, int64_t c, int64_t n,
                       f32v& z_won, i32v& won) {
  int64_t y0 = y * w.stride_h - w.padding_h, x0 = x * w.stride_w - w.padding_w;
  int64_t ky0 = y0 < 0 ? -y0 : 0, ky1 = w.height - y0 < w.kernel_h ? w.height - y0 : w.kernel_h;
  int64_t kx0 = x0 < 0 ? -x0 : 0, kx1 = w.width - x0 < w.kernel_w ? w.width - x0 : w.kernel_w;
  f32v best = broadcast(pool == Pool::avg ? 0.0f : -__builtin_inff());
  won = i32v{} + int32_t(ky0 * w.kernel_w + kx0);
  for (int64_t ky = ky0; ky < ky1; ++ky)
    for (int64_t kx = kx0; kx < kx1; ++kx) {
      f32v z = mul_add(load_some(map + ((y0 + ky) * w.width + x0 + kx) * w.channels + c, n), scale, bias);
      f32v v = activate<inner>(z);
      if constexpr (pool == Pool::avg) {
        best += v;
      } else {
        i32v takes = (v > best) | (v != v);
        best = takes ? v : best;
        if constexpr (inner != Activation::identity) z_won = takes ? z : z_won;
        won = takes ? i32v{} + int32_t(ky * w.kernel_w + kx) : won;
      }
    }
  if constexpr (pool == Pool::avg)
    best *= 1.0f / float(w.kernel_h * w.kernel_w);  // padding counts, as it does in torch
  if constexpr (inner == Activation::identity) z_won = best;
  return best;
}

template <class T, Pool pool, Activation inner, Activation outer>
static void run(const PointwiseParams& p, bool perturbed, int64_t row, int64_t first, int64_t last) {
  const Window& w = p.window;
  int64_t units = w.units(), pixels = w.height * w.width * w.channels;
  const T* map = static_cast<const T*>(perturbed ? p.q : p.z) + row * pixels;
  T* h = static_cast<T*>(perturbed ? p.p : p.h) + row * units;
  T* kept = perturbed || !p.kept ? nullptr : static_cast<T*>(p.kept) + row * units;
  uint8_t* winner = perturbed || !p.winner ? nullptr : p.winner + row * units;

  // the noise of this row of the perturbed stream, or of the row that branches off here
  float xi[block];
  T *plus = nullptr, *minus = nullptr;
  float sign = 1.0f;
  if (perturbed ? true : !p.q && row < p.noise_rows) {
    int64_t sample = row % p.noise_rows;
    NoiseParams n = p.noise;
    n.out = xi;
    n.samples = 1;
    n.units = units;
    n.first +=
        uint64_t(sample) * uint64_t(n.per_sample(p.kind)) + uint64_t(first / (p.kind == NoiseKind::gaussian ? 4 : 128));
    n.units = last - first;
    noise(n, p.kind, 0, n.per_sample(p.kind));
    if (perturbed) {
      sign = row < p.noise_rows ? 1.0f : -1.0f;
    } else {
      plus = static_cast<T*>(p.p) + row * units;
      minus = p.rows > p.noise_rows ? plus + p.noise_rows * units : nullptr;
    }
  }

  for (int64_t u = first; u < last;) {
    int64_t pixel = u / w.channels, c = u % w.channels, y = pixel / w.out_width, x = pixel % w.out_width;
    int64_t end = u + w.channels - c < last ? w.channels : c + last - u;
    for (; c < end; c += lanes, u += lanes) {
      int64_t n = end - c;
      f32v scale = p.scale ? load_some(p.scale + c, n) : broadcast(1.0f);
      f32v bias = p.bias ? load_some(p.bias + c, n) : f32v{};
      f32v z{};
      i32v won;
      f32v v = pooled<T, pool, inner>(w, map, scale, bias, y, x, c, n, z, won);
      v = activate<outer>(v);
      if (kept) store_some(kept + u, z, n);
      if (winner) {
        u8v places = __builtin_convertvector(won, u8v);
        memcpy(winner + u, &places, size_t(n < lanes ? n : lanes));
      }
      if (perturbed) {
        store_some(h + u, v + sign * load_some(xi + u - first, n), n);
        continue;
      }
      store_some(h + u, v, n);
      if (plus) {
        f32v noise = load_some(xi + u - first, n);
        store_some(plus + u, v + noise, n);
        if (minus) store_some(minus + u, v - noise, n);
      }
    }
    u -= c - end;
  }
}

template <class T, Activation activation>
static void choose(const PointwiseParams& p, bool perturbed, int64_t row, int64_t first, int64_t last) {
  constexpr Activation none = Activation::identity;
  // max-pooling commutes with what does not decrease: 1 activation for a window instead of one for each of its places
  constexpr bool monotone = activation != Activation::gelu;
  if (p.pool == Pool::none) {
    run<T, Pool::none, none, activation>(p, perturbed, row, first, last);
  } else if (p.pool == Pool::max) {
    if (monotone || p.pool_first)
      run<T, Pool::max, none, activation>(p, perturbed, row, first, last);
    else
      run<T, Pool::max, activation, none>(p, perturbed, row, first, last);
  } else if (p.pool_first) {
    run<T, Pool::avg, none, activation>(p, perturbed, row, first, last);
  } else {
    run<T, Pool::avg, activation, none>(p, perturbed, row, first, last);
  }
}

template <class T>
static void choose(const PointwiseParams& p, bool perturbed, int64_t row, int64_t first, int64_t last) {
  switch (p.activation) {
    case Activation::identity:
      return choose<T, Activation::identity>(p, perturbed, row, first, last);
    case Activation::relu:
      return choose<T, Activation::relu>(p, perturbed, row, first, last);
    case Activation::tanh:
      return choose<T, Activation::tanh>(p, perturbed, row, first, last);
    case Activation::sigmoid:
      return choose<T, Activation::sigmoid>(p, perturbed, row, first, last);
    case Activation::gelu:
      return choose<T, Activation::gelu>(p, perturbed, row, first, last);
  }
}

void pointwise(const PointwiseParams& p, bool perturbed, int64_t row, int64_t first, int64_t last) {
  p.storage == Storage::float32 ? choose<float>(p, perturbed, row, first, last)
                                : choose<bf16>(p, perturbed, row, first, last);
}

template <class T>
static void run(const UnpoolParams& p, int64_t sample) {
  const Window& w = p.window;
  T* map = static_cast<T*>(p.out) + sample * w.height * w.width * w.channels;
  const T* delta = static_cast<const T*>(p.delta) + sample * w.units();
  const uint8_t* winner = p.winner + sample * w.units();
  memset(map, 0, sizeof(T) * size_t(w.height * w.width * w.channels));
  for (int64_t y = 0; y < w.out_height; ++y)
    for (int64_t x = 0; x < w.out_width; ++x, delta += w.channels, winner += w.channels) {
      int64_t y0 = y * w.stride_h - w.padding_h, x0 = x * w.stride_w - w.padding_w;
      for (int64_t ky = 0; ky < w.kernel_h; ++ky)
        for (int64_t kx = 0; kx < w.kernel_w; ++kx) {
          if (y0 + ky < 0 || y0 + ky >= w.height || x0 + kx < 0 || x0 + kx >= w.width) continue;
          T* to = map + ((y0 + ky) * w.width + x0 + kx) * w.channels;
          auto place = int32_t(ky * w.kernel_w + kx);
          for (int64_t c = 0; c < w.channels; c += lanes) {
            int64_t n = w.channels - c;
            u8v won{};
            memcpy(&won, winner + c, size_t(n < lanes ? n : lanes));
            i32v mine = __builtin_convertvector(won, i32v) == place;
            f32v d = load_some(delta + c, n);
            store_some(to + c, load_some(to + c, n) + (mine ? d : f32v{}), n);
          }
        }
    }
}

void unpool(const UnpoolParams& p, int64_t sample) {
  p.storage == Storage::float32 ? run<float>(p, sample) : run<bf16>(p, sample);
}

}  // namespace fbk::FBK_SIMD
