#pragma once

// A *_simd.cpp is compiled once for each instruction set, into a namespace of that name; the CPU's best is chosen at
// run time. Such a file may call only what is always inlined or has internal linkage or lives in that namespace: of any
// other inline function the linker could keep the AVX-512 copy for all. So no templates of the standard library.
#ifdef __CUDACC__
#define FBK_INLINE __host__ __device__ __forceinline__
#else
#define FBK_INLINE inline __attribute__((always_inline))
#endif

namespace fbk {

enum class Simd { portable, avx2, avx512 };
enum class Activation { identity, relu, tanh, sigmoid, gelu };

}  // namespace fbk

#ifdef __x86_64__
#define FBK_SIMD_DECLARE(...) \
  namespace portable {        \
  __VA_ARGS__;                \
  }                           \
  namespace avx2 {            \
  __VA_ARGS__;                \
  }                           \
  namespace avx512 {          \
  __VA_ARGS__;                \
  }
#define FBK_SIMD_CALL(simd, ...)                     \
  ((simd) == fbk::Simd::avx512 ? avx512::__VA_ARGS__ \
   : (simd) == fbk::Simd::avx2 ? avx2::__VA_ARGS__   \
                               : portable::__VA_ARGS__)
#else
#define FBK_SIMD_DECLARE(...) \
  namespace portable {        \
  __VA_ARGS__;                \
  }
#define FBK_SIMD_CALL(simd, ...) (portable::__VA_ARGS__)
#endif
