#pragma once

#include <cstdint>

#include "dispatch.h"

namespace fbk {

// One axis of a convolution behind a max-pool: window o holds the positions o * pool_stride - pool_padding + [0,
// pool_kernel).
struct PooledAxis {
  int64_t in, out, pooled;
  int64_t kernel, stride, padding, dilation;
  int64_t pool_kernel, pool_stride, pool_padding;
};

// The gradients of a convolution's weight and bias from the error at the winners of its max-pool.
struct PooledWeightGradientParams {
  const float* delta;     // [samples, pooled y, pooled x, outputs]
  const uint8_t* winner;  // the winner of each window, ky * pool_kernel + kx
  const void* input;      // [samples, y, x, inputs], float or bf16
  bool input_is_bf16;
  float *weight, *bias;
  int64_t weight_strides[4];  // of output, input, ky, kx
  int64_t samples, inputs, outputs;
  PooledAxis y, x;
};

// An input is packed, zero padded, `width` channels at a time: then a row of the kernel is contiguous. Columns that the
// dilation takes together are side by side. Bands of pooled rows share a buffer that stays in the L1 cache, and one
// list of winners.
struct PooledWeightGradientPlan {
  int64_t width, chunks, vectors;   // floats of a pixel; vectors in a row of the kernel
  int64_t cells, row, rows, image;  // columns of one residue; floats of a packed row; rows and floats of a band
  int64_t band, bands, map;         // pooled rows of a band, bands of a sample, positions of the output that it covers
  int64_t together, packs, images;  // bands packed together, how many times, their floats
  int64_t capacity;                 // winners of a pack at most
  int64_t sums;                     // floats of the gradient of an output with respect to a chunk
  int64_t lanes;

  FBK_INLINE PooledWeightGradientPlan(const PooledWeightGradientParams& p, int64_t vector_lanes) : lanes(vector_lanes) {
    auto parts = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    // whole rows of few channels, at unaligned places, or aligned chunks of as many channels as a vector has lanes
    bool few = 2 * parts(p.x.kernel * p.inputs, lanes) <= p.x.kernel * parts(p.inputs, lanes);
    width = few ? p.inputs : lanes;
    chunks = parts(p.inputs, width);
    vectors = parts(p.x.kernel * width, lanes);
    cells = parts((p.x.out - 1) * p.x.stride + (p.x.kernel - 1) * p.x.dilation + 1, p.x.dilation);
    row = cells * p.x.dilation * width;

    constexpr int64_t budget = 28 * 1024 / sizeof(float);
    int64_t lines = (budget / row - 1 - (p.y.kernel - 1) * p.y.dilation) / p.y.stride + 1;
    band = (lines - p.y.pool_kernel) / p.y.pool_stride + 1;
    band = band < 1 ? 1 : band > p.y.pooled ? p.y.pooled : band;
    bands = parts(p.y.pooled, band);
    band = parts(p.y.pooled, bands);
    lines = (band - 1) * p.y.pool_stride + p.y.pool_kernel;
    map = parts(lines * p.x.out, lanes) * lanes;
    rows = (lines - 1) * p.y.stride + (p.y.kernel - 1) * p.y.dilation + 1;
    image = rows * row;

    together = budget / image;
    if (together > p.samples * bands) together = p.samples * bands;
    if (together < 1) together = 1;
    packs = parts(p.samples * bands, together);
    images = together * image;
    capacity = together * band * p.x.pooled + lanes;
    sums = p.y.kernel * vectors * lanes;
  }
};

// Part of the gradient, by outputs and chunks of inputs, and what a thread needs for it.
struct PooledWeightGradientTask {
  int64_t first, last, first_chunk, last_chunk;
  const int32_t* places;  // of the positions of the convolution's output in a packed band
  float *map, *images, *sums;
  int32_t *winners, *counts;
  float* errors;
};

FBK_SIMD_DECLARE(
    // false where a winner with an error lies outside the convolution's output
    bool pooled_weight_gradient(const PooledWeightGradientParams&, const PooledWeightGradientPlan&,
                                const PooledWeightGradientTask&))

// std::invalid_argument where a winner with an error lies outside the convolution's output
void pooled_weight_gradient_cpu(const PooledWeightGradientParams& p, Simd simd, int threads);

}  // namespace fbk
