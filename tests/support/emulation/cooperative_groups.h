#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct Group {
  void sync() const { fbk::emulation::wait(fbk::emulation::Barrier::grid); }
};
inline Group this_grid() { return {}; }
inline Group this_cluster() { return {}; }

}  // namespace cooperative_groups
