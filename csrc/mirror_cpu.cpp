#include "mirror.h"

#include <algorithm>
#include <cfloat>
#include <memory>

#include "threads.h"

namespace fbk {

namespace {

struct Task {
  std::vector<MirrorRows> parts;
  int64_t rows = 0;

  int64_t units() const { return parts[0].layer->noise.units; }
};

}  // namespace

void mirror_cpu(const std::vector<MirrorLayer>& layers, NoiseKind kind, Simd simd, int threads) {
  threads = std::min(threads, omp_get_num_procs());
  auto noise = [](const MirrorLayer* l) { return std::pair(l->noise.point, l->noise.units); };
  std::vector<const MirrorLayer*> order;
  int64_t outputs = 0;
  for (const MirrorLayer& layer : layers) order.push_back(&layer), outputs += layer.outputs;
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return noise(a) < noise(b); });

  std::vector<MirrorSums> sums(size_t(outputs), MirrorSums{});
  std::vector<Task> tasks;
  std::vector<int64_t> first(layers.size());
  for (size_t i = 1; i < layers.size(); ++i) first[i] = first[i - 1] + layers[i - 1].outputs;
  for (size_t begin = 0, end; begin < order.size(); begin = end) {
    for (end = begin; end < order.size() && noise(order[end]) == noise(order[begin]);) ++end;
    // each task makes the noise anew, which 128 rows make up for, and a cache holds so many
    constexpr int64_t most = 128;
    tasks.emplace_back();
    for (size_t i = begin; i < end; ++i)
      for (int64_t row = 0; row < order[i]->outputs;) {
        if (tasks.back().rows == most) tasks.emplace_back();
        Task& task = tasks.back();
        int64_t last = std::min(order[i]->outputs, row + most - task.rows);
        task.parts.push_back({order[i], row, last, sums.data() + first[size_t(order[i] - layers.data())]});
        task.rows += last - row;
        row = last;
      }
    if (tasks.back().parts.empty()) tasks.pop_back();
  }
  // the longest first, or the last one would keep a thread busy alone
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.rows * a.units() > b.rows * b.units(); });
  int64_t scratch = 0;
  for (const Task& task : tasks) scratch = std::max(scratch, mirror_scratch(task.rows, task.units()));

#pragma omp parallel num_threads(threads) if (threads > 1 && tasks.size() > 1)
  {
    auto own = std::make_unique_for_overwrite<float[]>(size_t(scratch));
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tasks.size(); ++i)
      FBK_SIMD_CALL(simd, mirror(tasks[i].parts.data(), int(tasks[i].parts.size()), kind, own.get()));
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    double unexplained = 0, weight = 0;
    for (int64_t row = 0; row < layers[i].outputs; ++row) {
      unexplained += sums[size_t(first[i] + row)].unexplained;
      weight += sums[size_t(first[i] + row)].weight;
    }
    *layers[i].residual = float(unexplained / std::max(double(layers[i].noise.samples) * weight, double(FLT_MIN)));
  }
}

}  // namespace fbk
