#include "mirror.h"

#include "matmul.h"
#include "simd.h"

namespace fbk::FBK_SIMD {

// Xi of samples [n, n + samples) and units [u, u + count), as rows of `count`
static void regenerate(const NoiseParams& noise, NoiseKind kind, int64_t n, int64_t samples, int64_t u, int64_t count,
                       float* xi) {
  NoiseParams part = noise;
  const int64_t per_sample = noise.per_sample(kind);
  const bool whole = count == noise.units;
  part.samples = whole ? samples : 1;
  part.units = count;
  for (int64_t i = 0; i < samples; i += part.samples) {
    part.out = xi + i * count;
    part.first = noise.first + uint64_t((n + i) * per_sample + u / (kind == NoiseKind::gaussian ? 4 : 128));
    fbk::FBK_SIMD::noise(part, kind, 0, part.samples * part.per_sample(kind));
  }
}

void mirror(const MirrorRows* parts, int count, NoiseKind kind, float* scratch) {
  const MirrorLayer& layer = *parts[0].layer;
  const int64_t units = layer.noise.units, samples = layer.noise.samples;
  const float rate = layer.rate(kind);
  int64_t rows = 0;
  for (int i = 0; i < count; ++i) rows += parts[i].count();
  float *D = scratch, *R = D + rows * units, *xi = R + rows * mirror_samples, *across = xi + mirror_samples * units;

  // f(row of D, its part, its row there)
  auto each_row = [&](auto f) __attribute__((always_inline)) {
    int64_t row = 0;
    for (int i = 0; i < count; ++i)
      for (int64_t own = parts[i].first; own < parts[i].last; ++own) f(row++, parts[i], own);
  };
  each_row([&](int64_t row, const MirrorRows& part, int64_t own) __attribute__((always_inline)) {
    const float *B = part.layer->B + own * units, *W = part.layer->W + own * units;
    f32v weight{};
    for (int64_t u = 0; u < units; u += lanes) {
      const bool all = units - u >= lanes;
      f32v w = all ? load(W + u) : load(W + u, units - u), b = all ? load(B + u) : load(B + u, units - u);
      weight += w * w;
      all ? store(D + row * units + u, w - b) : store(D + row * units + u, w - b, units - u);
    }
    part.sums[own] = {0, sum(weight)};
  });

  for (int64_t n = 0; n < samples; n += mirror_samples) {
    const int64_t seen = samples - n < mirror_samples ? samples - n : mirror_samples;
    for (int64_t u = 0; u < units; u += mirror_units) {
      const int64_t width = units - u < mirror_units ? units - u : mirror_units;
      const float* tile = xi + u * mirror_samples;
      regenerate(layer.noise, kind, n, seen, u, width, xi + u * mirror_samples);
      transpose(
          seen, width, [=](int64_t s) __attribute__((always_inline)) { return tile + s * width; }, across,
          mirror_samples);
      outer(
          0, rows, seen, width, Strided<float>{D + u, units, 1},
          [=](int64_t k) __attribute__((always_inline)) { return across + k * mirror_samples; },
          [=](int64_t row, int64_t s, f32v v, int64_t many) __attribute__((always_inline)) {
            float* to = R + row * mirror_samples + s;
            if (many == lanes)
              store(to, u ? load(to) + v : v);
            else
              store(to, u ? load(to, many) + v : v, many);
          });
    }
    each_row([&](int64_t row, const MirrorRows& part, int64_t own) __attribute__((always_inline)) {
      f32v squares{};
      for (int64_t s = 0; s < seen; s += lanes) {
        float* at = R + row * mirror_samples + s;
        const bool all = seen - s >= lanes;
        f32v r = all ? load(at) : load(at, seen - s);
        squares += r * r;
        all ? store(at, rate * r) : store(at, rate * r, seen - s);
      }
      part.sums[own].unexplained += sum(squares);
    });
    for (int64_t u = 0; u < units; u += mirror_units) {
      const int64_t width = units - u < mirror_units ? units - u : mirror_units;
      const float *tile = xi + u * mirror_samples, *from = R;
      for (int i = 0; i < count; from += parts[i++].count() * mirror_samples) {
        const int64_t at = parts[i].first * units + u;
        float* out = parts[i].layer->out + at;
        const float* before = n ? out : parts[i].layer->B + at;
        outer(
            0, parts[i].count(), width, seen, Strided<float>{from, mirror_samples, 1},
            [=](int64_t k) __attribute__((always_inline)) { return tile + k * width; },
            [=](int64_t row, int64_t c, f32v v, int64_t many) __attribute__((always_inline)) {
              const float* old = before + row * units + c;
              float* to = out + row * units + c;
              many == lanes ? store(to, load(old) + v) : store(to, load(old, many) + v, many);
            });
      }
    }
  }
}

}  // namespace fbk::FBK_SIMD
