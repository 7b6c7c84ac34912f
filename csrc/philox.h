#pragma once

#include <cstdint>

#include "dispatch.h"

namespace fbk {

FBK_INLINE uint64_t mul32(uint32_t a, uint32_t b) { return uint64_t(a) * b; }
FBK_INLINE uint32_t high(uint64_t product) { return uint32_t(product >> 32); }
FBK_INLINE uint32_t low(uint64_t product) { return uint32_t(product); }

template <class U>
struct Words {
  U w[4];
};

// Philox4x32-10 (Salmon et al. 2011). U is uint32_t or a vector type with mul32, high and low.
template <class U>
FBK_INLINE Words<U> philox(Words<U> c, uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    auto p0 = mul32(c.w[0], 0xD2511F53u), p1 = mul32(c.w[2], 0xCD9E8D57u);
    c = {{high(p1) ^ c.w[1] ^ k0, low(p1), high(p0) ^ c.w[3] ^ k1, low(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace fbk
