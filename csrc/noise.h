#pragma once

#include <cstdint>
#include <cstring>

#include "dispatch.h"
#include "philox.h"
#include "quad.h"

// SPEC 6. Every rounding is spelled out (explicit fma, no product that feeds a sum), so the portable, AVX2, AVX-512 and
// CUDA paths give the same bits.
namespace fbk {

enum class NoiseKind { gaussian, rademacher };

struct NoiseParams {
  float* out;           // [samples, units]
  const int64_t* step;  // on the device of out, so that a CUDA graph can advance it
  uint64_t seed;
  uint32_t point;
  float std;
  int64_t samples, units;
  uint64_t first;  // counter of the first sample's first units

  FBK_INLINE int64_t per_sample(NoiseKind kind) const {
    int64_t shared = kind == NoiseKind::gaussian ? 4 : 128;
    return (units + shared - 1) / shared;
  }
};

FBK_INLINE float to_float(int32_t a) { return float(a); }
FBK_INLINE int32_t as_int(float a) {
  int32_t b;
  memcpy(&b, &a, sizeof b);
  return b;
}
FBK_INLINE float as_float(int32_t a) {
  float b;
  memcpy(&b, &a, sizeof b);
  return b;
}
#ifdef __CUDA_ARCH__
__device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float sqrt(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
#else
FBK_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FBK_INLINE float sqrt(float a) { return __builtin_sqrtf(a); }
FBK_INLINE float add(float a, float b) { return a + b; }
#endif

template <int N, class F>
FBK_INLINE F horner(F x, const float (&c)[N]) {
  F sum = F{} + c[N - 1];
  for (int i = N - 2; i >= 0; --i) sum = fma(sum, x, F{} + c[i]);
  return sum;
}

// std * sqrt(-2 ln u) * (cos, sin)(2 pi v) for u = (a + 1) / 2^24, v = b / 2^24. The minimax polynomials were fitted
// for relative error; over all 2^24 inputs the radius is within 1.1 ulp, the cosine 1.0, the sine 1.7.
template <class F, class I>
FBK_INLINE void box_muller(I a, I b, float std, F& x, F& y) {
  constexpr float log_c[] = {-0x1.fffffap-2f, 0x1.5556f4p-2f, -0x1.00049ap-2f, 0x1.98d2c0p-3f,
                             -0x1.535d30p-3f, 0x1.318526p-3f, -0x1.25049ap-3f, 0x1.65c766p-4f};
  constexpr float sin_c[] = {0x1.921fb6p+0f, -0x1.4abbbap-1f, 0x1.465e92p-4f, -0x1.2d9302p-8f};
  constexpr float cos_c[] = {1.0f, -0x1.3bd3ccp+0f, 0x1.03c1dap-2f, -0x1.55c4eap-6f, 0x1.d99f54p-11f};

  // u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2))
  I u = as_int(to_float(a + 1) * 0x1p-24f);
  I e = u - 0x3f3504f3;
  F f = as_float(u - (e & ~0x7fffff)) - 1.0f;
  F log_u = fma(to_float(e >> 23), F{} + 0x1.62e430p-1f, fma(f * f, horner(f, log_c), f));
  F radius = std * sqrt(-2.0f * log_u);

  // the quarter turn nearest to v, and what is left in (-1/2, 1/2) of a quarter turn: both exact
  I q = (b + (1 << 21)) >> 22;
  F t = to_float(b - (q << 22)) * 0x1p-22f;
  F s = t * horner(t * t, sin_c), c = horner(t * t, cos_c);
  auto even = (q & 1) == 0;
  x = radius * as_float(as_int(even ? c : s) ^ (((q + 1) & 2) << 30));
  y = radius * as_float(as_int(even ? s : c) ^ ((q & 2) << 30));
}

// What one CUDA thread computes; the portable CPU path loops over the threads. A Rademacher counter serves 128 units:
// its 8 threads write 16 each, in four 128-byte rows.
template <NoiseKind kind>
constexpr int threads_per_counter = kind == NoiseKind::gaussian ? 1 : 8;

FBK_INLINE Words<uint32_t> noise_words(const NoiseParams& p, uint64_t index) {
  return philox(Words<uint32_t>{{low(index), high(index), low(uint64_t(*p.step)), p.point}}, p.seed);
}

// four units of a counter; of Rademacher's 32 fours the one of the bit
template <NoiseKind kind>
FBK_INLINE Quad<float> noise_quad(const Words<uint32_t>& words, float std, int bit = 0) {
  auto [w] = words;
  Quad<float> z;
  if constexpr (kind == NoiseKind::gaussian) {
    box_muller(int32_t(w[0] >> 8), int32_t(w[1] >> 8), std, z.v[0], z.v[1]);
    box_muller(int32_t(w[2] >> 8), int32_t(w[3] >> 8), std, z.v[2], z.v[3]);
  } else {
    for (int i = 0; i < 4; ++i) z.v[i] = as_float(as_int(std) ^ int32_t(w[i] >> bit << 31));
  }
  return z;
}

// the four units from u on, a multiple of 4, of a sample counted from p.first
FBK_INLINE Quad<float> noise_quad(const NoiseParams& p, NoiseKind kind, int64_t sample, int64_t u) {
  uint64_t index = p.first + uint64_t(sample * p.per_sample(kind) + u / (kind == NoiseKind::gaussian ? 4 : 128));
  Words<uint32_t> words = noise_words(p, index);
  return kind == NoiseKind::gaussian ? noise_quad<NoiseKind::gaussian>(words, p.std)
                                     : noise_quad<NoiseKind::rademacher>(words, p.std, int(u / 4 % 32));
}

template <NoiseKind kind>
FBK_INLINE void noise_thread(const NoiseParams& p, int64_t thread) {
  int64_t counter = thread / threads_per_counter<kind>;
  int64_t per_sample = p.per_sample(kind);
  int64_t units_per_counter = kind == NoiseKind::gaussian ? 4 : 128;
  int64_t row = 0, col = counter * units_per_counter, units = p.samples * p.units;
  if (p.units % units_per_counter != 0) {  // else rows follow each other without a gap, and the division is saved
    row = counter / per_sample;
    col = (counter - row * per_sample) * units_per_counter;
    units = p.units;
  }
  float* out = p.out + row * p.units;
  Words<uint32_t> words = noise_words(p, p.first + uint64_t(counter));
  if constexpr (kind == NoiseKind::gaussian) {
    store_quad(out + col, noise_quad<kind>(words, p.std), units - col);
  } else {
    for (int k = 0; k < 4; ++k) {
      int bit = int(thread % 8) + 8 * k;
      store_quad(out + col + 4 * bit, noise_quad<kind>(words, p.std, bit), units - col - 4 * bit);
    }
  }
}

void noise_cuda(const NoiseParams& params, NoiseKind kind, int device, void* stream);
void noise_cpu(const NoiseParams& params, NoiseKind kind, Simd simd, int threads);

// the counters [first, last) of the parameters' own
FBK_SIMD_DECLARE(void noise(const NoiseParams&, NoiseKind, int64_t first, int64_t last))

}  // namespace fbk
