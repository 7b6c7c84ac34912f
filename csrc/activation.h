#pragma once

#include <cstdint>

#include "dispatch.h"
#include "simd.h"

// phi and phi' of SPEC 1 on vectors, for *_simd.cpp. tests/ops/test_perturbed_pointwise.py measures them against
// float64.
namespace fbk {

template <int N>
FBK_INLINE f32v polynomial(f32v x, const float (&c)[N]) {
  f32v sum = broadcast(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) sum = mul_add(sum, x, broadcast(c[i]));
  return sum;
}

// e^r - 1 for |r| <= ln 2 / 2
FBK_INLINE f32v small_expm1(f32v r) {
  constexpr float c[] = {5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f,
                         8.3334519073e-3f, 1.3981999507e-3f, 1.9875691500e-4f};
  return mul_add(polynomial(r, c), r * r, r);
}

FBK_INLINE f32v exp(f32v x) {
  x = min(max(x, broadcast(-87.0f)), broadcast(88.0f));
  // 2^n e^r with |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds to an integer
  f32v n = mul_add(x, broadcast(0x1.715476p+0f), broadcast(0x1.8p23f)) - 0x1.8p23f;
  f32v r = mul_add(n, broadcast(-0x1.7f7d1cp-20f), mul_add(n, broadcast(-0x1.62e400p-1f), x));
  return (small_expm1(r) + 1.0f) * as_float((__builtin_convertvector(n, i32v) + 127) << 23);
}

FBK_INLINE f32v expm1(f32v x) { return abs(x) < 0.34f ? small_expm1(x) : exp(x) - 1.0f; }

FBK_INLINE f32v with_sign(f32v magnitude, f32v sign) {
  return as_float(as_int(magnitude) | (as_int(sign) & int32_t(0x80000000)));
}

FBK_INLINE f32v tanh(f32v x) {
  constexpr float c[] = {-3.33332819422e-1f, 1.33314422036e-1f, -5.37397155531e-2f, 2.06390887954e-2f,
                         -5.70498872745e-3f};
  f32v a = abs(x), s = x * x;
  f32v small = mul_add(polynomial(s, c) * s, x, x);
  f32v large = with_sign(1.0f - 2.0f / (exp(2.0f * a) + 1.0f), x);
  return a >= 0.625f ? large : small;  // nan goes through the polynomial
}

FBK_INLINE f32v sigmoid(f32v x) {
  f32v y = 1.0f / (1.0f + exp(-x));
  return x == x ? y : x;
}

FBK_INLINE f32v erf(f32v x) {
  constexpr float p[] = {-1.60960333262415e-02f, -2.95459980854025e-03f, -7.34990630326855e-04f, -5.69250639462346e-05f,
                         -2.10102402082508e-06f, 2.77068142495902e-08f,  -2.72614225801306e-10f};
  constexpr float q[] = {-1.42647390514189e-02f, -7.37332916720468e-03f, -1.68282697438203e-03f, -2.13374055278905e-04f,
                         -1.45660718464996e-05f};
  x = min(max(x, broadcast(-4.0f)), broadcast(4.0f));
  return x * polynomial(x * x, p) / polynomial(x * x, q);
}

template <Activation kind>
FBK_INLINE f32v activate(f32v z) {
  if constexpr (kind == Activation::relu) return z < 0.0f ? f32v{} : z;
  if constexpr (kind == Activation::tanh) return tanh(z);
  if constexpr (kind == Activation::sigmoid) return sigmoid(z);
  if constexpr (kind == Activation::gelu) return 0.5f * z * (1.0f + erf(z * 0x1.6a09e6p-1f));
  return z;
}

// phi'(z) from h = phi(z); of gelu from z itself, which is what is kept of it
template <Activation kind>
FBK_INLINE f32v derivative(f32v h) {
  if constexpr (kind == Activation::relu) return h > 0.0f ? broadcast(1.0f) : f32v{};
  if constexpr (kind == Activation::tanh) return 1.0f - h * h;
  if constexpr (kind == Activation::sigmoid) return h * (1.0f - h);
  if constexpr (kind == Activation::gelu)
    return mul_add(h * 0x1.988454p-2f, exp(-0.5f * h * h), 0.5f * (1.0f + erf(h * 0x1.6a09e6p-1f)));
  return broadcast(1.0f);
}

}  // namespace fbk
