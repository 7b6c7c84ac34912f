#pragma once

#include <cstdint>

#include "dispatch.h"
#include "noise.h"

// What follows a library convolution or matrix product: bias, activation, pooling, noise, of the clean stream and of
// the difference to the perturbed one (SPEC 1).
namespace fbk {

enum class Pool { none, max, avg };
enum class Storage { float32, bfloat16 };

// Windows of [kernel_h, kernel_w] over maps of [height, width]; a layer without maps has one position.
struct Window {
  int64_t height, width, out_height, out_width, channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;

  FBK_INLINE int64_t units() const { return out_height * out_width * channels; }
};

struct PerturbedPointwiseParams {
  const void *z, *dz;         // [samples, height, width, channels], [rows, ...]; dz is null where it is zero
  const float *scale, *bias;  // [channels] or null: a normalisation as scale * z + bias and scale * dz
  void *h, *d;                // [samples, out_height, out_width, channels], [rows, ...]
  void* kept;                 // like h: the pre-activation behind each output of gelu; null otherwise
  uint8_t* winner;  // like h: the place in its window that max-pooling took, kernel_w * y + x; null without max-pooling
  Storage storage;
  Activation activation;
  bool pool_first;  // before the activation
  Pool pool;
  Window window;
  int64_t samples, rows;  // rows = noise_rows, or twice that: +xi, then -xi
  int64_t noise_rows;
  NoiseKind kind;
  NoiseParams noise;  // out unused; first is of sample 0
};

struct UnpoolParams {
  const void* delta;  // [samples, out_height, out_width, channels]
  const uint8_t* winner;
  void* out;  // [samples, height, width, channels]
  Storage storage;
  Window window;
  int64_t samples;
};

void perturbed_pointwise_cpu(const PerturbedPointwiseParams& params, Simd simd, int threads);
void unpool_cpu(const UnpoolParams& params, Simd simd, int threads);
void perturbed_pointwise_cuda(const PerturbedPointwiseParams& params, int device,
                              void* stream);  // of float32, as is unpool_cuda
void unpool_cuda(const UnpoolParams& params, int device, void* stream);

// units [first, last) of h of one sample, and of d where there is one
FBK_SIMD_DECLARE(void perturbed_pointwise(const PerturbedPointwiseParams&, int64_t sample, int64_t first, int64_t last))
FBK_SIMD_DECLARE(void unpool(const UnpoolParams&, int64_t sample))

}  // namespace fbk
