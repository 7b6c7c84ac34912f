#pragma once

#include <cstddef>
#include <cstdint>

#include "dispatch.h"
#include "noise.h"
#include "philox.h"

// Whole training steps of a multilayer perceptron (SPEC 1 to 5): the loop over steps is inside.
namespace fbk {

enum class Loss { mse, cross_entropy };
enum class MlpRule { ridge, lms, joint_loss, joint_output, fixed, weight_transport };
enum class Optimizer { sgd, momentum, adam };

// A layer, and the feedback point at its output where it is hidden.
struct MlpLayer {
  int64_t inputs, units, regressors;
  Activation activation;
  float *weight, *bias;              // [units, inputs], [units]
  float *weight_state, *bias_state;  // the optimiser's: none, the momentum, or Adam's two averages after each other
  float* B;                          // [units, regressors]
  double* statistics;  // ridge: [regressors, regressors]; V, or P = V^-1 with downdate; direct: the first alone
};

struct FusedMlpParams {
  static constexpr int max_layers = 32;
  MlpLayer layer[max_layers];
  int layers;
  Loss loss;
  MlpRule rule;
  Optimizer optimizer;
  NoiseKind noise;
  bool layerwise, downdate;
  float lr, noise_std;
  double rule_rate, forgetting;  // gamma of the ridge, lr of the others
  uint64_t seed;
  int64_t step, warmup, steps, batch;
  const float* x;         // [samples, inputs]
  const float* target;    // [samples, outputs], or
  const int64_t* labels;  // [samples]
  const int64_t* rows;    // [steps, batch] into the samples
  double* losses;         // [steps]

  static constexpr float joint_floor = 0.01f;  // of the mean of |r|^2: FLOOR of fbkernels/rules/joint.py
  FBK_INLINE bool perturbs() const { return rule != MlpRule::fixed && rule != MlpRule::weight_transport; }
  FBK_INLINE bool joint() const { return rule == MlpRule::joint_loss || rule == MlpRule::joint_output; }
  FBK_INLINE int regressions() const { return !perturbs() ? 0 : layerwise ? layers - 1 : 1; }
  // lr / (sigma^2 n_tot) of the joint rules (SPEC 4)
  FBK_INLINE double joint_rate() const {
    int64_t units = 0;
    for (int l = 0; l + 1 < layers; ++l) units += layer[l].units;
    return rule_rate / (double(noise_std) * double(noise_std) * double(units > batch ? units : batch));
  }
  // of the matrix that a ridge factors
  FBK_INLINE int64_t order(int r) const { return downdate ? batch : layer[r].regressors; }
};

// What a run needs besides: activities and the like are [units, columns], a column a sample, padded to whole vectors.
struct MlpScratch {
  static constexpr int max_layers = FusedMlpParams::max_layers, slices = 8;
  char* base;
  size_t size;
  int64_t pad, columns;
  float *h[max_layers], *slope[max_layers];                          // clean and perturbed side by side; phi'
  float *h_rows[max_layers], *delta[max_layers];                     // clean [batch, units]; delta, before it dL/dh
  float *noise[max_layers], *xi[max_layers], *residual[max_layers];  // [batch, units]; transposed; what is regressed
  float *error, *target;                                             // [outputs, pad]
  float *loss, *loss_change, *w, *ok;                                // [pad]
  float* prediction;                                                 // joint: [outputs, pad]
  float* gain[max_layers];                                           // Q [batch, regressors]
  double *R[max_layers], *U[max_layers], *Ut[max_layers], *T[max_layers], *S[max_layers], *inverse[max_layers];
  double* part[max_layers];  // [slices, regressors, pad]: of U
  const float** row;         // [threads, batch]
  int64_t* skipped;
  int64_t* taken;  // steps
  bool* failed;    // by regression: float64 does not carry it
  unsigned* barrier;

  template <class T>
  void take(T*& array, int64_t count) {
    array = reinterpret_cast<T*>(base + size);
    size += (size_t(count) * sizeof(T) + 127) / 64 * 64;  // whole cache lines
  }

  MlpScratch(const FusedMlpParams& p, char* memory, int threads) : base(memory), size(0) {
    const int last = p.layers - 1;
    const int64_t n = p.batch, outputs = p.layer[last].units;
    pad = (n + 15) / 16 * 16;
    columns = p.perturbs() ? 2 * pad : pad;
    for (int l = 0; l < p.layers; ++l) {
      const MlpLayer& layer = p.layer[l];
      take(h[l], layer.units * columns);
      take(slope[l], layer.units * pad);
      take(h_rows[l], layer.units * n);
      take(delta[l], layer.units * pad);
      take(noise[l], (layer.units + 3) / 4 * 4 * n);
      take(xi[l], layer.units * pad);
      take(residual[l], layer.units * pad);
    }
    take(error, outputs * pad), take(target, outputs * pad), take(prediction, outputs * pad);
    take(loss, pad), take(loss_change, pad), take(w, pad), take(ok, pad);
    for (int r = 0; r < p.regressions(); ++r) {
      const int64_t m = p.layer[r].regressors;
      take(gain[r], n * m);
      if (p.rule != MlpRule::ridge) continue;
      const int64_t k = p.order(r);
      take(R[r], m * pad), take(S[r], k * k), take(inverse[r], k * k);
      take(U[r], m * pad);
      if (p.downdate) take(Ut[r], m * n), take(T[r], m * n), take(part[r], slices * m * pad);
    }
    take(row, threads * n);
    take(skipped, 1);
    take(taken, 1);
    take(failed, p.layers);
    take(barrier, 1);
  }
};

struct FusedMlpResult {
  int64_t skipped;  // samples whose loss or loss change was not finite
  int64_t steps;    // taken
  bool failed;      // float64 does not carry a ridge; the last step then left B alone
};

FusedMlpResult fused_mlp_cpu(const FusedMlpParams& p, Simd simd, int threads);
// Everything is on the device, p.step too: counters are the steps, the skipped samples, and whether a ridge failed.
// With 0 blocks it chooses their number, which changes no bit. Where scratch [bytes] does not do, it says what is
// missing.
void fused_mlp_cuda(const FusedMlpParams& p, int64_t* counters, char* scratch, int64_t bytes, int blocks, int device,
                    void* stream, int64_t& missing);
// out <- the order of an epoch: the stable argsort of the Philox words of (seed, epoch, point 2^32 - 1), one a sample
void shuffle_cpu(int64_t* out, int64_t samples, uint64_t seed, int64_t epoch);

FBK_SIMD_DECLARE(void fused_mlp(const FusedMlpParams&, const MlpScratch&, int thread, int threads))

}  // namespace fbk
