#include "ridge_gain_cuda.h"

#include <algorithm>

namespace fbk {

namespace {

// One group after the other by all blocks together, or each by a block of its own.
struct RidgeLaunch {
  RidgeGainParams p;
  bool together;
};

__global__ void __launch_bounds__(threads) ridge_gain_kernel(RidgeLaunch l) {
  if (!l.together) return ridge_gain(l.p, {0, 1, Span::block}, blockIdx.x, shared_memory());
  for (int64_t group = 0; group < l.p.groups; ++group)
    ridge_gain(l.p, {int64_t(blockIdx.x), int64_t(gridDim.x), Span::grid}, group, shared_memory());
}

}  // namespace

void ridge_gain_cuda(const RidgeGainParams& p, int device, void* stream) {
  DeviceGuard guard(device);
  auto tiles = [](int64_t n) { return (n + tile - 1) / tile; };
  // what blocks can do at once: tiles behind the first panel, slices of the moments
  const int64_t side = tiles(p.m), factor = side * (side + tiles(p.samples));
  const int64_t jobs = std::max(factor, side * side * (p.samples / p.m));
  const bool together = jobs > 8;
  const int64_t blocks = std::min<int64_t>(jobs, attribute(cudaDevAttrMultiProcessorCount, device));
  RidgeLaunch l{p, together};
  l.p.slices = std::max<int64_t>(1, together ? std::min(p.samples / p.m, blocks / (side * side)) : 1);
  launch(ridge_gain_kernel, together ? blocks : p.groups, threads, ridge_gain_shared, stream, l,
         together ? Span::grid : Span::block);
}

}  // namespace fbk
