#pragma once

#include <cstdint>
#include <vector>

#include "dispatch.h"
#include "noise.h"

namespace fbk {

// A step of the local mirror (SPEC 4) of one layer: out = B + rate D Xi^T Xi with D = W - B.
struct MirrorLayer {
  const float *B, *W;  // [outputs, units], units those of the noise
  float* out;          // likewise
  int64_t outputs;
  NoiseParams noise;  // out unused
  float* residual;    // |D Xi^T|^2 / (samples |W|^2)

  FBK_INLINE float rate(NoiseKind kind) const {
    int64_t n = noise.samples + noise.units + (kind == NoiseKind::gaussian ? 1 : -1);
    return 1.0f / float(n > 1 ? n : 1);
  }
};

// |D Xi^T|^2 and |W|^2 of one output
struct MirrorSums {
  float unexplained, weight;
};

// Rows of layers that see the same noise.
struct MirrorRows {
  const MirrorLayer* layer;
  int64_t first, last;
  MirrorSums* sums;  // of row 0

  FBK_INLINE int64_t count() const { return last - first; }
};

void mirror_cpu(const std::vector<MirrorLayer>& layers, NoiseKind kind, Simd simd, int threads);
void mirror_cuda(const std::vector<MirrorLayer>& layers, NoiseKind kind, float* scratch, int device, void* stream);

constexpr int64_t mirror_samples = 64, mirror_units = 256;  // of a tile of noise on the CPU
// numbers of scratch that a task needs
FBK_INLINE int64_t mirror_scratch(int64_t rows, int64_t units) {
  return rows * (units + mirror_samples) + mirror_samples * (units + mirror_units);
}

constexpr int64_t mirror_tile = 64;  // of samples, outputs and units on a GPU
FBK_INLINE int64_t mirror_tiles(int64_t n) { return (n + mirror_tile - 1) / mirror_tile; }
FBK_INLINE int64_t mirror_responding(const MirrorLayer& l) {  // blocks
  return mirror_tiles(l.outputs) * mirror_tiles(l.noise.samples);
}
// numbers of scratch that all layers need on a GPU
inline int64_t mirror_scratch(const std::vector<MirrorLayer>& layers) {
  int64_t numbers = 0;
  for (const MirrorLayer& l : layers) numbers += l.outputs * l.noise.samples + 2 * mirror_responding(l);
  return numbers;
}

FBK_SIMD_DECLARE(void mirror(const MirrorRows* parts, int count, NoiseKind kind, float* scratch))

}  // namespace fbk
