#pragma once

#include <cstdint>

// Always inlined: an out-of-line copy out of the AVX-512 object could be the one that the linker keeps for all.
#ifdef __CUDACC__
#define FBK_INLINE __host__ __device__ __forceinline__
#else
#define FBK_INLINE inline __attribute__((always_inline))
#endif

namespace fbk {

FBK_INLINE uint64_t mul32(uint64_t a, uint32_t b) { return uint64_t(uint32_t(a)) * b; }

// Four 32-bit words in the low halves of 64-bit lanes. The high halves hold rubbish: 32-bit products never read them,
// so no masking is needed between rounds, and one vpmuludq yields both halves of a product.
template <class U>
struct Words {
  U w[4];
};

// Philox4x32-10 (Salmon et al. 2011). U is uint64_t or a vector of them.
template <class U>
FBK_INLINE Words<U> philox(Words<U> c, uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    U p0 = mul32(c.w[0], 0xD2511F53u), p1 = mul32(c.w[2], 0xCD9E8D57u);
    c = {{(p1 >> 32) ^ c.w[1] ^ uint64_t(k0), p1, (p0 >> 32) ^ c.w[3] ^ uint64_t(k1), p0}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace fbk
