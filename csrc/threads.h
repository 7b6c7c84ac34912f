#pragma once

#ifdef _OPENMP
#include <omp.h>
#else  // one thread
inline int omp_get_num_procs() { return 1; }
inline int omp_get_num_threads() { return 1; }
inline int omp_get_thread_num() { return 0; }
#endif
