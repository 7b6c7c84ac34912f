#include <cuda_pipeline.h>

#include <algorithm>
#include <cmath>
#include <new>

#include "activation_cuda.h"
#include "cuda.h"
#include "fused_mlp.h"
#include "ridge_gain_cuda.h"

// One launch for many steps: blocks own units of every layer, four at a time, with their rows of W and B in shared
// memory where they fit, and meet at a barrier where one needs what others have computed. Every sum has one order: the
// result does not depend on the number of blocks.
namespace fbk {

namespace {

constexpr int warp_size = 32, warps = threads / warp_size;
constexpr int granule = 4;  // units of a warp's product
template <class T>
constexpr int strip = sizeof(T) == 8 ? 4 : 8;  // and samples: granule * strip sums, for as many lanes
constexpr int64_t most_work = 1 << 13;         // doubles in shared memory for a regression: 64 KB
constexpr int most_cluster = 8;                // blocks, on every device that has clusters

FBK_INLINE int64_t granules(int64_t n) { return (n + granule - 1) / granule; }

// Whether all blocks do a regression together, by csrc/ridge_gain_cuda.h; a small one is one block's.
FBK_INLINE bool by_all(const FusedMlpParams& p, int r) { return !p.downdate && p.order(r) > 64; }

// What a run needs besides, [samples, units padded to whole granules] where not said otherwise.
struct MlpDeviceScratch {
  static constexpr int max_layers = FusedMlpParams::max_layers;
  char* base;
  size_t size;
  float *h[max_layers], *slope[max_layers], *delta[max_layers];  // [2 samples, .], clean over perturbed; phi'; delta
  float *xi[max_layers], *residual[max_layers];                  // of two steps in turn; what is regressed
  float *usable[max_layers], *gain[max_layers];                  // [samples]; Q [samples, regressors]
  float *error, *loss, *loss_change, *w, *ok;                    // [samples, outputs padded]; [samples]
  double *U[max_layers], *T[max_layers];                         // [samples, regressors]
  double *S[max_layers], *inverse[max_layers];                   // [order, order]; S by all: RidgeGainParams::scratch
  int* failed;                                                   // any regression: float64 does not carry it

  template <class T>
  FBK_INLINE void take(T*& array, int64_t count) {
    array = reinterpret_cast<T*>(base + size);
    size += (size_t(count) * sizeof(T) + 127) / 128 * 128;
  }

  FBK_INLINE MlpDeviceScratch(const FusedMlpParams& p, char* memory) : base(memory), size(0) {
    const int64_t n = p.batch, outputs = granules(p.layer[p.layers - 1].units) * granule;
    for (int l = 0; l < p.layers; ++l) {
      const int64_t row = granules(p.layer[l].units) * granule;
      take(h[l], 2 * n * row), take(slope[l], n * row), take(delta[l], n * row);
      take(xi[l], 2 * n * row), take(residual[l], n * row);
    }
    take(error, n * outputs), take(loss, n), take(loss_change, n), take(w, n), take(ok, n), take(failed, 1);
    for (int r = 0; r < p.regressions(); ++r) {
      const int64_t m = p.layer[r].regressors, order = p.order(r);
      take(usable[r], n), take(gain[r], n * m);
      if (p.rule != MlpRule::ridge) continue;
      take(U[r], n * m);
      if (by_all(p, r))
        take(S[r], (3 * n + 2 * m) * m);
      else
        take(T[r], n * m), take(S[r], order * order), take(inverse[r], order * order);
    }
  }
};

// doubles that a ridge's regression needs close at hand: S, the inverse of its factor, and R and T where it keeps V
FBK_INLINE int64_t work_numbers(const FusedMlpParams& p, int r) {
  return 2 * p.order(r) * p.order(r) + (p.downdate ? 0 : 2 * p.batch * p.layer[r].regressors);
}

struct FusedMlpLaunch {
  FusedMlpParams p;
  int64_t* counters;  // steps, skipped samples, whether a ridge failed
  char* scratch;
  Span span;
  // where in a block's shared memory things are, in bytes; 0: they stay in global memory
  int work, work_numbers, inputs;
  int weight[FusedMlpParams::max_layers], B[FusedMlpParams::max_layers];
};
static_assert(sizeof(FusedMlpLaunch) <= 4096, "what older drivers pass to a kernel");

__device__ inline bool finite(float v) { return v * 0.0f == 0.0f; }

template <class T>
__device__ inline T warp_sum(T v, int among = warp_size) {
  for (int mask = among / 2; mask > 0; mask /= 2) v += __shfl_xor_sync(~0u, v, mask);
  return v;
}

// The rows of a strip of samples, from c0 on; the last strip repeats its first.
template <class T>
struct Samples {
  const float* data;
  int at[strip<T>];  // -1: counts as zeros

  __device__ Samples(const float* from, int width, int c0, int count, const float* usable = nullptr) : data(from) {
#pragma unroll
    for (int c = 0; c < strip<T>; ++c) {
      const int n = c0 + c < count ? c0 + c : c0;
      at[c] = usable == nullptr || usable[n] != 0 ? n * width : -1;
    }
  }
  __device__ float operator()(int c, int k) const { return at[c] < 0 ? 0 : data[at[c] + k]; }
};

// Sums over k, which the lanes share among them, of a(i, k) b(c, k) for a granule of i and a strip of c.
template <class T>
struct Dots {
  T sum[granule * strip<T>] = {};

  template <class A, class B>
  __device__ void add(int depth, int lane, A a, B b) {
#pragma unroll 2
    for (int k = lane; k < depth; k += warp_size) {
      T left[granule], right[strip<T>];
#pragma unroll
      for (int i = 0; i < granule; ++i) left[i] = T(a(i, k));
#pragma unroll
      for (int c = 0; c < strip<T>; ++c) right[c] = T(b(c, k));
#pragma unroll
      for (int i = 0; i < granule; ++i)
#pragma unroll
        for (int c = 0; c < strip<T>; ++c) sum[i * strip<T> + c] += left[i] * right[c];
    }
  }

  template <int half>
  __device__ void fold(int lane) {
    const bool upper = lane & half;
#pragma unroll
    for (int v = 0; v < half; ++v) {
      T give = upper ? sum[v] : sum[v + half];
      sum[v] = (upper ? sum[v + half] : sum[v]) + __shfl_xor_sync(~0u, give, half);
    }
    if constexpr (half > 1) fold<half / 2>(lane);
  }

  // the sum of i = lane / strip % granule, c = lane % strip: each exchange halves the values, or the lanes that share
  // one
  __device__ T reduce(int lane) {
    constexpr int values = granule * strip<T>;
    if constexpr (values < warp_size)
#pragma unroll
      for (int v = 0; v < values; ++v) sum[v] += __shfl_xor_sync(~0u, sum[v], values);
    fold<values / 2>(lane);
    return sum[0];
  }
};

struct Run {
  const FusedMlpLaunch& q;
  const FusedMlpParams& p;
  const MlpDeviceScratch& s;
  char* shared;
  const int lane = int(threadIdx.x) % warp_size, warp = int(threadIdx.x) / warp_size;
  const int block = int(blockIdx.x), blocks = int(gridDim.x);
  const int last;
  const int batch;
  int64_t step;
  double decay_mean, decay_square;  // Adam: 0.9^t and 0.999^t

  __device__ Run(const FusedMlpLaunch& launch, const MlpDeviceScratch& scratch, char* memory)
      : q(launch), p(q.p), s(scratch), shared(memory), last(p.layers - 1), batch(p.batch), step(q.counters[0]) {
    const double t = double(step > p.warmup ? step - p.warmup : 0);
    decay_mean = pow(0.9, t), decay_square = pow(0.999, t);
  }

  __device__ Team team() const { return {block, blocks, q.span}; }
  __device__ void wait() const { team().sync(); }

  // shares

  __device__ int row_of(int l) const { return granules(p.layer[l].units) * granule; }  // of scratch
  // of the granules of a layer, or of the rows of a P, the first that is this block's; the next are `blocks` further
  __device__ int first(int l) const { return (block + blocks - l % blocks) % blocks; }

  // f(j, g, c) for the block's own granules g, its j-th, and every strip of columns c, one a warp at a time
  template <class F>
  __device__ void strips(int l, int rows, int columns, int width, F f) const {
    const int begin = first(l), across = (columns + width - 1) / width;
    const int own = (granules(rows) - begin + blocks - 1) / blocks;
    for (int item = warp; item < own * across; item += warps) {
      const int j = item / across;
      f(j, begin + j * blocks, (item - j * across) * width);
    }
  }

  template <class F>
  __device__ void each_sample(F f) const {
    for (int n = block + warp * blocks; n < batch; n += blocks * warps) f(n);
  }

  __device__ float* resident(int offset, float* global, int j, int g, int row) const {
    return offset ? reinterpret_cast<float*>(shared + offset) + j * granule * row : global + g * granule * row;
  }
  __device__ float* weight(int l, int j, int g) const {
    return resident(q.weight[l], p.layer[l].weight, j, g, p.layer[l].inputs);
  }
  __device__ float* feedback(int l, int j, int g) const {
    return resident(q.B[l], p.layer[l].B, j, g, p.layer[l].regressors);
  }

  // copies the rows that the block keeps in shared memory there, or back
  __device__ void carry(bool in) const {
    auto rows = [&](int l, int width, int offset, float* global) {
      if (!offset) return;
      for (int g = first(l), j = 0; g < granules(p.layer[l].units); g += blocks, ++j) {
        const int left = p.layer[l].units - g * granule, count = (left < granule ? left : granule) * width;
        float *near = reinterpret_cast<float*>(shared + offset) + j * granule * width,
              *far = global + g * granule * width;
        for (int i = threadIdx.x; i < count; i += threads) *(in ? near + i : far + i) = *(in ? far + i : near + i);
      }
    };
    for (int l = 0; l < p.layers; ++l) {
      rows(l, p.layer[l].inputs, q.weight[l], p.layer[l].weight);
      rows(l, p.layer[l].regressors, q.B[l], p.layer[l].B);
    }
  }

  // the samples of a step

  __device__ const float* sample(int t, int n) const { return p.x + p.rows[t * batch + n] * p.layer[0].inputs; }

  __device__ const float* input(int t, int n) const {
    return q.inputs ? reinterpret_cast<float*>(shared + q.inputs) + n * p.layer[0].inputs : sample(t, n);
  }

  // begins to bring them into shared memory; __pipeline_wait_prior(0) and a barrier end it
  __device__ void fetch(int t) const {
    if (!q.inputs || t >= p.steps || first(0) >= granules(p.layer[0].units)) return;
    const int inputs = p.layer[0].inputs;
    auto copy = [&]<int bytes>() {
      for (int n = warp; n < batch; n += warps) {
        const char* from = reinterpret_cast<const char*>(sample(t, n));
        char* to = shared + q.inputs + n * inputs * 4;
        for (int i = lane * bytes; i < inputs * 4; i += warp_size * bytes)
          __pipeline_memcpy_async(to + i, from + i, bytes);
      }
    };
    inputs % 4 == 0 && uintptr_t(p.x) % 16 == 0 ? copy.template operator()<16>() : copy.template operator()<4>();
    __pipeline_commit();
  }

  __device__ float* noise_of(int64_t of_step, int l) const { return s.xi[l] + (of_step & 1) * batch * row_of(l); }

  template <NoiseKind kind>
  __device__ void make_noise(int64_t of_step) const {
    for (int l = 0; l < last; ++l) {
      const NoiseParams n{noise_of(of_step, l), &of_step, p.seed, uint32_t(l), p.noise_std, batch, row_of(l), 0};
      const int count = batch * n.per_sample(kind) * threads_per_counter<kind>;
      for (int t = block * threads + threadIdx.x; t < count; t += blocks * threads) noise_thread<kind>(n, t);
    }
  }
  __device__ void make_noise(int64_t of_step) const {
    if (!p.perturbs()) return;
    p.noise == NoiseKind::gaussian ? make_noise<NoiseKind::gaussian>(of_step)
                                   : make_noise<NoiseKind::rademacher>(of_step);
  }

  // forward

  __device__ void forward(int t, int l) const {
    const MlpLayer& layer = p.layer[l];
    const bool hidden = l < last, twice = p.perturbs();
    const int row = row_of(l), below = l == 0 ? 0 : row_of(l - 1), columns = twice && l > 0 ? 2 * batch : batch;
    strips(l, layer.units, columns, strip<float>, [&](int j, int g, int c0) {
      const float* W = weight(l, j, g);
      const int left = layer.units - g * granule;
      const float* rows[strip<float>];
#pragma unroll
      for (int c = 0; c < strip<float>; ++c) {
        const int n = c0 + c < columns ? c0 + c : c0;
        rows[c] = l == 0 ? input(t, n) : s.h[l - 1] + n * below;
      }
      Dots<float> dots;
      dots.add(
          layer.inputs, lane, [&](int i, int k) { return W[(i < left ? i : 0) * layer.inputs + k]; },
          [&](int c, int k) { return rows[c][k]; });
      const float sum = dots.reduce(lane);
      const int u = g * granule + lane / strip<float>, c = c0 + lane % strip<float>;
      if (u >= layer.units || c >= columns) return;
      const float z = sum + layer.bias[u], *xi = noise_of(step, l);
      with_activation(layer.activation, [&]<Activation kind>() {
        const float phi = activate<kind>(z);
        float* h = s.h[l] + u;
        if (c < batch) {
          h[c * row] = phi;
          s.slope[l][c * row + u] = derivative<kind>(kind == Activation::gelu ? z : phi);
          if (l == 0 && twice) h[(batch + c) * row] = phi + xi[c * row + u];
        } else {
          h[c * row] = hidden ? phi + xi[(c - batch) * row + u] : phi;
        }
      });
    });
  }

  // loss, its change, and e: a warp a sample

  __device__ void measure(int t) const {
    const int outputs = p.layer[last].units, row = row_of(last);
    each_sample([&](int n) {
      const int64_t at = p.rows[t * batch + n], label = p.labels == nullptr ? -1 : p.labels[at];
      const float *y = s.h[last] + n * row, *moved = p.perturbs() ? y + batch * row : y;
      const float* target = p.labels == nullptr ? p.target + at * outputs : nullptr;
      float *error = s.error + n * row, *delta = s.delta[last] + n * row, *slope = s.slope[last] + n * row;
      float poison = 0;  // nan where an output is not finite
      for (int j = lane; j < outputs; j += warp_size) poison += y[j] * 0.0f + moved[j] * 0.0f;
      poison = warp_sum(poison);
      float loss = 0, change = 0;
      if (p.loss == Loss::mse) {
        for (int j = lane; j < outputs; j += warp_size) {
          const float e = y[j] - (target != nullptr ? target[j] : j == label ? 1.0f : 0.0f), d = moved[j] - y[j];
          loss += 0.5f * e * e;
          change += d * (0.5f * d + e);
          error[j] = e;
          delta[j] = e * slope[j];
        }
        loss = warp_sum(loss), change = warp_sum(change);
      } else {
        // L~ - L = log(1 + sum_j softmax(y)_j (exp(d_j - d_t) - 1)) with d = y~ - y, t the class
        float top = y[0], sum = 0, ratio = 0, others = 0;
        const float chosen = y[label], shift = moved[label] - chosen;
        for (int j = lane; j < outputs; j += warp_size) top = y[j] > top ? y[j] : top;
        for (int mask = warp_size / 2; mask > 0; mask /= 2) {
          const float other = __shfl_xor_sync(~0u, top, mask);
          top = other > top ? other : top;
        }
        for (int j = lane; j < outputs; j += warp_size) sum += expf(y[j] - top);
        sum = warp_sum(sum);
        for (int j = lane; j < outputs; j += warp_size) {
          const float share = expf(y[j] - top) / sum;
          ratio += share * expm1f(moved[j] - y[j] - shift);
          others += j == label ? 0 : share;
          if (j != label) error[j] = share + poison;
        }
        ratio = warp_sum(ratio), others = warp_sum(others);
        // of the class itself not q - 1: e sums to zero, and the ridge would follow what is left of it
        if (lane == label % warp_size) error[label] = poison - others;
        for (int j = lane; j < outputs; j += warp_size) delta[j] = error[j] * slope[j];
        loss = float(log(double(sum))) + (top - chosen) + poison;
        change = float(log1p(double(ratio)));
      }
      poison += loss * 0.0f + change * 0.0f;
      const bool ok = poison == 0.0f;
      float bad = 0;  // delta, which is finite where the outputs and phi' are
      for (int j = lane; j < outputs; j += warp_size) bad += delta[j] * 0.0f;
      bad = warp_sum(bad);
      if (lane > 0) return;
      s.loss[n] = loss, s.loss_change[n] = ok ? change : 0, s.ok[n] = ok;
      s.w[n] = s.loss_change[n] / (p.noise_std * p.noise_std);
      for (int r = 0; r < p.regressions(); ++r) s.usable[r][n] = ok && (!p.layerwise || r < last - 1 || bad == 0.0f);
    });
  }

  // backward

  __device__ const float* regressor(int r) const { return p.layerwise ? s.delta[r + 1] : s.error; }
  __device__ int regressor_row(int r) const { return row_of(p.layerwise ? r + 1 : last); }

  // dL/dh_l through B, then lam - B r (of the joint rules: the predicted share in dL, by unit) and delta_l
  __device__ void backward(int l) const {
    const MlpLayer &layer = p.layer[l], &above = p.layer[l + 1];
    const bool transport = p.rule == MlpRule::weight_transport;
    const int row = row_of(l), width = regressor_row(l), m = layer.regressors;
    const float* R = regressor(l);
    strips(l, layer.units, batch, strip<float>, [&](int j, int g, int c0) {
      const int left = layer.units - g * granule;
      const float* B = transport ? above.weight + g * granule : feedback(l, j, g);
      const int unit = transport ? 1 : m, regress = transport ? above.inputs : 1;
      Dots<float> dots;
      dots.add(
          m, lane, [&](int i, int k) { return B[(i < left ? i : 0) * unit + k * regress]; },
          Samples<float>(R, width, c0, batch));
      const float dh = dots.reduce(lane);
      const int u = g * granule + lane / strip<float>, n = c0 + lane % strip<float>;
      if (u >= layer.units || n >= batch) return;
      const float delta = dh * s.slope[l][n * row + u];
      s.delta[l][n * row + u] = delta;
      if (!p.perturbs()) return;
      const float xi = noise_of(step, l)[n * row + u], residual = p.joint() ? xi * dh : s.w[n] * xi - dh;
      s.residual[l][n * row + u] = s.usable[p.layerwise ? l : 0][n] == 0 ? 0 : residual;
      if (p.layerwise && l > 0 && !finite(delta)) s.usable[l - 1][n] = 0;
    });
  }

  // learning B: Q of B <- B + E^T Q

  // of the rows of R laid end to end; zero where the sample does not count
  __device__ float regressor_at(int r, int i) const {
    const int m = p.layer[r].regressors, n = i / m;
    return s.usable[r][n] == 0 ? 0 : regressor(r)[n * regressor_row(r) + i - n * m];
  }

  // LMS, and joint on the loss: a gain of each sample's own
  __device__ void scale_regressors(int r) const {
    const int m = p.layer[r].regressors, row = regressor_row(r);
    float least = 0;  // that |r|^2 counts as
    if (p.rule == MlpRule::joint_loss) {
      for (int i = lane; i < batch * m; i += warp_size) least += regressor_at(r, i) * regressor_at(r, i);
      least = fmaxf(p.joint_floor * warp_sum(least) / float(batch), 1e-30f);
    }
    each_sample([&](int n) {
      const float* R = regressor(r) + n * row;
      float gain = float(p.rule_rate);
      if (p.rule == MlpRule::joint_loss) {
        float predicted = 0, power = 0;
        for (int l = 0; l < last; ++l)
          for (int u = lane; u < p.layer[l].units; u += warp_size) predicted += s.residual[l][n * row_of(l) + u];
        for (int j = lane; j < m; j += warp_size) power += R[j] * R[j];
        predicted = warp_sum(predicted), power = warp_sum(power);
        gain = float(p.joint_rate()) * (s.loss_change[n] - predicted) / fmaxf(power, least);
      }
      const bool use = s.usable[r][n] != 0;
      for (int j = lane; j < m; j += warp_size) s.gain[r][n * m + j] = use ? gain * R[j] : 0;
    });
  }

  // joint on the outputs: what sum_l Xi_l B_l leaves of their change
  __device__ void unpredicted() const {
    const int outputs = p.layer[last].units, row = row_of(last);
    strips(0, outputs, batch, strip<float>, [&](int, int g, int c0) {
      const int left = outputs - g * granule;
      Dots<float> dots;
      for (int l = 0; l < last; ++l) {
        const float *B = p.layer[l].B + g * granule, *xi = noise_of(step, l);
        const int width = row_of(l);
        dots.add(
            p.layer[l].units, lane, [&](int i, int k) { return B[k * outputs + (i < left ? i : 0)]; },
            Samples<float>(xi, width, c0, batch));
      }
      const float predicted = dots.reduce(lane);
      const int j = g * granule + lane / strip<float>, n = c0 + lane % strip<float>;
      if (j >= outputs || n >= batch) return;
      const float change = s.h[last][(batch + n) * row + j] - s.h[last][n * row + j];
      s.gain[0][n * outputs + j] = s.usable[0][n] == 0 ? 0 : (change - predicted) * float(p.joint_rate());
    });
  }

  // The inverse of L, lower triangular, of A = L L^T [n, n], of which the lower half is read, after a barrier, and
  // lost. One barrier a pivot: rows are scaled at the end. By one block; false where A is not positive definite.
  __device__ bool inverse_cholesky(double* A, double* inverse, int n) const {
    for (int i = threadIdx.x; i < n * n; i += threads) inverse[i] = i % (n + 1) == 0;
    __syncthreads();
    for (int k = 0; k < n; ++k) {
      const double pivot = A[k * n + k];
      if (!(pivot > 0)) {
        __syncthreads();  // A may be written again only when all have seen it
        return false;
      }
      const double scale = 1 / pivot;
      for (int i = k + 1 + warp; i < n; i += warps) {
        const double factor = A[i * n + k] * scale;
        for (int j = lane; j <= i; j += warp_size) {
          if (j > k)
            A[i * n + j] -= factor * A[j * n + k];
          else
            inverse[i * n + j] -= factor * inverse[k * n + j];
        }
      }
      __syncthreads();
    }
    for (int i = warp; i < n; i += warps) {
      const double scale = 1 / ::sqrt(A[i * n + i]);
      for (int j = lane; j <= i; j += warp_size) inverse[i * n + j] *= scale;
    }
    __syncthreads();
    return true;
  }

  // a factorisation's memory: shared where all of it fits
  struct Work {
    double *S, *inverse, *R, *T;
  };
  __device__ Work work(int r) const {
    const int square = p.order(r) * p.order(r), wide = batch * p.layer[r].regressors;
    if (work_numbers(p, r) > q.work_numbers) return {s.S[r], s.inverse[r], s.U[r], s.T[r]};
    double* base = reinterpret_cast<double*>(shared + q.work);
    return {base, base + square, base + 2 * square, base + 2 * square + wide};
  }

  // ridge by one block: V <- beta^N V + R^T D R, floored, and Q = D R V^-1
  __device__ void solve(int r) const {
    const int m = p.layer[r].regressors;
    double* V = p.layer[r].statistics;
    const auto [S, inverse, R, T] = work(r);
    const double keep = p.forgetting < 1 ? ::pow(p.forgetting, double(batch)) : 1, floor = (1 - keep) * p.rule_rate;
    for (int i = threadIdx.x; i < batch * m; i += threads) R[i] = double(regressor_at(r, i));
    __syncthreads();
    for (int i = threadIdx.x; i < m * m; i += threads) {
      const int a = i / m, b = i - a * m;
      double sum = 0, age = 1;
#pragma unroll 4
      for (int n = batch - 1; n >= 0; --n, age *= p.forgetting) sum += R[n * m + a] * (R[n * m + b] * age);
      S[i] = V[i] = keep * V[i] + (a == b ? floor : 0) + sum;
    }
    if (!inverse_cholesky(S, inverse, m)) {
      if (threadIdx.x == 0) *s.failed = 1;
      return;
    }
    for (int i = threadIdx.x; i < batch * m; i += threads) {
      const int n = i / m, k = i - n * m;
      double sum = 0;
#pragma unroll 4
      for (int j = 0; j <= k; ++j) sum += R[n * m + j] * inverse[k * m + j];
      T[i] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < batch * m; i += threads) {
      const int n = i / m, j = i - n * m;
      double sum = 0, age = p.forgetting < 1 ? ::pow(p.forgetting, double(batch - 1 - n)) : 1;
#pragma unroll 4
      for (int k = j; k < m; ++k) sum += T[n * m + k] * inverse[k * m + j];
      s.gain[r][i] = float(sum * age);
    }
    __syncthreads();  // the next one takes the same memory
  }

  // The same by all blocks: the regressors first, then, behind a barrier, the rest.
  __device__ void gather(int r) const {
    float* R = reinterpret_cast<float*>(s.U[r]);
    const int count = batch * p.layer[r].regressors;
    for (int i = block * threads + threadIdx.x; i < count; i += blocks * threads) R[i] = regressor_at(r, i);
  }
  __device__ void solve_by_all(int r) const {
    RidgeGainParams g{};
    g.R = reinterpret_cast<float*>(s.U[r]), g.V = g.V_out = p.layer[r].statistics, g.Q = s.gain[r], g.scratch = s.S[r];
    g.gamma = p.rule_rate, g.forgetting = p.forgetting, g.samples = batch, g.m = p.layer[r].regressors;
    g.failed = s.failed;
    ridge_gain(g, team(), 0, shared + q.work);
  }

  // The same from P = V^-1, which the N x N matrix S = I + R P R^T takes down to its next value; cheap where N < m.

  // U = P R^T, transposed: [samples, regressors]
  __device__ void project(int r) const {
    const int m = p.layer[r].regressors, row = regressor_row(r);
    const double* P = p.layer[r].statistics;
    const float *R = regressor(r), *usable = s.usable[r];
    strips(r, m, batch, strip<double>, [&](int, int g, int c0) {
      const int left = m - g * granule;
      Dots<double> dots;
      dots.add(
          m, lane, [&](int i, int k) { return P[(g * granule + (i < left ? i : 0)) * m + k]; },
          Samples<double>(R, row, c0, batch, usable));
      const double sum = dots.reduce(lane);
      const int u = g * granule + lane / strip<double>, n = c0 + lane % strip<double>;
      if (lane < granule * strip<double> && u < m && n < batch) s.U[r][n * m + u] = sum;
    });
    each_sample([&](int n) {
      float power = 0;
      for (int j = lane; j < m; j += warp_size) power += R[n * row + j] * R[n * row + j];
      power = warp_sum(power);
      // r^T P r is computed to eps |r|^2 / gamma, and counts beside 1
      if (lane == 0 && usable[n] != 0 && !(double(power) < 1e13 * p.rule_rate)) *s.failed = 1;
    });
  }

  __device__ void innovate(int r) const {
    const int m = p.layer[r].regressors, row = regressor_row(r);
    const float* R = regressor(r);
    const double* U = s.U[r];
    strips(r, batch, batch, strip<double>, [&](int, int g, int c0) {
      const int left = batch - g * granule;
      Dots<double> dots;
      dots.add(
          m, lane, [&](int i, int k) { return U[(g * granule + (i < left ? i : 0)) * m + k]; },
          Samples<double>(R, row, c0, batch, s.usable[r]));
      const double sum = dots.reduce(lane);
      const int i = g * granule + lane / strip<double>, n = c0 + lane % strip<double>;
      if (lane < granule * strip<double> && i < batch && n < batch) s.S[r][i * batch + n] = sum + (i == n ? 1 : 0);
    });
  }

  __device__ void factor(int r) const {
    const auto [S, inverse, R, T] = work(r);
    if (S != s.S[r])
      for (int i = threadIdx.x; i < batch * batch; i += threads) S[i] = s.S[r][i];
    if (!inverse_cholesky(S, inverse, batch)) {
      if (threadIdx.x == 0) *s.failed = 1;
      return;
    }
    if (inverse == s.inverse[r]) return;
    for (int i = threadIdx.x; i < batch * batch; i += threads) s.inverse[r][i] = inverse[i];
    __syncthreads();  // the next one takes the same memory
  }

  // T = L^-1 U^T and Q = L^-T T, with S = L L^T: a block for a chunk of columns
  __device__ void gains(int r) const {
    const int m = p.layer[r].regressors;
    const double *inverse = s.inverse[r], *U = s.U[r];
    double* T = s.T[r];
    for (int c0 = block * warp_size; c0 < m; c0 += blocks * warp_size) {
      const int j = c0 + lane < m ? c0 + lane : c0;
      for (int i = warp; i < batch; i += warps) {
        double sum = 0;
#pragma unroll 4
        for (int k = 0; k <= i; ++k) sum += inverse[i * batch + k] * U[k * m + j];
        if (c0 + lane < m) T[i * m + j] = sum;
      }
      __syncthreads();
      for (int i = warp; i < batch; i += warps) {
        double sum = 0;
#pragma unroll 4
        for (int k = i; k < batch; ++k) sum += inverse[k * batch + i] * T[k * m + j];
        if (c0 + lane < m) s.gain[r][i * m + j] = float(sum);
      }
    }
  }

  // sum over the samples of a(n, i) b(n, c), for the block's own rows i and all columns c, handed to emit(j, g, i, c,
  // sum)
  template <class T, class A, class B, class Emit>
  __device__ void outer(int l, int rows, int columns, A a, B b, Emit emit) const {
    constexpr int wide = sizeof(T) == 8 ? 2 : 4;
    strips(l, rows, columns, warp_size * wide, [&](int j, int g, int c0) {
      T sum[granule][wide] = {};
#pragma unroll 4
      for (int n = 0; n < batch; ++n) {
        T left[granule], right[wide];
#pragma unroll
        for (int i = 0; i < granule; ++i) left[i] = a(n, g * granule + i);
#pragma unroll
        for (int c = 0; c < wide; ++c) {
          const int at = c0 + c * warp_size + lane;
          right[c] = at < columns ? b(n, at) : T(0);
        }
#pragma unroll
        for (int i = 0; i < granule; ++i)
#pragma unroll
          for (int c = 0; c < wide; ++c) sum[i][c] += left[i] * right[c];
      }
#pragma unroll
      for (int i = 0; i < granule; ++i)
#pragma unroll
        for (int c = 0; c < wide; ++c) {
          const int at = c0 + c * warp_size + lane;
          if (g * granule + i < rows && at < columns) emit(j, g, i, at, sum[i][c]);
        }
    });
  }

  // P <- P - T^T T
  __device__ void downdate(int r) const {
    const int m = p.layer[r].regressors;
    double *P = p.layer[r].statistics, *T = s.T[r];
    outer<double>(
        r, m, m, [&](int n, int i) { return T[n * m + (i < m ? i : 0)]; }, [&](int n, int c) { return T[n * m + c]; },
        [&](int, int g, int i, int c, double v) { P[(g * granule + i) * m + c] -= v; });
  }

  __device__ void update_feedback(int l) const {
    const int m = p.layer[l].regressors, row = row_of(l);
    const float *E = p.joint() ? noise_of(step, l) : s.residual[l], *Q = s.gain[p.layerwise ? l : 0];
    outer<float>(
        l, p.layer[l].units, m, [&](int n, int u) { return E[n * row + u]; },
        [&](int n, int c) { return Q[n * m + c]; },
        [&](int j, int g, int i, int c, float v) {
          float& b = feedback(l, j, g)[i * m + c];
          if (finite(b + v)) b += v;  // W diverges, and B stays finite
        });
  }

  // learning W: the gradient never leaves the registers

  __device__ void descend(float* w, float* state, int size, float g, float rate, float root) const {
    if (p.optimizer == Optimizer::momentum) *state = g += 0.9f * *state;
    if (p.optimizer == Optimizer::adam) {
      const float mean = state[0] + 0.1f * (g - state[0]), square = 0.999f * state[size] + 0.001f * g * g;
      state[0] = mean, state[size] = square;
      g = mean / (sqrtf(square) / root + 1e-8f);
    }
    *w -= rate * g;
  }

  __device__ void learn(int t, int l) const {
    const MlpLayer& layer = p.layer[l];
    float rate = p.lr, root = 1;
    if (p.optimizer == Optimizer::adam) {
      rate = float(double(p.lr) / (1 - 0.9 * decay_mean));
      root = float(::sqrt(1 - 0.999 * decay_square));
    }
    const int row = row_of(l), below = l == 0 ? 0 : row_of(l - 1), size = layer.units * layer.inputs;
    const float *delta = s.delta[l], *h = l == 0 ? nullptr : s.h[l - 1];
    outer<float>(
        l, layer.units, layer.inputs, [&](int n, int u) { return delta[n * row + u]; },
        [&](int n, int c) { return h == nullptr ? input(t, n)[c] : h[n * below + c]; },
        [&](int j, int g, int i, int c, float v) {
          float* state = layer.weight_state + (g * granule + i) * layer.inputs + c;
          descend(weight(l, j, g) + i * layer.inputs + c, state, size, v, rate, root);
        });
    strips(l, layer.units, 1, 1, [&](int, int g, int) {
      constexpr int share = warp_size / granule;
      const int u = g * granule + lane / share;
      float sum = 0;
      for (int n = lane % share; n < batch; n += share) sum += u < layer.units ? delta[n * row + u] : 0;
      sum = warp_sum(sum, share);
      if (u < layer.units && lane % share == 0)
        descend(layer.bias + u, layer.bias_state + u, layer.units, sum, rate, root);
    });
  }

  __device__ void record(int t, int64_t& skipped) const {
    double total = 0;
    int bad = 0;
    for (int n = lane; n < batch; n += warp_size) {
      total += double(s.loss[n]);
      bad += s.ok[n] == 0;
    }
    total = warp_sum(total), bad = warp_sum(bad);
    if (lane == 0) p.losses[t] = total;
    skipped += bad;
  }

  // SPEC 5: the gradients of W use the B of before, B's update what this step measured. False where there is none.
  __device__ bool one(int t, int64_t& skipped) {
    __pipeline_wait_prior(0);
    __syncthreads();
    for (int l = 0; l < p.layers; ++l) forward(t, l), wait();
    measure(t), wait();
    for (int l = last - 1; l >= 0; --l) {
      backward(l);
      if (p.layerwise && l > 0) wait();
    }
    if (p.rule == MlpRule::joint_output) unpredicted();
    p.rule == MlpRule::joint_loss || p.rule == MlpRule::weight_transport ? wait() : __syncthreads();
    const bool learns_W = step >= p.warmup;
    const bool ridge = p.rule == MlpRule::ridge;
    for (int r = 0; r < p.regressions(); ++r) {
      // from the end: the first blocks own most units
      if (ridge && by_all(p, r)) gather(r);
      if (ridge && !by_all(p, r) && !p.downdate && block == blocks - 1 - r % blocks) solve(r);
      if (ridge && p.downdate) project(r);
      if (p.rule == MlpRule::lms || p.rule == MlpRule::joint_loss) scale_regressors(r);
    }
    if (learns_W)
      for (int l = 0; l < p.layers; ++l) learn(t, l);
    if (block == blocks - 1 && warp == warps - 1) record(t, skipped);
    make_noise(step + 1);
    __syncthreads();
    fetch(t + 1);
    wait();
    if (ridge && p.downdate) {
      for (int r = 0; r < p.regressions(); ++r) innovate(r);
      wait();
      for (int r = 0; r < p.regressions(); ++r)
        if (block == blocks - 1 - r % blocks) factor(r);
      wait();
    }
    for (int r = 0; r < p.regressions(); ++r)
      if (ridge && by_all(p, r)) solve_by_all(r), wait();
    if (ridge && *s.failed) return false;
    if (ridge && p.downdate) {
      for (int r = 0; r < p.regressions(); ++r) gains(r);
      wait();
      for (int r = 0; r < p.regressions(); ++r) downdate(r);
    }
    if (p.perturbs())
      for (int l = 0; l < last; ++l) update_feedback(l);
    if (learns_W) decay_mean *= 0.9, decay_square *= 0.999;
    ++step;
    return true;
  }
};

__global__ void __launch_bounds__(threads, 1) fused_mlp_kernel(const __grid_constant__ FusedMlpLaunch q) {
  char* shared = shared_memory();
  auto& s = *reinterpret_cast<MlpDeviceScratch*>(shared);
  if (threadIdx.x == 0) {
    new (shared) MlpDeviceScratch(q.p, q.scratch);
    if (blockIdx.x == 0) *s.failed = 0;
  }
  __syncthreads();
  Run run(q, s, shared);
  run.carry(true);
  run.fetch(0);
  run.make_noise(run.step);
  run.wait();
  int64_t t = 0, skipped = 0;
  while (t < q.p.steps && run.one(t, skipped)) ++t;
  run.wait();
  run.carry(false);
  if (run.block == run.blocks - 1 && run.warp == warps - 1 && run.lane == 0) {
    q.counters[0] = run.step + (t < q.p.steps);
    q.counters[1] += skipped;
    q.counters[2] = t < q.p.steps;
  }
}

}  // namespace

void fused_mlp_cuda(const FusedMlpParams& p, int64_t* counters, char* scratch, int64_t bytes, int blocks, int device,
                    void* stream, int64_t& missing) {
  const int64_t needed = int64_t(MlpDeviceScratch(p, nullptr).size);
  missing = needed > bytes ? needed : 0;
  if (missing) return;
  for (int l = 0; l < p.layers; ++l) {
    const MlpLayer& layer = p.layer[l];
    const int64_t widest = std::max({layer.inputs, 2 * p.batch, layer.regressors, layer.units});
    if ((layer.units + granule) * widest > INT32_MAX || p.batch * std::max(p.batch, p.steps) > INT32_MAX)
      throw std::invalid_argument("a layer, or a batch, is too large for 32-bit indices");
  }
  DeviceGuard guard(device);
  const int processors = attribute(cudaDevAttrMultiProcessorCount, device);
  const bool clusters = attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9;
  if (blocks == 0) {
    // a block for each so many products of a step, and no more than meet quickly where a cluster can carry the work
    int64_t products = 0;
    for (int l = 0; l < p.layers; ++l) products += p.batch * p.layer[l].inputs * p.layer[l].units;
    blocks = int(std::min<int64_t>(1 + products / 160000, processors));
    if (clusters && blocks < 2 * most_cluster) blocks = std::min(blocks, most_cluster);
  }
  FusedMlpLaunch q{};
  q.p = p, q.counters = counters, q.scratch = scratch;
  q.span = blocks == 1 ? Span::block : clusters && blocks <= most_cluster ? Span::cluster : Span::grid;

  int64_t used = (sizeof(MlpDeviceScratch) + 127) / 128 * 128;
  const int64_t limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  auto place = [&](int64_t bytes) {
    bytes = (bytes + 15) / 16 * 16;
    if (bytes == 0 || used + bytes > limit) return 0;
    used += bytes;
    return int(used - bytes);
  };
  int64_t work = 0;
  for (int r = 0; r < p.regressions() && p.rule == MlpRule::ridge; ++r) {
    if (by_all(p, r))
      work = ridge_gain_shared;
    else if (work_numbers(p, r) <= most_work)
      q.work_numbers = std::max(q.work_numbers, int(work_numbers(p, r)));
  }
  q.work = place(std::max<int64_t>(work, q.work_numbers * 8));
  if (work > 0 && q.work == 0) throw std::runtime_error("too little shared memory for a ridge of so many regressors");
  if (!q.work) q.work_numbers = 0;
  q.inputs = place(p.batch * p.layer[0].inputs * 4);
  for (int l = 0; l < p.layers; ++l) {
    const MlpLayer& layer = p.layer[l];
    const int64_t rows = (granules(layer.units) + blocks - 1) / blocks * granule;
    // transported weights and B of the joint rule on outputs are read by blocks that do not own them
    if (p.rule != MlpRule::weight_transport) q.weight[l] = place(rows * layer.inputs * 4);
    if (p.rule != MlpRule::joint_output && layer.B != nullptr) q.B[l] = place(rows * layer.regressors * 4);
  }
  check(cudaFuncSetAttribute(fused_mlp_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(used)));
  launch(fused_mlp_kernel, blocks, threads, size_t(used), stream, q, q.span);
}

}  // namespace fbk
