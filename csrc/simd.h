#pragma once

#include <immintrin.h>

#include <cstdint>

// For *_simd.cpp alone, which setup.py compiles once per instruction set; to be included before what is templated on
// these types. The types differ between the objects, so the overloads cannot be mixed up by the linker.
namespace fbk {

#ifdef __AVX512F__
constexpr int bytes = 64;
#else
constexpr int bytes = 32;
#endif
typedef uint64_t u64v __attribute__((vector_size(bytes)));
typedef uint32_t u32v __attribute__((vector_size(bytes)));
typedef int32_t i32v __attribute__((vector_size(bytes)));
typedef float f32v __attribute__((vector_size(bytes)));

// Words of Philox stand in the low halves of 64-bit lanes. The high halves hold rubbish: 32-bit products do not read
// them, so nothing is masked between rounds, and one vpmuludq yields both halves of a product.
inline u64v high(u64v product) { return product >> 32; }
inline u64v low(u64v product) { return product; }

inline f32v to_float(i32v a) { return __builtin_convertvector(a, f32v); }
inline i32v as_int(f32v a) { return (i32v)a; }
inline f32v as_float(i32v a) { return (f32v)a; }

#ifdef __AVX512F__
inline u64v mul32(u64v a, uint32_t b) { return (u64v)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b)); }
inline f32v fma(f32v a, f32v b, f32v c) { return _mm512_fmadd_ps(a, b, c); }
inline f32v sqrt(f32v a) { return _mm512_sqrt_ps(a); }
inline void interleave(f32v a, f32v b, f32v& low, f32v& high) {
  low = __builtin_shuffle(a, b, i32v{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
  high = __builtin_shuffle(a, b, i32v{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
}
#else
inline u64v mul32(u64v a, uint32_t b) { return (u64v)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b)); }
inline f32v fma(f32v a, f32v b, f32v c) { return _mm256_fmadd_ps(a, b, c); }
inline f32v sqrt(f32v a) { return _mm256_sqrt_ps(a); }
inline void interleave(f32v a, f32v b, f32v& low, f32v& high) {
  low = __builtin_shuffle(a, b, i32v{0, 8, 1, 9, 2, 10, 3, 11});
  high = __builtin_shuffle(a, b, i32v{4, 12, 5, 13, 6, 14, 7, 15});
}
#endif

}  // namespace fbk
