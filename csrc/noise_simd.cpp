#include "simd.h"
// after the vector types
#include "noise.h"

namespace fbk::FBK_SIMD {

#ifdef __AVX2__

constexpr int counters = bytes / 8;

static Words<u64v> words_at(const NoiseParams& p, uint64_t index) {
  u64v lane;
  for (int i = 0; i < counters; ++i) lane[i] = uint64_t(i);
  u64v c = lane + index;
  return philox(Words<u64v>{{c, c >> 32, u64v{} + uint64_t(*p.step), u64v{} + uint64_t(p.point)}}, p.seed);
}

// The place in out of a run of counters, each of which serves `Units` units of one row.
template <int Units>
struct Cursor {
  const NoiseParams& p;
  int64_t row, col;

  Cursor(const NoiseParams& params, int64_t counter, int64_t per_sample)
      : p(params), row(counter / per_sample), col(counter % per_sample * Units) {}

  bool fits(int64_t counters_left) const { return p.units % Units == 0 && counters_left >= counters; }
  float* at() const { return p.out + row * p.units + col; }
  int64_t count() const { return p.units - col < Units ? p.units - col : Units; }
  void advance(int n) {
    for (col += int64_t(n) * Units; col >= p.units; ++row) col -= (p.units + Units - 1) / Units * Units;
  }
};

static void gaussian(const NoiseParams& p, int64_t first, int64_t last) {
  Cursor<4> to(p, first, p.per_sample(NoiseKind::gaussian));
  for (int64_t i = first; i < last; i += counters) {
    auto [w] = words_at(p, p.first + uint64_t(i));
    // words 0 and 2 of a counter side by side in 32-bit lanes, likewise 1 and 3
    u64v low = u64v{} + 0xffffffffu;
    i32v a = (i32v)((u32v)((w[0] & low) | (w[2] << 32)) >> 8), b = (i32v)((u32v)((w[1] & low) | (w[3] << 32)) >> 8);
    f32v x, y, z[2];
    box_muller(a, b, p.std, x, y);
    interleave(x, y, z[0], z[1]);
    if (to.fits(last - i)) {
      memcpy(to.at(), z, sizeof z);
      to.advance(counters);
      continue;
    }
    float quads[counters][4];
    memcpy(quads, z, sizeof z);
    for (int64_t j = 0; j < counters && i + j < last; ++j) {
      if (to.count() == 4) {  // a fixed size spares the call of memcpy
        memcpy(to.at(), quads[j], sizeof quads[j]);
      } else {
        memcpy(to.at(), quads[j], size_t(to.count()) * sizeof(float));
      }
      to.advance(1);
    }
  }
}

static void rademacher(const NoiseParams& p, int64_t first, int64_t last) {
  Cursor<128> to(p, first, p.per_sample(NoiseKind::rademacher));
  u32v lane;
  for (int i = 0; i < lanes; ++i) lane[i] = uint32_t(i);
  u32v std = u32v{} + uint32_t(as_int(p.std));
  for (int64_t i = first; i < last; i += counters) {
    auto [w] = words_at(p, p.first + uint64_t(i));
    for (int64_t j = 0; j < counters && i + j < last; ++j) {
      u32v word;
      for (int l = 0; l < lanes; ++l) word[l] = uint32_t(w[l % 4][j]);
      u32v z[128 / lanes];
      for (int k = 0; k < 128 / lanes; ++k)
        z[k] = std ^ ((word << (31 - uint32_t(k * lanes / 4) - lane / 4)) & 0x80000000u);
      memcpy(to.at(), z, size_t(to.count()) * sizeof(float));
      to.advance(1);
    }
  }
}

void noise(const NoiseParams& p, NoiseKind kind, int64_t first, int64_t last) {
  kind == NoiseKind::gaussian ? gaussian(p, first, last) : rademacher(p, first, last);
}

#else

template <NoiseKind kind>
static void run(const NoiseParams& p, int64_t first, int64_t last) {
  for (int64_t t = first * threads_per_counter<kind>; t < last * threads_per_counter<kind>; ++t)
    noise_thread<kind>(p, t);
}

void noise(const NoiseParams& p, NoiseKind kind, int64_t first, int64_t last) {
  kind == NoiseKind::gaussian ? run<NoiseKind::gaussian>(p, first, last) : run<NoiseKind::rademacher>(p, first, last);
}

#endif

}  // namespace fbk::FBK_SIMD
