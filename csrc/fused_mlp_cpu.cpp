#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "fused_mlp.h"
#include "threads.h"

namespace fbk {

FusedMlpResult fused_mlp_cpu(const FusedMlpParams& p, Simd simd, int threads) {
  // a thread for each so many products of a step: with less to do, its data cost more on their way than it saves
  int64_t products = 0;
  for (int l = 0; l < p.layers; ++l) products += p.batch * p.layer[l].inputs * p.layer[l].units;
  threads = int(std::min<int64_t>({threads, omp_get_num_procs(), 1 + products / 600000}));
  MlpScratch measured(p, nullptr, threads);
  std::unique_ptr<char, decltype(&free)> memory(static_cast<char*>(aligned_alloc(64, measured.size)), &free);
  if (!memory) throw std::bad_alloc();
  memset(memory.get(), 0, measured.size);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    MlpScratch scratch(p, memory.get(), threads);
    FBK_SIMD_CALL(simd, fused_mlp(p, scratch, omp_get_thread_num(), omp_get_num_threads()));
  }
  MlpScratch scratch(p, memory.get(), threads);
  return {*scratch.skipped, *scratch.taken,
          std::any_of(scratch.failed, scratch.failed + p.layers, [](bool b) { return b; })};
}

void shuffle_cpu(int64_t* out, int64_t samples, uint64_t seed, int64_t epoch) {
  // stable radix sort of (word, sample) by 11-bit digits of the word
  struct Key {
    uint32_t word, sample;
  };
  std::vector<Key> keys(static_cast<size_t>(samples)), sorted(keys.size());
  for (size_t i = 0; i < keys.size(); ++i) {
    auto [w] = philox(Words<uint32_t>{{low(uint64_t(i)), 0, low(uint64_t(epoch)), UINT32_MAX}}, seed);
    keys[i] = {w[0], uint32_t(i)};
  }
  for (int shift = 0; shift < 32; shift += 11) {
    std::vector<size_t> place(1 << 11);
    auto digit = [shift](Key k) { return k.word >> shift & ((1 << 11) - 1); };
    for (Key k : keys) ++place[digit(k)];
    size_t sum = 0;
    for (size_t& n : place) sum += std::exchange(n, sum);
    for (Key k : keys) sorted[place[digit(k)]++] = k;
    keys.swap(sorted);
  }
  for (size_t i = 0; i < keys.size(); ++i) out[i] = keys[i].sample;
}

}  // namespace fbk
