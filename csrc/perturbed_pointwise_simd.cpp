#include "perturbed_pointwise.h"

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

// What a window gives for a vector of channels, behind scale, bias and the activation before the pooling.
struct Pooled {
  f32v z, v;
  f32v moved[2];  // v of z + dz, of each sign
  i32v won;
};

template <Pool pool>
FBK_INLINE f32v pool_in(f32v best, f32v v) {
  if constexpr (pool == Pool::avg) return best + v;
  return ((v > best) | (v != v)) ? v : best;
}

// [n <= lanes] channels; inner: the activation that comes before the pooling; differs: whether there are differences,
// of which the second may be null
template <class T, Pool pool, Activation inner, bool differs>
FBK_INLINE Pooled pooled(const Window& w, const T* map, const T* const (&differences)[2], f32v scale, f32v bias,
                         int64_t y, int64_t x, int64_t c, int64_t n) {
  if constexpr (pool == Pool::none) {
    int64_t at = (y * w.width + x) * w.channels + c;
    f32v z = mul_add(load_some(map + at, n), scale, bias);
    Pooled one{z, z, {}, {}};
    for (int i = 0; i < 2; ++i)
      if (differs && differences[i]) one.moved[i] = mul_add(load_some(differences[i] + at, n), scale, z);
    return one;
  }
  int64_t y0 = y * w.stride_h - w.padding_h, x0 = x * w.stride_w - w.padding_w;
  int64_t ky0 = y0 < 0 ? -y0 : 0, ky1 = w.height - y0 < w.kernel_h ? w.height - y0 : w.kernel_h;
  int64_t kx0 = x0 < 0 ? -x0 : 0, kx1 = w.width - x0 < w.kernel_w ? w.width - x0 : w.kernel_w;
  f32v none = broadcast(pool == Pool::avg ? 0.0f : -__builtin_inff());
  Pooled best{{}, none, {none, none}, i32v{} + int32_t(ky0 * w.kernel_w + kx0)};
  for (int64_t ky = ky0; ky < ky1; ++ky)
    for (int64_t kx = kx0; kx < kx1; ++kx) {
      int64_t at = ((y0 + ky) * w.width + x0 + kx) * w.channels + c;
      f32v z = mul_add(load_some(map + at, n), scale, bias), v = activate<inner>(z);
      if constexpr (pool != Pool::avg) {
        i32v takes = (v > best.v) | (v != v);
        if constexpr (inner != Activation::identity) best.z = takes ? z : best.z;
        best.won = takes ? i32v{} + int32_t(ky * w.kernel_w + kx) : best.won;
      }
      best.v = pool_in<pool>(best.v, v);
      for (int i = 0; i < 2; ++i)
        if (differs && differences[i]) {
          f32v moved = activate<inner>(mul_add(load_some(differences[i] + at, n), scale, z));
          best.moved[i] = pool_in<pool>(best.moved[i], moved);
        }
    }
  if constexpr (pool == Pool::avg) {  // padding counts, as it does in torch
    float part = 1.0f / float(w.kernel_h * w.kernel_w);
    best.v *= part, best.moved[0] *= part, best.moved[1] *= part;
  }
  if constexpr (inner == Activation::identity) best.z = best.v;
  return best;
}

template <class T, Pool pool, Activation inner, Activation outer>
static void run(const PerturbedPointwiseParams& p, int64_t sample, int64_t first, int64_t last) {
  const Window& w = p.window;
  int64_t units = w.units(), pixels = w.height * w.width * w.channels;
  const T* map = static_cast<const T*>(p.z) + sample * pixels;
  T* h = static_cast<T*>(p.h) + sample * units;
  T* kept = p.kept ? static_cast<T*>(p.kept) + sample * units : nullptr;
  uint8_t* winner = p.winner ? p.winner + sample * units : nullptr;

  // the rows of this sample's differences, of +xi and of -xi
  float xi[block];
  T* d[2] = {};
  const T* dz[2] = {};
  if (sample < p.noise_rows) {
    for (int64_t i = 0, row = sample; row < p.rows; ++i, row += p.noise_rows) {
      d[i] = static_cast<T*>(p.d) + row * units;
      dz[i] = p.dz ? static_cast<const T*>(p.dz) + row * pixels : nullptr;
    }
    NoiseParams n = p.noise;
    n.out = xi;
    n.samples = 1;
    n.units = units;
    n.first +=
        uint64_t(sample) * uint64_t(n.per_sample(p.kind)) + uint64_t(first / (p.kind == NoiseKind::gaussian ? 4 : 128));
    n.units = last - first;
    noise(n, p.kind, 0, n.per_sample(p.kind));
  }

  int64_t pixel = first / w.channels, c = first % w.channels, y = pixel / w.out_width, x = pixel % w.out_width;
  for (int64_t u = first; u < last;) {
    int64_t end = u + w.channels - c < last ? w.channels : c + last - u;
    for (; c < end; c += lanes, u += lanes) {
      int64_t n = end - c;
      f32v scale = p.scale ? load_some(p.scale + c, n) : broadcast(1.0f);
      f32v bias = p.bias ? load_some(p.bias + c, n) : f32v{};
      Pooled best = dz[0] ? pooled<T, pool, inner, true>(w, map, dz, scale, bias, y, x, c, n)
                          : pooled<T, pool, inner, false>(w, map, dz, scale, bias, y, x, c, n);
      f32v v = activate<outer>(best.v);
      store_some(h + u, v, n);
      if (kept) store_some(kept + u, best.z, n);
      if (winner) {
        u8v places = __builtin_convertvector(best.won, u8v);
        memcpy(winner + u, &places, size_t(n < lanes ? n : lanes));
      }
      if (!d[0]) continue;
      f32v noise = load_some(xi + u - first, n);
      for (int i = 0; i < 2; ++i)
        if (d[i]) {
          f32v change = dz[i] ? activate<outer>(best.moved[i]) - v : f32v{};
          store_some(d[i] + u, i ? change - noise : change + noise, n);
        }
    }
    u -= c - end;
    c = 0;
    if (++x == w.out_width) x = 0, ++y;  // a division costs as much as a vector
  }
}

template <class T, Activation activation>
static void choose(const PerturbedPointwiseParams& p, int64_t sample, int64_t first, int64_t last) {
  constexpr Activation none = Activation::identity;
  // max-pooling commutes with what does not decrease: 1 activation for a window instead of one for each of its places
  constexpr bool monotone = activation != Activation::gelu;
  if (p.pool == Pool::none) {
    run<T, Pool::none, none, activation>(p, sample, first, last);
  } else if (p.pool == Pool::max) {
    if (monotone || p.pool_first)
      run<T, Pool::max, none, activation>(p, sample, first, last);
    else
      run<T, Pool::max, activation, none>(p, sample, first, last);
  } else if (p.pool_first) {
    run<T, Pool::avg, none, activation>(p, sample, first, last);
  } else {
    run<T, Pool::avg, activation, none>(p, sample, first, last);
  }
}

template <class T>
static void choose(const PerturbedPointwiseParams& p, int64_t sample, int64_t first, int64_t last) {
  switch (p.activation) {
    case Activation::identity:
      return choose<T, Activation::identity>(p, sample, first, last);
    case Activation::relu:
      return choose<T, Activation::relu>(p, sample, first, last);
    case Activation::tanh:
      return choose<T, Activation::tanh>(p, sample, first, last);
    case Activation::sigmoid:
      return choose<T, Activation::sigmoid>(p, sample, first, last);
    case Activation::gelu:
      return choose<T, Activation::gelu>(p, sample, first, last);
  }
}

void perturbed_pointwise(const PerturbedPointwiseParams& p, int64_t sample, int64_t first, int64_t last) {
  p.storage == Storage::float32 ? choose<float>(p, sample, first, last) : choose<bf16>(p, sample, first, last);
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
