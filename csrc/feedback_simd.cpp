#include "feedback.h"

#include "activation.h"
#include "matmul.h"
#include "simd.h"

namespace fbk::FBK_SIMD {

constexpr int64_t unit_block = 128;   // that share a Rademacher counter
constexpr int64_t sample_block = 64;  // with it 32 KiB of noise

// Xi of samples [n, n + count) and units [u, u + unit_block), as rows of unit_block
static void regenerate(const NoiseParams& noise, NoiseKind kind, int64_t n, int64_t count, int64_t u, float* xi) {
  NoiseParams part = noise;
  int64_t per_sample = noise.per_sample(kind);
  part.samples = 1;
  part.units = noise.units - u < unit_block ? noise.units - u : unit_block;
  for (int64_t i = 0; i < count; ++i) {
    part.out = xi + i * unit_block;
    part.first = noise.first + uint64_t((n + i) * per_sample + u / (kind == NoiseKind::gaussian ? 4 : 128));
    fbk::FBK_SIMD::noise(part, kind, 0, part.per_sample(kind));
  }
}

// C += sign A B, C and B of `cols` columns
static void multiply_add(float sign, int64_t rows, int64_t cols, int64_t depth, Strided<float> a, const float* b,
                         int64_t ldb, float* C, int64_t ldc) {
  outer(
      0, rows, cols, depth, a, [=](int64_t k) __attribute__((always_inline)) { return b + k * ldb; },
      [=](int64_t i, int64_t c, f32v v, int64_t n) __attribute__((always_inline)) {
        float* to = C + i * ldc + c;
        n == lanes ? store(to, load(to) + sign * v) : store(to, load(to, n) + sign * v, n);
      });
}

void feedback_update(const FeedbackUpdateParams& p, int64_t task) {
  const int64_t m = p.outputs;
  constexpr int64_t depth_block = 128;
  alignas(64) float xi[sample_block * unit_block], residual[unit_block * sample_block], Rt[depth_block * sample_block];
  int64_t begin = task * p.task_units, end = begin + p.task_units < p.units ? begin + p.task_units : p.units;
  float* part = p.prediction ? p.prediction + (1 + task) * p.predicted_rows * m : nullptr;
  if (part) memset(part, 0, size_t(p.predicted_rows * m) * sizeof(float));
  for (int64_t u = begin; u < end; u += unit_block) {
    int64_t count = end - u < unit_block ? end - u : unit_block;
    const float *B = p.B + u * m, *learned = p.out ? p.out + u * m : B;
    float* out = p.out + u * m;
    if (p.out) memcpy(out, B, size_t(count * m) * sizeof(float));
    if (p.M) multiply_add(-1, count, m, m, {B, m, 1}, p.M, m, out, m);
    for (int64_t n = 0; p.out && n < p.rows; n += sample_block) {
      int64_t samples = p.rows - n < sample_block ? p.rows - n : sample_block;
      regenerate(p.noise, p.kind, n, samples, u, xi);
      if (!p.R) {
        multiply_add(1, count, m, samples, {xi, 1, unit_block}, p.G + n * m, m, out, m);
        continue;
      }
      // residual of each unit and sample, w xi - B r
      transpose(samples, count, [&](int64_t i) { return xi + i * unit_block; }, residual, sample_block);
      f32v w[sample_block / lanes];
      for (int64_t c = 0; c < samples; c += lanes)
        w[c / lanes] = samples - c < lanes ? load(p.w + n + c, samples - c) : load(p.w + n + c);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < samples; c += lanes) {
          float* at = residual + i * sample_block + c;
          store(at, w[c / lanes] * load(at));
        }
      for (int64_t k = 0; k < m; k += depth_block) {
        int64_t depth = m - k < depth_block ? m - k : depth_block;
        transpose(samples, depth, [&](int64_t i) { return p.R + (n + i) * m + k; }, Rt, sample_block);
        multiply_add(-1, count, samples, depth, {B + k, m, 1}, Rt, sample_block, residual, sample_block);
      }
      multiply_add(1, count, m, samples, {residual, sample_block, 1}, p.Q + n * m, m, out, m);
    }
    for (int64_t n = 0; part && n < p.predicted_rows; n += sample_block) {
      int64_t samples = p.predicted_rows - n < sample_block ? p.predicted_rows - n : sample_block;
      regenerate(p.predicted_noise, p.kind, n, samples, u, xi);
      multiply_add(1, samples, m, count, {xi, unit_block, 1}, learned, m, part + n * m, m);
    }
  }
}

template <class T, Activation activation>
static void finish(const FeedbackParams& p, int64_t first, int64_t count, int64_t n, int64_t samples,
                   const float* sum) {
  for (int64_t i = 0; i < samples; ++i)
    for (int64_t u = 0; u < count; u += lanes) {
      int64_t at = (n + i) * p.units + first + u, rest = count - u;
      const T* kept = static_cast<const T*>(p.kept) + at;
      T* to = static_cast<T*>(p.delta) + at;
      f32v v = load(sum + i * feedback_block + u);
      if constexpr (activation != Activation::identity)
        v *= derivative<activation>(rest < lanes ? load(kept, rest) : load(kept));
      rest < lanes ? store(to, v, rest) : store(to, v);
    }
}

template <class T>
static auto finisher(Activation activation) {
  switch (activation) {
    case Activation::relu:
      return finish<T, Activation::relu>;
    case Activation::tanh:
      return finish<T, Activation::tanh>;
    case Activation::sigmoid:
      return finish<T, Activation::sigmoid>;
    case Activation::gelu:
      return finish<T, Activation::gelu>;
    default:
      return finish<T, Activation::identity>;
  }
}

void feedback(const FeedbackParams& p, int64_t first, int64_t last) {
  constexpr int64_t depth_block = 128;
  alignas(64) float Bt[depth_block * feedback_block], sum[sample_block * feedback_block];
  int64_t count = last - first;
  auto done = p.single ? finisher<float>(p.activation) : finisher<bf16>(p.activation);
  for (int64_t n = 0; n < p.samples; n += sample_block) {
    int64_t samples = p.samples - n < sample_block ? p.samples - n : sample_block;
    memset(sum, 0, sizeof sum);
    for (int64_t k = 0; k < p.outputs; k += depth_block) {
      int64_t depth = p.outputs - k < depth_block ? p.outputs - k : depth_block;
      if (n == 0 || p.outputs > depth_block)
        transpose(count, depth, [&](int64_t u) { return p.B + (first + u) * p.outputs + k; }, Bt, feedback_block);
      multiply_add(1, samples, count, depth, {p.e + n * p.outputs + k, p.outputs, 1}, Bt, feedback_block, sum,
                   feedback_block);
    }
    done(p, first, count, n, samples, sum);
  }
}

}  // namespace fbk::FBK_SIMD
