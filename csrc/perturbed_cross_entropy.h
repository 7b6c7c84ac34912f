#pragma once

#include <cstdint>

namespace fbk {

// Cross-entropies of class indices, e = softmax - onehot, and what a perturbation of the logits did (SPEC 2).
struct PerturbedCrossEntropyParams {
  const double* logits;     // [samples, classes]
  const double* perturbed;  // [rows, classes], antithetic [2 rows, classes], +xi, then -xi; null: none
  const int64_t* target;    // [samples]; -100 is ignored
  double scale;             // of losses, e and dL
  bool antithetic;
  float *losses, *e;  // [samples], [samples, classes]
  float *dL, *dy;     // [rows], [rows, classes]
  bool* ok;           // [rows]: whether all of the sample is finite; where not, dL = dy = 0
  int64_t samples, classes, rows;
};

constexpr int64_t ignored_target = -100;  // torch's ignore_index

// std::out_of_range where a target is no class
void perturbed_cross_entropy_cpu(const PerturbedCrossEntropyParams& p, int threads);

}  // namespace fbk
