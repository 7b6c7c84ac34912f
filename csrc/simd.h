#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "dispatch.h"

// Vector types for *_simd.cpp alone (see dispatch.h); to be included before what is templated on these types. The types
// differ between the objects, so the overloads cannot be mixed up by the linker.
namespace fbk {

#if defined(__AVX512F__)
constexpr int bytes = 64;
#elif defined(__AVX2__)
constexpr int bytes = 32;
#else
constexpr int bytes = 16;
#endif
constexpr int lanes = bytes / 4;
typedef uint64_t u64v __attribute__((vector_size(bytes)));
typedef int64_t i64v __attribute__((vector_size(bytes)));
typedef uint32_t u32v __attribute__((vector_size(bytes)));
typedef int32_t i32v __attribute__((vector_size(bytes)));
typedef float f32v __attribute__((vector_size(bytes)));
typedef double f64v __attribute__((vector_size(bytes)));

FBK_INLINE f32v to_float(i32v a) { return __builtin_convertvector(a, f32v); }
FBK_INLINE i32v as_int(f32v a) { return (i32v)a; }
FBK_INLINE f32v as_float(i32v a) { return (f32v)a; }
// a - 0 and not a + 0, which is another number where a is -0, so that the compiler would add
FBK_INLINE f32v broadcast(float a) { return a - f32v{}; }
FBK_INLINE f64v broadcast(double a) { return a - f64v{}; }
FBK_INLINE f32v max(f32v a, f32v b) { return a > b ? a : b; }
FBK_INLINE f32v min(f32v a, f32v b) { return a < b ? a : b; }
FBK_INLINE f32v abs(f32v a) { return (f32v)((u32v)a & 0x7fffffffu); }

FBK_INLINE f32v load(const float* from) {
  f32v v;
  memcpy(&v, from, sizeof v);
  return v;
}
FBK_INLINE f64v load(const double* from) {
  f64v v;
  memcpy(&v, from, sizeof v);
  return v;
}
FBK_INLINE void store(float* to, f32v v) { memcpy(to, &v, sizeof v); }
FBK_INLINE void store(double* to, f64v v) { memcpy(to, &v, sizeof v); }

// The first n < lanes elements; the rest read as zero and are not touched.
#if defined(__AVX512F__)
FBK_INLINE f32v load(const float* from, int64_t n) {
  return (f32v)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), from);
}
FBK_INLINE void store(float* to, f32v v, int64_t n) { _mm512_mask_storeu_ps(to, __mmask16((1u << n) - 1), (__m512)v); }
FBK_INLINE f64v load(const double* from, int64_t n) {
  return (f64v)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), from);
}
FBK_INLINE void store(double* to, f64v v, int64_t n) { _mm512_mask_storeu_pd(to, __mmask8((1u << n) - 1), (__m512d)v); }
#elif defined(__AVX2__)
FBK_INLINE __m256i first_of_8(int64_t n) { return (__m256i)(i32v{0, 1, 2, 3, 4, 5, 6, 7} < int32_t(n)); }
FBK_INLINE __m256i first_of_4(int64_t n) { return (__m256i)(i64v{0, 1, 2, 3} < n); }
FBK_INLINE f32v load(const float* from, int64_t n) { return (f32v)_mm256_maskload_ps(from, first_of_8(n)); }
FBK_INLINE void store(float* to, f32v v, int64_t n) { _mm256_maskstore_ps(to, first_of_8(n), (__m256)v); }
FBK_INLINE f64v load(const double* from, int64_t n) { return (f64v)_mm256_maskload_pd(from, first_of_4(n)); }
FBK_INLINE void store(double* to, f64v v, int64_t n) { _mm256_maskstore_pd(to, first_of_4(n), (__m256d)v); }
#else
FBK_INLINE f32v load(const float* from, int64_t n) {
  f32v v{};
  for (int64_t i = 0; i < n; ++i) v[i] = from[i];
  return v;
}
FBK_INLINE void store(float* to, f32v v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = v[i];
}
FBK_INLINE f64v load(const double* from, int64_t n) {
  f64v v{};
  for (int64_t i = 0; i < n; ++i) v[i] = from[i];
  return v;
}
FBK_INLINE void store(double* to, f64v v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = v[i];
}
#endif

// bfloat16: the upper half of a float, rounded to nearest even; nan stays nan
struct bf16 {
  uint16_t bits;
};
FBK_INLINE float to_float(bf16 a) {
  uint32_t u = uint32_t(a.bits) << 16;
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}
FBK_INLINE bf16 to_bf16(float a) {
  uint32_t u;
  memcpy(&u, &a, sizeof u);
  if (a != a) return {uint16_t(u >> 16 | 0x40)};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
typedef uint16_t u16h __attribute__((vector_size(bytes / 2)));
FBK_INLINE f32v load(const bf16* from) {
  u16h v;
  memcpy(&v, from, sizeof v);
  return (f32v)(__builtin_convertvector(v, u32v) << 16);
}
FBK_INLINE f32v load(const bf16* from, int64_t n) {
  f32v v{};
  for (int64_t i = 0; i < n; ++i) v[i] = to_float(from[i]);
  return v;
}
FBK_INLINE void store(bf16* to, f32v a) {
  u32v u = (u32v)a;
  u = (a != a) ? (u >> 16 | 0x40) : ((u + 0x7fff + (u >> 16 & 1)) >> 16);
  u16h v = __builtin_convertvector(u, u16h);
  memcpy(to, &v, sizeof v);
}
FBK_INLINE void store(bf16* to, f32v a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_bf16(a[i]);
}

// a b + c, in one rounding where the CPU has it
#if defined(__AVX512F__)
FBK_INLINE f32v mul_add(f32v a, f32v b, f32v c) { return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
FBK_INLINE f64v mul_add(f64v a, f64v b, f64v c) { return (f64v)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
FBK_INLINE f32v sqrt(f32v a) { return (f32v)_mm512_sqrt_ps((__m512)a); }
#elif defined(__AVX2__)
FBK_INLINE f32v mul_add(f32v a, f32v b, f32v c) { return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
FBK_INLINE f64v mul_add(f64v a, f64v b, f64v c) { return (f64v)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
FBK_INLINE f32v sqrt(f32v a) { return (f32v)_mm256_sqrt_ps((__m256)a); }
#else
FBK_INLINE f32v mul_add(f32v a, f32v b, f32v c) { return a * b + c; }
FBK_INLINE f64v mul_add(f64v a, f64v b, f64v c) { return a * b + c; }
FBK_INLINE f32v sqrt(f32v a) {
  for (int i = 0; i < lanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
#endif

// clang has no __builtin_shuffle, gcc before 12 no __builtin_shufflevector
#ifdef __clang__
#define FBK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FBK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, i32v{__VA_ARGS__})
#endif

#ifdef __AVX2__
// Words of Philox stand in the low halves of 64-bit lanes. The high halves hold rubbish: 32-bit products do not read
// them, so nothing is masked between rounds, and one vpmuludq yields both halves of a product.
FBK_INLINE u64v high(u64v product) { return product >> 32; }
FBK_INLINE u64v low(u64v product) { return product; }
FBK_INLINE f32v fma(f32v a, f32v b, f32v c) { return mul_add(a, b, c); }
#endif
#if defined(__AVX512F__)
FBK_INLINE u64v mul32(u64v a, uint32_t b) { return (u64v)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b)); }
FBK_INLINE void interleave(f32v a, f32v b, f32v& low, f32v& high) {
  low = FBK_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  high = FBK_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(__AVX2__)
FBK_INLINE u64v mul32(u64v a, uint32_t b) { return (u64v)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b)); }
FBK_INLINE void interleave(f32v a, f32v b, f32v& low, f32v& high) {
  low = FBK_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = FBK_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#endif

FBK_INLINE float sum(f32v a) {
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a[i] += a[i + half];
  return a[0];
}

}  // namespace fbk
