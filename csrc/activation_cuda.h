#pragma once

#include <cmath>

#include "cuda.h"
#include "dispatch.h"

// phi and phi' of SPEC 1 for a thread of a GPU; activation.h has them for vectors of a CPU.
namespace fbk {

template <Activation kind>
__device__ inline float activate(float z) {
  if constexpr (kind == Activation::relu) return z < 0 ? 0 : z;  // nan goes through
  if constexpr (kind == Activation::tanh) return tanhf(z);
  if constexpr (kind == Activation::sigmoid) return 1 / (1 + expf(-z));
  if constexpr (kind == Activation::gelu) return 0.5f * z * (1 + erff(z * 0x1.6a09e6p-1f));
  return z;
}

// phi'(z) from h = phi(z); of gelu from z itself, which is what is kept of it
template <Activation kind>
__device__ inline float derivative(float h) {
  if constexpr (kind == Activation::relu) return h > 0 ? 1.0f : 0.0f;
  if constexpr (kind == Activation::tanh) return 1 - h * h;
  if constexpr (kind == Activation::sigmoid) return h * (1 - h);
  if constexpr (kind == Activation::gelu)
    return 0.5f * (1 + erff(h * 0x1.6a09e6p-1f)) + h * 0x1.988454p-2f * expf(-0.5f * h * h);
  return 1;
}

// calls f with the activation as a constant
template <class F>
__device__ inline auto with_activation(Activation kind, F f) {
  switch (kind) {
    case Activation::relu:
      return f.template operator()<Activation::relu>();
    case Activation::tanh:
      return f.template operator()<Activation::tanh>();
    case Activation::sigmoid:
      return f.template operator()<Activation::sigmoid>();
    case Activation::gelu:
      return f.template operator()<Activation::gelu>();
    default:
      return f.template operator()<Activation::identity>();
  }
}

}  // namespace fbk
