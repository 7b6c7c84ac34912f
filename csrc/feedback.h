#pragma once

#include <cstdint>

#include "dispatch.h"
#include "noise.h"

namespace fbk {

// B <- B (I - M) + Xi^T G with Xi regenerated (SPEC 4), or, of M = R^T Q and G = w * Q, B <- B + (w * Xi - R B^T)^T Q;
// and the joint rules' prediction Xi' B with the noise Xi' of another step.
struct FeedbackUpdateParams {
  const float* B;          // [units, outputs]
  float* out;              // likewise; null: B stays, and the prediction alone is wanted
  const float *M, *G;      // [outputs, outputs] or null for 0, [rows, outputs]
  const float *R, *Q, *w;  // [rows, outputs], likewise, [rows]; null, or in place of M and G
  float* prediction;  // the sum, then its parts, [tasks + 1, predicted rows, outputs], on a GPU parts alone; or null
  int64_t units, outputs, rows, predicted_rows;
  NoiseKind kind;
  NoiseParams noise, predicted_noise;  // out unused; units are those of B

  static constexpr int64_t task_units = 1024, block_units = 64;
  FBK_INLINE int64_t tasks() const { return (units + task_units - 1) / task_units; }
  FBK_INLINE int64_t blocks() const { return (units + block_units - 1) / block_units; }  // of a GPU
};

// delta = (e B^T) * phi'(kept): the error of every unit before its activation (SPEC 3, direct)
struct FeedbackParams {
  const float *e, *B;  // [samples, outputs], [units, outputs]
  const void* kept;    // [samples, units]; what derivative() of activation.h reads; null for the identity
  void* delta;         // [samples, units]
  bool single;         // kept and delta are float32, else bfloat16
  Activation activation;
  int64_t samples, units, outputs;
};

void feedback_update_cpu(const FeedbackUpdateParams& params, Simd simd, int threads);
void feedback_cpu(const FeedbackParams& params, Simd simd, int threads);
void feedback_update_cuda(const FeedbackUpdateParams& params, int device, void* stream);
void feedback_cuda(const FeedbackParams& params, int device, void* stream);

FBK_SIMD_DECLARE(void feedback_update(const FeedbackUpdateParams&, int64_t task))
FBK_SIMD_DECLARE(void feedback(const FeedbackParams&, int64_t first, int64_t last))

constexpr int64_t feedback_block = 64;  // units of one call

}  // namespace fbk
