#include "fused_mlp.h"

#include <sched.h>

#include <cmath>
#include <cstring>

#include "activation.h"
#include "cholesky.h"
#include "matmul.h"
#include "simd.h"
// after the vector types
#include "noise.h"

// Threads own units of a layer, so that its weights stay in their core's cache, and never share a sum: the result does
// not depend on their number.
namespace fbk::FBK_SIMD {

namespace {

struct Range {
  int64_t first, last;

  int64_t size() const { return last - first; }
};

struct Rows {
  const float* data;
  int64_t row;

  FBK_INLINE const float* operator()(int64_t i) const { return data + i * row; }
};

struct Run {
  const FusedMlpParams& p;
  const MlpScratch& s;
  const int thread, threads;
  const int last = p.layers - 1;
  const int64_t pad = s.pad, columns = s.columns, batch = p.batch;
  const float** row = s.row + thread * batch;  // the samples of the step
  unsigned reached = 0;
  int64_t step = p.step;

  Range share(int64_t n) const { return {n * thread / threads, n * (thread + 1) / threads}; }

  void wait() {
    if (threads == 1) return;
    reached += unsigned(threads);
    unsigned now = __atomic_add_fetch(s.barrier, 1u, __ATOMIC_ACQ_REL);
    for (int spins = 0; int(now - reached) < 0; now = __atomic_load_n(s.barrier, __ATOMIC_ACQUIRE)) {
#ifdef __x86_64__
      __builtin_ia32_pause();
#endif
      if (++spins > 1000) sched_yield();
    }
  }

  bool hidden(int l) const { return l < last; }
  const float* regressor(int r) const { return p.layerwise ? s.delta[r + 1] : s.error; }

  // rows of noise are padded to whole counters, which changes no number and spares the generator the odd ends
  int64_t noise_row(int l) const { return (p.layer[l].units + 3) / 4 * 4; }

  // the noise of a step at every point, by counters
  void make_noise(int64_t of_step) const {
    if (!p.perturbs()) return;
    for (int l = 0; l < last; ++l) {
      NoiseParams n{s.noise[l], &of_step, p.seed, uint32_t(l), p.noise_std, batch, noise_row(l), 0};
      Range own = share(batch * n.per_sample(p.noise));
      if (own.size()) fbk::FBK_SIMD::noise(n, p.noise, own.first, own.last);
    }
  }

  // forward

  template <Activation kind>
  void activate(int l, Range own) const {
    for (int64_t u = own.first; u < own.last; ++u) {
      float *h = s.h[l] + u * columns, *slope = s.slope[l] + u * pad, *xi = s.xi[l] + u * pad;
      f32v bias = broadcast(p.layer[l].bias[u]);
      for (int64_t c = 0; c < pad; c += lanes) {
        f32v z = load(h + c) + bias, phi = fbk::activate<kind>(z);
        store(h + c, phi);
        store(slope + c, derivative<kind>(kind == Activation::gelu ? z : phi));
        if (!p.perturbs()) continue;
        f32v q = l == 0 ? phi : fbk::activate<kind>(load(h + pad + c) + bias);
        store(h + pad + c, hidden(l) ? q + load(xi + c) : q);
      }
    }
  }

  void forward(int l) const {
    const MlpLayer& layer = p.layer[l];
    Range own = share(layer.units);
    if (!own.size()) return;
    float* h = s.h[l];
    if (l == 0) {
      const float** x = row;
      dot(
          own.size(), batch, layer.inputs, Rows{layer.weight + own.first * layer.inputs, layer.inputs},
          [=](int64_t i) { return x[i]; }, h + own.first * columns, columns);
    } else {
      const int64_t stride = columns;
      outer(own.first, own.last, columns, layer.inputs, Strided<float>{layer.weight, layer.inputs, 1},
            Rows{s.h[l - 1], columns}, [=](int64_t i, int64_t c, f32v z, int64_t) { store(h + i * stride + c, z); });
    }
    if (hidden(l) && p.perturbs())
      transpose(batch, own.size(), Rows{s.noise[l] + own.first, noise_row(l)}, s.xi[l] + own.first * pad, pad);
    switch (layer.activation) {
      case Activation::identity:
        activate<Activation::identity>(l, own);
        break;
      case Activation::relu:
        activate<Activation::relu>(l, own);
        break;
      case Activation::tanh:
        activate<Activation::tanh>(l, own);
        break;
      case Activation::sigmoid:
        activate<Activation::sigmoid>(l, own);
        break;
      case Activation::gelu:
        activate<Activation::gelu>(l, own);
        break;
    }
    if (hidden(l))
      transpose(own.size(), batch, Rows{h + own.first * columns, columns}, s.h_rows[l] + own.first, layer.units);
  }

  // loss, its change, and e, for the samples [c, c + lanes)

  void measure(int64_t t) const {
    const int64_t* rows = p.rows + t * batch;
    const int64_t outputs = p.layer[last].units;
    for (int64_t g = thread; g * lanes < batch; g += threads) {
      int64_t c = g * lanes, count = batch - c < lanes ? batch - c : lanes;
      i32v label{};
      if (p.labels != nullptr) {
        for (int64_t i = 0; i < count; ++i) label[i] = int32_t(p.labels[rows[c + i]]);
      } else {
        const float* target = p.target;
        transpose(count, outputs, [=](int64_t i) { return target + rows[c + i] * outputs; }, s.target + c, pad);
      }
      const float *y = s.h[last] + c, *perturbed = y + (p.perturbs() ? pad : 0);
      f32v loss{}, change{}, poison{};  // poison: nan where an output is not finite
      for (int64_t j = 0; j < outputs; ++j)
        poison += load(y + j * columns) * 0.0f + load(perturbed + j * columns) * 0.0f;
      if (p.loss == Loss::mse) {
        for (int64_t j = 0; j < outputs; ++j) {
          f32v z = load(y + j * columns), d = load(perturbed + j * columns) - z;
          f32v target =
              p.labels == nullptr ? load(s.target + c + j * pad) : (label == int32_t(j) ? broadcast(1.0f) : f32v{});
          f32v e = z - target;
          loss = mul_add(0.5f * e, e, loss);
          change = mul_add(d, mul_add(broadcast(0.5f), d, e), change);
          store(s.error + c + j * pad, e);
        }
      } else {
        // L~ - L = log(1 + sum_j softmax(y)_j (exp(d_j - d_t) - 1)) with d = y~ - y, t the class
        f32v top = load(y), sum{}, ratio{}, chosen{}, moved{}, others{};
        for (int64_t j = 0; j < outputs; ++j) {
          f32v z = load(y + j * columns);
          top = max(z, top);
          chosen = label == int32_t(j) ? z : chosen;
          moved = label == int32_t(j) ? load(perturbed + j * columns) - z : moved;
        }
        for (int64_t j = 0; j < outputs; ++j) sum += fbk::exp(load(y + j * columns) - top);
        for (int64_t j = 0; j < outputs; ++j) {
          f32v z = load(y + j * columns), d = load(perturbed + j * columns) - z, q = fbk::exp(z - top) / sum;
          ratio = mul_add(q, expm1(d - moved), ratio);
          others += label == int32_t(j) ? f32v{} : q;
          store(s.error + c + j * pad, q + poison);
        }
        // of the class itself not q - 1: e sums to zero, and the ridge would follow what is left of it
        for (int64_t j = 0; j < outputs; ++j) {
          float* e = s.error + c + j * pad;
          store(e, label == int32_t(j) ? poison - others : load(e));
        }
        for (int i = 0; i < lanes; ++i) {
          loss[i] = float(std::log(double(sum[i])));
          change[i] = float(std::log1p(double(ratio[i])));
        }
        loss += top - chosen + poison;
      }
      poison += loss * 0.0f + change * 0.0f;
      f32v ok = poison == 0.0f ? broadcast(1.0f) : f32v{};
      change = poison == 0.0f ? change : f32v{};
      for (int64_t j = 0; j < outputs; ++j)
        store(s.delta[last] + c + j * pad, load(s.error + c + j * pad) * load(s.slope[last] + c + j * pad));
      store(s.loss + c, loss);
      store(s.ok + c, ok);
      store(s.loss_change + c, change);
      store(s.w + c, change / (p.noise_std * p.noise_std));
    }
  }

  // the samples that count in a regression: all its regressors are finite
  f32v usable(int r, int64_t c) const {
    f32v poison{};
    const float* R = regressor(r) + c;
    for (int64_t j = 0; j < p.layer[r].regressors; ++j) poison += load(R + j * pad) * 0.0f;
    return poison == 0.0f ? load(s.ok + c) : f32v{};
  }

  // backward

  // dL/dh_l through B, then lam - B r (of the joint rules: the predicted share in dL, by unit) and delta_l
  void backward(int l) const {
    const MlpLayer& layer = p.layer[l];
    Range own = share(layer.units);
    if (!own.size()) return;
    const int64_t stride = pad;
    float* to = s.delta[l];
    const MlpLayer& above = p.layer[l + 1];
    Strided<float> B = p.rule == MlpRule::weight_transport ? Strided<float>{above.weight, 1, above.inputs}
                                                           : Strided<float>{layer.B, layer.regressors, 1};
    outer(own.first, own.last, pad, layer.regressors, B, Rows{regressor(l), pad},
          [=](int64_t i, int64_t c, f32v g, int64_t) { store(to + i * stride + c, g); });
    const bool joint = p.joint();
    for (int64_t c = 0; c < pad; c += lanes) {
      f32v w = load(s.w + c), count = p.perturbs() ? usable(p.layerwise ? l : 0, c) : f32v{};
      for (int64_t u = own.first; u < own.last; ++u) {
        float* at = to + u * pad + c;
        f32v g = load(at), xi = load(s.xi[l] + u * pad + c);
        f32v residual = joint ? xi * g : w * xi - g;
        store(s.residual[l] + u * pad + c, count == 0.0f ? f32v{} : residual);
        store(at, g * load(s.slope[l] + u * pad + c));
      }
    }
  }

  // joint rules on outputs: sum_l Xi_l B_l
  void predict() const {
    const int64_t outputs = p.layer[last].units;
    Range own = share(outputs);
    float* to = s.prediction;
    const int64_t stride = pad;
    memset(to + own.first * pad, 0, size_t(own.size() * pad) * sizeof(float));
    for (int l = 0; l < last; ++l)
      outer(own.first, own.last, pad, p.layer[l].units, Strided<float>{p.layer[l].B, 1, outputs}, Rows{s.xi[l], pad},
            [=](int64_t i, int64_t c, f32v v, int64_t) {
              float* at = to + i * stride + c;
              store(at, load(at) + v);
            });
  }

  // learning B: Q of B <- B + E^T Q

  // The serial part of regression r.
  void regress(int r) const {
    const int64_t m = p.layer[r].regressors;
    float* Q = s.gain[r];
    const double scale = p.joint_rate();
    if (p.rule == MlpRule::joint_output) {
      for (int64_t c = 0; c < pad; c += lanes) {
        f32v use = usable(r, c);
        for (int64_t j = 0; j < m; ++j) {
          const float* y = s.h[last] + j * columns + c;
          float* at = s.prediction + j * pad + c;
          f32v left = (load(y + pad) - load(y) - load(at)) * float(scale);
          store(at, use == 0.0f ? f32v{} : left);
        }
      }
      transpose(m, batch, Rows{s.prediction, pad}, Q, m);
      return;
    }
    if (p.rule == MlpRule::ridge && p.downdate) {
      for (int64_t c = 0; c < pad; c += lanes) {
        f32v use = usable(r, c), power{};
        for (int64_t j = 0; j < m; ++j) {
          f32v v = load(regressor(r) + j * pad + c);
          v = use == 0.0f ? f32v{} : v;
          for (int i = 0; i < lanes; ++i) s.R[r][j * pad + c + i] = double(v[i]);
          power = mul_add(v, v, power);
        }
        // r^T P r is computed to eps |r|^2 / gamma, and counts beside 1
        for (int i = 0; i < lanes; ++i) s.failed[r] |= !(double(power[i]) < 1e13 * p.rule_rate);
      }
      return;
    }
    transpose(m, batch, Rows{regressor(r), pad}, Q, m);
    auto power = [&](int64_t c) {
      f32v sum{};
      for (int64_t j = 0; j < m; ++j) {
        f32v v = load(regressor(r) + j * pad + c);
        sum = mul_add(v, v, sum);
      }
      return usable(r, c) == 0.0f ? f32v{} : sum;
    };
    float total = 0;
    if (p.rule == MlpRule::joint_loss)
      for (int64_t c = 0; c < batch; c += lanes) {
        f32v each = power(c);
        for (int i = 0; i < lanes && c + i < batch; ++i) total += each[i];
      }
    // that |r|^2 counts as
    f32v least = max(broadcast(p.joint_floor * total / float(batch)), broadcast(1e-30f));
    for (int64_t c = 0; c < batch; c += lanes) {
      f32v use = usable(r, c), gain = broadcast(float(p.rule_rate));
      if (p.rule == MlpRule::joint_loss) {
        f32v predicted{};
        for (int l = 0; l < last; ++l)
          for (int64_t u = 0; u < p.layer[l].units; ++u) predicted += load(s.residual[l] + u * pad + c);
        gain = float(scale) * (load(s.loss_change + c) - predicted) / max(power(c), least);
      }
      for (int64_t i = 0; i < lanes && c + i < batch; ++i) {
        float* q = Q + (c + i) * m;
        if (use[i] == 0)
          memset(q, 0, size_t(m) * sizeof(float));
        else if (p.rule != MlpRule::ridge)
          for (int64_t j = 0; j < m; ++j) q[j] *= gain[i];
      }
    }
    if (p.rule == MlpRule::ridge) solve(r);
  }

  // ridge: V <- beta^N V + R^T D R, floored, and Q = D R V^-1, with the rows of R in Q
  void solve(int r) const {
    const int64_t m = p.layer[r].regressors;
    double *V = p.layer[r].statistics, *R = s.R[r], *weighted = s.U[r], *S = s.S[r], *inverse = s.inverse[r];
    float* Q = s.gain[r];
    double age = 1;
    for (int64_t n = batch - 1; n >= 0; --n, age *= p.forgetting)
      for (int64_t j = 0; j < m; ++j) {
        R[n * m + j] = double(Q[n * m + j]);
        weighted[n * m + j] = R[n * m + j] * age;
      }
    if (p.forgetting < 1) {
      for (int64_t i = 0; i < m * m; ++i) V[i] *= age;
      for (int64_t i = 0; i < m; ++i) V[i * m + i] += (1 - age) * p.rule_rate;
    }
    auto row_of = [=](const double* data) { return [=](int64_t k) { return data + k * m; }; };
    outer(0, m, m, batch, Strided<double>{R, 1, m}, row_of(weighted), [=](int64_t i, int64_t c, f64v v, int64_t n) {
      v += get(V + i * m + c, n);
      put(V + i * m + c, v, n);
      put(S + i * m + c, v, n);
    });
    if (!inverse_cholesky(S, inverse, m)) {
      s.failed[r] = true;
      return;
    }
    outer(0, m, m, m, Strided<double>{inverse, 1, m}, row_of(inverse),
          [=](int64_t i, int64_t c, f64v v, int64_t n) { put(S + i * m + c, v, n); });
    outer(0, batch, m, m, Strided<double>{weighted, m, 1}, row_of(S),
          [=](int64_t i, int64_t c, f64v v, int64_t n) { narrow(Q + i * m + c, v, n); });
  }

  // The same from P = V^-1, which the N x N matrix I + R P R^T takes down to its next value; cheap where N < m.
  // Of P the rows up to the diagonal, cut into slices of the same size whatever the number of threads.
  static constexpr int slices = MlpScratch::slices;
  Range slice(int64_t m, int g) const {
    auto bound = [m](int i) { return int64_t(double(m) * std::sqrt(double(i) / slices)); };
    return {bound(g), bound(g + 1)};
  }

  template <class F>
  void blocks(int r, int g, F visit) const {
    constexpr int64_t block = 48;
    Range own = slice(p.layer[r].regressors, g);
    for (int64_t i = own.first; i < own.last; i += block) visit(Range{i, own.last - i < block ? own.last : i + block});
  }

  // A slice's part of U = P R^T, and before it what is left of the step before: P <- P - T^T T, while it is in the
  // cache.
  void project(int r, int g, bool pending) const {
    constexpr int64_t deep = 96;
    const int64_t m = p.layer[r].regressors, stride = pad, first = slice(m, g).first;
    double *R = s.R[r], *U = s.part[r] + g * m * pad, *P = p.layer[r].statistics;
    blocks(r, g, [=, this](Range rows) {
      const int64_t i0 = rows.first, i1 = rows.last;
      if (pending) downdate(r, rows);
      for (int64_t k0 = 0; k0 < i1; k0 += deep) {
        const int64_t k1 = i1 - k0 < deep ? i1 : k0 + deep;
        auto into = [=](bool fresh) {
          return [=](int64_t i, int64_t c, f64v v, int64_t n) {
            double* at = U + i * stride + c;
            put(at, fresh ? v : v + get(at, n), n);
          };
        };
        outer(
            i0, i1, batch, k1 - k0, Strided<double>{P + k0, m, 1}, [=](int64_t k) { return R + (k0 + k) * stride; },
            into(k0 == 0));
        outer(
            k0, k1 < i0 ? k1 : i0, batch, i1 - i0, Strided<double>{P + i0 * m, 1, m},
            [=](int64_t k) { return R + (i0 + k) * stride; }, into(i0 == first));
      }
    });
  }

  // U, the sum of the slices' parts
  void gather(int r) const {
    const int64_t m = p.layer[r].regressors;
    Range own = share(m);
    double *U = s.U[r], *Ut = s.Ut[r];
    bool filled[slices];
    for (int g = 0; g < slices; ++g) filled[g] = slice(m, g).size() > 0;
    for (int64_t i = own.first; i < own.last; ++i) {
      int within = 0;
      while (slice(m, within).last <= i) ++within;
      for (int64_t c = 0; c < pad; c += bytes / 8) {
        f64v v{};
        for (int g = within; g < slices; ++g)
          if (filled[g]) v += load(s.part[r] + (g * m + i) * pad + c);
        store(U + i * pad + c, v);
        for (int64_t k = 0; k < bytes / 8 && c + k < batch; ++k) Ut[(c + k) * m + i] = v[k];
      }
    }
  }

  // S = I + R U
  void innovate(int r) const {
    const int64_t m = p.layer[r].regressors, stride = pad, n_rows = batch;
    Range own = share(batch);
    double *U = s.U[r], *S = s.S[r];
    outer(
        own.first, own.last, batch, m, Strided<double>{s.R[r], 1, pad}, [=](int64_t k) { return U + k * stride; },
        [=](int64_t i, int64_t c, f64v v, int64_t n) { put(S + i * n_rows + c, v, n); });
    for (int64_t i = own.first; i < own.last; ++i) S[i * batch + i] += 1;
  }

  // T = L^-1 U^T and Q^T = T^T L^-1, with S = L L^T
  void gains(int r) const {
    const int64_t m = p.layer[r].regressors;
    Range own = share(m);
    double *Ut = s.Ut[r] + own.first, *T = s.T[r] + own.first;
    float* Q = s.gain[r] + own.first;
    outer(
        0, batch, own.size(), batch, Strided<double>{s.inverse[r], batch, 1}, [=](int64_t k) { return Ut + k * m; },
        [=](int64_t i, int64_t c, f64v v, int64_t n) { put(T + i * m + c, v, n); });
    outer(
        0, batch, own.size(), batch, Strided<double>{s.inverse[r], 1, batch}, [=](int64_t k) { return T + k * m; },
        [=](int64_t i, int64_t c, f64v v, int64_t n) { narrow(Q + i * m + c, v, n); });
  }

  // P <- P - T^T T in these rows, up to the diagonal
  void downdate(int r, Range rows) const {
    const int64_t m = p.layer[r].regressors;
    double *P = p.layer[r].statistics, *T = s.T[r];
    outer(
        rows.first, rows.last, rows.last, batch, Strided<double>{T, 1, m}, [=](int64_t k) { return T + k * m; },
        [=](int64_t i, int64_t c, f64v v, int64_t n) { put(P + i * m + c, get(P + i * m + c, n) - v, n); });
  }

  // P as the caller knows it
  void finish(bool pending) {
    for (int r = 0; r < p.regressions() && pending; ++r)
      for (int g = thread; g < slices; g += threads) blocks(r, g, [=, this](Range rows) { downdate(r, rows); });
    wait();
    for (int r = 0; r < p.regressions(); ++r) {
      const int64_t m = p.layer[r].regressors;
      double* P = p.layer[r].statistics;
      Range own = share(m);
      for (int64_t i = own.first; i < own.last; ++i)
        for (int64_t j = i + 1; j < m; ++j) P[i * m + j] = P[j * m + i];
    }
  }

  void update_feedback(int l) const {
    const int64_t m = p.layer[l].regressors;
    Range own = share(p.layer[l].units);
    float* B = p.layer[l].B;
    outer(own.first, own.last, m, batch, Strided<float>{p.joint() ? s.xi[l] : s.residual[l], pad, 1},
          Rows{s.gain[p.layerwise ? l : 0], m}, [=](int64_t i, int64_t c, f32v v, int64_t n) {
            float* at = B + i * m + c;
            f32v old = n == lanes ? load(at) : load(at, n), sum = old + v;
            sum = sum * 0.0f == 0.0f ? sum : old;  // W diverges, and B stays finite
            n == lanes ? store(at, sum) : store(at, sum, n);
          });
  }

  // learning W: the gradient never leaves the registers

  template <Optimizer kind>
  struct Step {
    float lr, root;  // Adam: both corrected for the start

    FBK_INLINE void operator()(float* w, float* state, int64_t size, f32v g, int64_t n) const {
      auto read = [n](const float* from) { return n == lanes ? load(from) : load(from, n); };
      auto write = [n](float* to, f32v v) { n == lanes ? store(to, v) : store(to, v, n); };
      if constexpr (kind == Optimizer::momentum) {
        g += 0.9f * read(state);
        write(state, g);
      }
      if constexpr (kind == Optimizer::adam) {
        f32v mean = read(state), square = read(state + size);
        mean += 0.1f * (g - mean);
        // spelled out: of two products the compiler fuses one, and not the same in each copy, which made bits depend on
        // the thread count
        square = mul_add(0.001f * g, g, 0.999f * square);
        write(state, mean);
        write(state + size, square);
        g = mean / (fbk::sqrt(square) / root + 1e-8f);
      }
      write(w, read(w) - lr * g);
    }
  };

  template <Optimizer kind>
  void gradient(int l) const {
    const MlpLayer& layer = p.layer[l];
    Range own = share(layer.units);
    Step<kind> update{p.lr, 1};
    if (kind == Optimizer::adam) {
      double t = double(step - p.warmup + 1);
      update = {float(double(p.lr) / (1 - std::pow(0.9, t))), float(std::sqrt(1 - std::pow(0.999, t)))};
    }
    const int64_t inputs = layer.inputs, size = layer.units * inputs;
    float *W = layer.weight, *state = layer.weight_state;
    const float *const *x = row, *h = l == 0 ? nullptr : s.h_rows[l - 1];
    outer(
        own.first, own.last, inputs, batch, Strided<float>{s.delta[l], pad, 1},
        [=](int64_t k) { return h == nullptr ? x[k] : h + k * inputs; },
        [=](int64_t i, int64_t c, f32v g, int64_t n) {
          update(W + i * inputs + c, state + i * inputs + c, size, g, n);
        });
    for (int64_t u = own.first; u < own.last; ++u) {
      const float* delta = s.delta[l] + u * pad;
      f32v g{};
      int64_t n = 0;
      for (; n + lanes <= batch; n += lanes) g += load(delta + n);
      if (n < batch) g += load(delta + n, batch - n);
      update(layer.bias + u, layer.bias_state + u, layer.units, broadcast(sum(g)), 1);
    }
  }

  void learn(int l) const {
    switch (p.optimizer) {
      case Optimizer::sgd:
        return gradient<Optimizer::sgd>(l);
      case Optimizer::momentum:
        return gradient<Optimizer::momentum>(l);
      case Optimizer::adam:
        return gradient<Optimizer::adam>(l);
    }
  }

  void record(int64_t t) const {
    double total = 0;
    for (int64_t n = 0; n < batch; ++n) {
      total += double(s.loss[n]);
      *s.skipped += s.ok[n] == 0;
    }
    ++*s.taken;
    p.losses[t] = total;
  }

  bool failed() const {
    bool any = false;
    for (int r = 0; r < p.regressions(); ++r) any |= s.failed[r];
    return any;
  }

  // SPEC 5: the gradients of W use the B of before, B's update what this step measured. False where there is none.
  bool one(int64_t t) {
    for (int64_t n = 0; n < batch; ++n) row[n] = p.x + p.rows[t * batch + n] * p.layer[0].inputs;
    for (int l = 0; l < p.layers; ++l) forward(l), wait();
    measure(t), wait();
    for (int l = last - 1; l >= 0; --l) {
      backward(l);
      if (p.layerwise && l > 0) wait();
    }
    if (p.rule == MlpRule::joint_output) predict();
    if (p.joint() || p.rule == MlpRule::weight_transport) wait();
    for (int r = 0; r < p.regressions(); ++r)
      if (r % threads == thread) regress(r);
    if (step >= p.warmup)
      for (int l = 0; l < p.layers; ++l) learn(l);
    if (thread == threads - 1) record(t);
    if (p.perturbs()) {
      wait();
      if (!p.downdate && failed()) return false;
      if (p.rule == MlpRule::ridge && p.downdate) {
        for (int r = 0; r < p.regressions(); ++r)
          for (int g = thread; g < slices; g += threads) project(r, g, t > 0);
        wait();
        for (int r = 0; r < p.regressions(); ++r) gather(r);
        wait();
        for (int r = 0; r < p.regressions(); ++r) innovate(r);
        wait();
        for (int r = 0; r < p.regressions(); ++r)
          if (r % threads == thread) s.failed[r] |= !inverse_cholesky(s.S[r], s.inverse[r], batch);
        wait();
        if (failed()) return false;
        for (int r = 0; r < p.regressions(); ++r) gains(r);
        wait();
      }
      for (int l = 0; l < last; ++l) update_feedback(l);
      make_noise(step + 1);
    }
    wait();
    ++step;
    return true;
  }
};

}  // namespace

void fused_mlp(const FusedMlpParams& p, const MlpScratch& s, int thread, int threads) {
  Run run{p, s, thread, threads};
  run.make_noise(p.step);
  run.wait();
  int64_t t = 0;
  while (t < p.steps && run.one(t)) ++t;
  if (p.rule == MlpRule::ridge && p.downdate) run.finish(t == p.steps);
}

}  // namespace fbk::FBK_SIMD
