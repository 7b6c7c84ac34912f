#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "build_config.h"
#include "feedback.h"
#include "fused_mlp.h"
#include "mirror.h"
#include "noise.h"
#include "perturbed_cross_entropy.h"
#include "perturbed_linear.h"
#include "perturbed_pointwise.h"
#include "pooled_weight_gradient.h"
#include "ridge_gain.h"
#include "tensor_view.h"

namespace py = pybind11;
using fbk::NoiseKind;
using fbk::TensorView;

static void require(bool condition, const std::string& message) {
  if (!condition) throw py::value_error(message);
}

static std::vector<std::string> simd_paths() {
  std::vector<std::string> paths = {"portable"};
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) paths.push_back("avx2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    paths.push_back("avx512");
#endif
  if (const char* best = std::getenv("FBK_SIMD")) {  // as if the CPU had no more
    auto found = std::find(paths.begin(), paths.end(), best);
    std::string all;
    for (const auto& path : paths) all += (all.empty() ? "" : ", ") + path;
    require(found != paths.end(), "FBK_SIMD must be one of " + all + " here, got '" + best + "'");
    paths.erase(found + 1, paths.end());
  }
  return paths;
}

static const std::vector<std::string>& usable_simd() {
  static const std::vector<std::string> paths = simd_paths();
  return paths;
}

static fbk::Simd simd_named(const std::string& name) {
  const auto& paths = usable_simd();
  auto found = name.empty() ? paths.end() - 1 : std::find(paths.begin(), paths.end(), name);
  require(found != paths.end(), "simd must be one of simd_paths(), got '" + name + "'");
  return fbk::Simd(found - paths.begin());
}

template <class Enum>
static Enum named(const char* argument, const std::string& name, std::initializer_list<const char*> names) {
  auto found = std::find(names.begin(), names.end(), name);
  std::string all;
  for (auto n : names) all += std::string(all.empty() ? "'" : ", '") + n + "'";
  require(found != names.end(), std::string(argument) + " must be one of " + all + ", got '" + name + "'");
  return Enum(found - names.begin());
}

#ifdef FBK_NVCC
#define FBK_CUDA(...) fbk::__VA_ARGS__
#else
#define FBK_CUDA(...) \
  (void)device, (void)stream, throw std::runtime_error("fbkernels._C was compiled without CUDA: " FBK_CUDA_OFF)
#endif

static bool is_gpu(const TensorView& t) { return t.device.type == FBK_GPU; }

// Calls with the device of a tensor on a GPU and the stream that torch uses there.
template <class Launch>
static void on_gpu(const TensorView& t, Launch call) {
  void* stream = t.stream();
  py::gil_scoped_release release;
  call(t.device.id, stream);
}

// The noise of SPEC 6 without its place: what the Python side hands to every kernel that regenerates it.
struct NoiseKey {
  const TensorView& step;
  int64_t seed, point;
  double std;
  const std::string& kind;
  int64_t offset;

  std::pair<fbk::NoiseParams, NoiseKind> params(const char* name, const TensorView& at, float* out, int64_t samples,
                                                int64_t units) const {
    require(step.dtype.code == fbk::dl_int && step.dtype.bits == 64 && step.ndim == 0,
            "step must be a 0-dim int64 tensor");
    require(step.device.type == at.device.type && step.device.id == at.device.id,
            std::string("step must be on the device of ") + name);
    require(point >= 0 && point <= UINT32_MAX, "point must be in [0, 2^32), got " + std::to_string(point));
    require(std::isfinite(float(std)) && std >= 0,
            "std must be finite in float32 and >= 0, got " + std::to_string(std));
    auto k = named<NoiseKind>("kind", kind, {"gaussian", "rademacher"});
    fbk::NoiseParams p{out, step.ptr<int64_t>(), uint64_t(seed), uint32_t(point), float(std), samples, units, 0};
    int64_t rows = std::numeric_limits<int64_t>::max() / std::max<int64_t>(p.per_sample(k), 1);
    require(offset >= 0 && offset <= rows - samples, "offset must be in [0, " + std::to_string(rows - samples) +
                                                         "] for this shape, got " + std::to_string(offset));
    p.first = uint64_t(offset) * uint64_t(p.per_sample(k));
    return {p, k};
  }
};

static void noise(const TensorView& out, const TensorView& step, int64_t seed, int64_t point, double std,
                  const std::string& kind, int64_t offset, int threads, const std::string& simd) {
  require(out.dtype.code == fbk::dl_float && out.dtype.bits == 32 && out.dtype.lanes == 1, "out must be float32");
  require(out.ndim == 2 && out.contiguous(), "out must be a contiguous tensor [samples, units]");
  require(threads >= 1, "threads must be >= 1, got " + std::to_string(threads));
  auto [p, k] =
      NoiseKey{step, seed, point, std, kind, offset}.params("out", out, out.ptr<float>(), out.shape[0], out.shape[1]);
  if (out.numel() == 0) return;
  if (is_gpu(out)) return on_gpu(out, [&](int device, void* stream) { FBK_CUDA(noise_cuda(p, k, device, stream)); });
  require(out.device.type == fbk::dl_cpu, "out must be on the CPU or on a CUDA device");
  fbk::Simd path = simd_named(simd);
  py::gil_scoped_release release;
  fbk::noise_cpu(p, k, path, threads);
}

static std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (int64_t n : shape) text += (text.empty() ? "[" : ", ") + std::to_string(n);
  return text.empty() ? "[]" : text + "]";
}

// A dense tensor of the shape on the device of another, or on the CPU; the caller has made it so, and a view that is
// not would be read past its end.
static void expect(const char* argument, const TensorView& t, const std::vector<int64_t>& shape, uint8_t code,
                   uint8_t bits, const TensorView* like = nullptr) {
  if (like == nullptr || like == &t)
    require(t.device.type == fbk::dl_cpu || (like && is_gpu(t)),
            std::string(argument) + " must be on the CPU" + (like ? " or on a CUDA device" : ""));
  else
    require(t.device.type == like->device.type && t.device.id == like->device.id,
            std::string(argument) + " must be on the device of the other tensors");
  require(t.dtype.code == code && t.dtype.bits == bits && t.dtype.lanes == 1,
          std::string(argument) + " has the wrong dtype");
  std::vector<int64_t> got(t.shape, t.shape + t.ndim);
  require(got == shape, std::string(argument) + " must have shape " + shape_text(shape) + ", got " + shape_text(got));
  require(t.contiguous(), std::string(argument) + " must be contiguous");
}

using Sizes = std::array<int64_t, 6>;  // of a pooling: kernel, stride, padding, each height and width

static fbk::Window window(const TensorView& map, const Sizes& s, bool places) {
  require(map.ndim == 4, "maps must be [samples, height, width, channels]");
  fbk::Window w{map.shape[1], map.shape[2], 0, 0, map.shape[3], s[0], s[1], s[2], s[3], s[4], s[5]};
  constexpr int64_t most = 1 << 20;
  for (int64_t n : {w.height, w.width, w.channels, w.kernel_h, w.kernel_w, w.stride_h, w.stride_w})
    require(n >= 1 && n < int64_t(1) << 40, "sizes of maps, kernel_size and stride must be >= 1");
  require(w.kernel_h <= most && w.kernel_w <= most && w.stride_h <= most && w.stride_w <= most,
          "kernel_size and stride must be at most 2^20");
  require(w.padding_h >= 0 && w.padding_w >= 0 && w.padding_h <= w.kernel_h / 2 && w.padding_w <= w.kernel_w / 2,
          "padding must be >= 0 and at most half of kernel_size");
  require(w.height + 2 * w.padding_h >= w.kernel_h && w.width + 2 * w.padding_w >= w.kernel_w,
          "kernel_size must not be larger than the padded map");
  require(!places || w.kernel_h * w.kernel_w <= 256, "kernel_size must have at most 256 places for max-pooling");
  w.out_height = (w.height + 2 * w.padding_h - w.kernel_h) / w.stride_h + 1;
  w.out_width = (w.width + 2 * w.padding_w - w.kernel_w) / w.stride_w + 1;
  return w;
}

static std::pair<fbk::Storage, uint8_t> storage_of(const char* argument, const TensorView& t) {
  bool single = t.dtype.code == fbk::dl_float && t.dtype.bits == 32;
  require(single || (t.dtype.code == fbk::dl_bfloat && t.dtype.bits == 16 && !is_gpu(t)),
          std::string(argument) + " must be float32" + (is_gpu(t) ? "" : " or bfloat16"));
  return {single ? fbk::Storage::float32 : fbk::Storage::bfloat16, t.dtype.bits};
}

static void perturbed_pointwise(const TensorView& z, const std::optional<TensorView>& dz,
                                const std::optional<TensorView>& scale, const std::optional<TensorView>& bias,
                                const TensorView& h, const std::optional<TensorView>& d,
                                const std::optional<TensorView>& kept, const std::optional<TensorView>& winner,
                                const std::string& activation, const std::string& pool, bool pool_first,
                                const Sizes& sizes, const TensorView& step, int64_t seed, int64_t point, double std,
                                const std::string& kind, int64_t rows, bool antithetic, int64_t offset, int threads,
                                const std::string& simd) {
  auto [storage, bits] = storage_of("z", z);
  uint8_t code = z.dtype.code;
  auto phi = named<fbk::Activation>("activation", activation, {"identity", "relu", "tanh", "sigmoid", "gelu"});
  auto pooling = named<fbk::Pool>("pool", pool, {"none", "max", "avg"});
  fbk::Window w = window(z, pooling == fbk::Pool::none ? Sizes{1, 1, 1, 1, 0, 0} : sizes, pooling == fbk::Pool::max);
  int64_t samples = z.shape[0];
  std::vector<int64_t> in = {samples, w.height, w.width, w.channels},
                       out = {samples, w.out_height, w.out_width, w.channels};
  require(rows >= 0 && rows <= samples,
          "rows must be in [0, " + std::to_string(samples) + "], got " + std::to_string(rows));
  require(threads >= 1, "threads must be >= 1, got " + std::to_string(threads));
  expect("z", z, in, code, bits, &z);
  expect("h", h, out, code, bits, &z);
  require(d.has_value() == (rows > 0), "d must be given where rows > 0");
  require(kept.has_value() == (phi == fbk::Activation::gelu && pooling != fbk::Pool::avg),
          "kept must be given for gelu alone, without average-pooling");
  require(winner.has_value() == (pooling == fbk::Pool::max), "winner must be given for max-pooling alone");
  if (kept) expect("kept", *kept, out, code, bits, &z);
  if (winner) expect("winner", *winner, out, fbk::dl_uint, 8, &z);
  if (scale) expect("scale", *scale, {w.channels}, fbk::dl_float, 32, &z);
  if (bias) expect("bias", *bias, {w.channels}, fbk::dl_float, 32, &z);
  int64_t differences = rows * (1 + antithetic);
  in[0] = out[0] = differences;
  if (d) expect("d", *d, out, code, bits, &z);
  require(!dz || d, "dz must not be given without d");
  if (dz) expect("dz", *dz, in, code, bits, &z);
  auto [noise, noise_kind] = NoiseKey{step, seed, point, std, kind, offset}.params("z", z, nullptr, rows, w.units());
  auto data = [](const std::optional<TensorView>& t) { return t ? t->ptr<void>() : nullptr; };
  fbk::PerturbedPointwiseParams params{z.ptr<void>(),
                                       data(dz),
                                       static_cast<float*>(data(scale)),
                                       static_cast<float*>(data(bias)),
                                       h.ptr<void>(),
                                       data(d),
                                       data(kept),
                                       static_cast<uint8_t*>(data(winner)),
                                       storage,
                                       phi,
                                       pool_first,
                                       pooling,
                                       w,
                                       samples,
                                       differences,
                                       rows,
                                       noise_kind,
                                       noise};
  fbk::Simd path = simd_named(simd);
  if (h.numel() == 0) return;
  if (is_gpu(z))
    return on_gpu(z, [&](int device, void* stream) { FBK_CUDA(perturbed_pointwise_cuda(params, device, stream)); });
  py::gil_scoped_release release;
  fbk::perturbed_pointwise_cpu(params, path, threads);
}

static void perturbed_linear(const TensorView& x, const std::optional<TensorView>& dx, const TensorView& weight,
                             const std::optional<TensorView>& bias, const TensorView& h,
                             const std::optional<TensorView>& d, const std::optional<TensorView>& kept,
                             const std::string& activation, const TensorView& step, int64_t seed, int64_t point,
                             double std, const std::string& kind, int64_t rows, bool antithetic, int64_t offset) {
  require(is_gpu(x), "x must be on a CUDA device");
  require(x.ndim == 2 && weight.ndim == 2, "x must be [samples, inputs] and weight [units, inputs]");
  const int64_t samples = x.shape[0], inputs = x.shape[1], units = weight.shape[0];
  require(rows >= 0 && rows <= samples,
          "rows must be in [0, " + std::to_string(samples) + "], got " + std::to_string(rows));
  auto data = [&](const char* name, const std::optional<TensorView>& t, const std::vector<int64_t>& shape) {
    if (t) expect(name, *t, shape, fbk::dl_float, 32, &x);
    return t ? t->ptr<float>() : nullptr;
  };
  fbk::PerturbedLinearParams l{};
  fbk::PerturbedPointwiseParams& b = l.behind;
  b.activation = named<fbk::Activation>("activation", activation, {"identity", "relu", "tanh", "sigmoid", "gelu"});
  b.window = {1, 1, 1, 1, units, 1, 1, 1, 1, 0, 0};
  b.samples = samples, b.noise_rows = rows, b.rows = rows * (1 + antithetic);
  require(d.has_value() == (rows > 0), "d must be given where rows > 0");
  require(!dx || d, "dx must not be given without d");
  require(kept.has_value() == (b.activation == fbk::Activation::gelu), "kept must be given for gelu alone");
  l.x = data("x", x, {samples, inputs});
  l.dx = data("dx", dx, {b.rows, inputs});
  l.weight = data("weight", weight, {units, inputs});
  l.inputs = inputs;
  b.bias = data("bias", bias, {units});
  b.h = data("h", h, {samples, units});
  b.d = data("d", d, {b.rows, units});
  b.kept = data("kept", kept, {samples, units});
  std::tie(b.noise, b.kind) = NoiseKey{step, seed, point, std, kind, offset}.params("x", x, nullptr, rows, units);
  if (h.numel() == 0) return;
  on_gpu(x, [&](int device, void* stream) { FBK_CUDA(perturbed_linear_cuda(l, device, stream)); });
}

static void unpool(const TensorView& delta, const TensorView& winner, const TensorView& out, const Sizes& sizes,
                   int threads, const std::string& simd) {
  auto [storage, bits] = storage_of("delta", delta);
  fbk::Window w = window(out, sizes, true);
  std::vector<int64_t> small = {out.shape[0], w.out_height, w.out_width, w.channels};
  require(threads >= 1, "threads must be >= 1, got " + std::to_string(threads));
  expect("delta", delta, small, delta.dtype.code, bits, &delta);
  expect("winner", winner, small, fbk::dl_uint, 8, &delta);
  expect("out", out, {out.shape[0], w.height, w.width, w.channels}, delta.dtype.code, bits, &delta);
  fbk::UnpoolParams params{delta.ptr<void>(), winner.ptr<uint8_t>(), out.ptr<void>(), storage, w, out.shape[0]};
  fbk::Simd path = simd_named(simd);
  if (out.numel() == 0) return;
  if (is_gpu(delta))
    return on_gpu(delta, [&](int device, void* stream) { FBK_CUDA(unpool_cuda(params, device, stream)); });
  py::gil_scoped_release release;
  fbk::unpool_cpu(params, path, threads);
}

static void feedback_update(const TensorView& B, const std::optional<TensorView>& out,
                            const std::optional<TensorView>& M, const std::optional<TensorView>& G,
                            const std::optional<TensorView>& R, const std::optional<TensorView>& Q,
                            const std::optional<TensorView>& w, const std::optional<TensorView>& prediction,
                            const std::optional<TensorView>& step, const std::optional<TensorView>& predicted_step,
                            int64_t seed, int64_t point, double std, const std::string& kind, int64_t offset,
                            int threads, const std::string& simd) {
  constexpr uint8_t code = fbk::dl_float, bits = 32;
  require(B.ndim == 2, "B must be [units, outputs]");
  int64_t units = B.shape[0], m = B.shape[1];
  expect("B", B, {units, m}, code, bits, &B);
  require(R.has_value() == Q.has_value() && R.has_value() == w.has_value(), "R, Q and w go together");
  require(!(R && G) && (G || !M), "G must be given, with or without M, or R, Q and w");
  require((G || R) == out.has_value() && out.has_value() == step.has_value(),
          "out and step go together with G, or R, Q and w");
  require(prediction.has_value() == predicted_step.has_value(), "prediction and predicted_step go together");
  require(out || prediction, "G, or R, Q and w, or prediction must be given");
  require(threads >= 1, "threads must be >= 1, got " + std::to_string(threads));
  fbk::FeedbackUpdateParams p{};
  p.B = B.ptr<float>();
  p.units = units;
  p.outputs = m;
  auto data = [&](const char* name, const std::optional<TensorView>& t, const std::vector<int64_t>& shape) {
    if (t) expect(name, *t, shape, code, bits, &B);
    return t ? t->ptr<float>() : nullptr;
  };
  if (out) {
    const TensorView& rows = G ? *G : *R;
    require(rows.ndim == 2, "G and R must be [rows, outputs]");
    p.rows = rows.shape[0];
    p.out = data("out", out, {units, m});
    require(p.out != p.B || B.numel() == 0, "out must not be B");
    p.M = data("M", M, {m, m});
    p.G = data("G", G, {p.rows, m});
    p.R = data("R", R, {p.rows, m});
    p.Q = data("Q", Q, {p.rows, m});
    p.w = data("w", w, {p.rows});
    std::tie(p.noise, p.kind) = NoiseKey{*step, seed, point, std, kind, 0}.params("B", B, nullptr, p.rows, units);
  }
  if (prediction) {
    require(prediction->ndim == 3, "prediction must be [parts, rows, outputs]");
    p.predicted_rows = prediction->shape[1];
    expect("prediction", *prediction, {is_gpu(B) ? p.blocks() : p.tasks() + 1, p.predicted_rows, m}, code, bits, &B);
    p.prediction = prediction->ptr<float>();
    std::tie(p.predicted_noise, p.kind) =
        NoiseKey{*predicted_step, seed, point, std, kind, offset}.params("B", B, nullptr, p.predicted_rows, units);
  }
  fbk::Simd path = simd_named(simd);
  if (m == 0) return;
  if (is_gpu(B)) return on_gpu(B, [&](int device, void* stream) { FBK_CUDA(feedback_update_cuda(p, device, stream)); });
  py::gil_scoped_release release;
  fbk::feedback_update_cpu(p, path, threads);
}

static void feedback(const TensorView& e, const TensorView& B, const std::optional<TensorView>& kept,
                     const TensorView& delta, const std::string& activation, int threads, const std::string& simd) {
  auto [storage, bits] = storage_of("delta", delta);
  require(e.ndim == 2 && B.ndim == 2, "e must be [samples, outputs] and B [units, outputs]");
  int64_t samples = e.shape[0], m = e.shape[1], units = B.shape[0];
  auto phi = named<fbk::Activation>("activation", activation, {"identity", "relu", "tanh", "sigmoid", "gelu"});
  require(threads >= 1, "threads must be >= 1, got " + std::to_string(threads));
  require(kept.has_value() == (phi != fbk::Activation::identity), "kept must be given for an activation alone");
  expect("e", e, {samples, m}, fbk::dl_float, 32, &e);
  expect("B", B, {units, m}, fbk::dl_float, 32, &e);
  expect("delta", delta, {samples, units}, delta.dtype.code, bits, &e);
  if (kept) expect("kept", *kept, {samples, units}, delta.dtype.code, bits, &e);
  fbk::FeedbackParams p{e.ptr<float>(),
                        B.ptr<float>(),
                        kept ? kept->ptr<void>() : nullptr,
                        delta.ptr<void>(),
                        storage == fbk::Storage::float32,
                        phi,
                        samples,
                        units,
                        m};
  fbk::Simd path = simd_named(simd);
  if (delta.numel() == 0) return;
  if (is_gpu(e)) return on_gpu(e, [&](int device, void* stream) { FBK_CUDA(feedback_cuda(p, device, stream)); });
  py::gil_scoped_release release;
  fbk::feedback_cpu(p, path, threads);
}

static void perturbed_cross_entropy(const TensorView& logits, const std::optional<TensorView>& perturbed,
                                    const TensorView& target, bool antithetic, double scale, const TensorView& losses,
                                    const TensorView& e, const TensorView& dL, const TensorView& dy,
                                    const TensorView& ok, int threads) {
  require(logits.ndim == 2 && logits.shape[1] >= 1, "logits must be [samples, classes]");
  require(dL.ndim == 1, "dL must be [rows]");
  require(threads >= 1, "threads must be >= 1, got " + std::to_string(threads));
  int64_t samples = logits.shape[0], classes = logits.shape[1], rows = dL.shape[0];
  require(rows <= samples, "dL must have at most as many rows as logits");
  require(perturbed || !antithetic, "perturbed must be given where antithetic is true");
  expect("logits", logits, {samples, classes}, fbk::dl_float, 64);
  if (perturbed) expect("perturbed", *perturbed, {antithetic ? 2 * rows : rows, classes}, fbk::dl_float, 64);
  expect("target", target, {samples}, fbk::dl_int, 64);
  expect("losses", losses, {samples}, fbk::dl_float, 32);
  expect("e", e, {samples, classes}, fbk::dl_float, 32);
  expect("dL", dL, {rows}, fbk::dl_float, 32);
  expect("dy", dy, {rows, classes}, fbk::dl_float, 32);
  expect("ok", ok, {rows}, fbk::dl_bool, 8);
  fbk::PerturbedCrossEntropyParams p{logits.ptr<double>(),
                                     perturbed ? perturbed->ptr<double>() : nullptr,
                                     target.ptr<int64_t>(),
                                     scale,
                                     antithetic,
                                     losses.ptr<float>(),
                                     e.ptr<float>(),
                                     dL.ptr<float>(),
                                     dy.ptr<float>(),
                                     ok.ptr<bool>(),
                                     samples,
                                     classes,
                                     rows};
  py::gil_scoped_release release;
  fbk::perturbed_cross_entropy_cpu(p, threads);
}

static void pooled_weight_gradient(const TensorView& delta, const TensorView& winner, const TensorView& x,
                                   const TensorView& weight_gradient, const TensorView& bias_gradient,
                                   const Sizes& geometry, const Sizes& sizes, int threads, const std::string& simd) {
  auto [storage, bits] = storage_of("x", x);
  const TensorView& w = weight_gradient;
  require(delta.ndim == 4 && x.ndim == 4, "delta and x must be [samples, height, width, channels]");
  require(w.ndim == 4, "weight_gradient must be [outputs, inputs, height, width]");
  fbk::PooledWeightGradientParams p{};
  p.samples = x.shape[0], p.inputs = x.shape[3], p.outputs = w.shape[0];
  require(p.inputs >= 1 && p.outputs >= 1, "x and delta must have channels");
  require(w.shape[1] == p.inputs,
          "weight_gradient must have as many inputs as x has channels: groups are not supported");
  require(threads >= 1, "threads must be >= 1, got " + std::to_string(threads));
  std::vector<int64_t> pooled = {p.samples, delta.shape[1], delta.shape[2], p.outputs};
  expect("delta", delta, pooled, fbk::dl_float, 32);
  expect("winner", winner, pooled, fbk::dl_uint, 8);
  expect("x", x, {p.samples, x.shape[1], x.shape[2], p.inputs}, x.dtype.code, bits);
  expect("bias_gradient", bias_gradient, {p.outputs}, fbk::dl_float, 32);
  TensorView channels_last = w;
  int64_t shape[] = {w.shape[0], w.shape[2], w.shape[3], w.shape[1]};
  int64_t strides[] = {w.strides[0], w.strides[2], w.strides[3], w.strides[1]};
  channels_last.shape = shape, channels_last.strides = strides;
  const TensorView& dense = w.contiguous() ? w : channels_last;
  expect("weight_gradient", dense, {dense.shape, dense.shape + 4}, fbk::dl_float, 32);

  auto axis = [&](int i) {
    auto within = [](const char* name, int64_t value, int64_t low, int64_t high) {
      require(low <= value && value <= high, std::string(name) + " must be in [" + std::to_string(low) + ", " +
                                                 std::to_string(high) + "], got " + std::to_string(value));
      return value;
    };
    // the bounds keep every product below far from 2^63
    constexpr int64_t most = 1 << 15;
    fbk::PooledAxis a;
    a.in = within("the size of x", x.shape[1 + i], 1, 1 << 24);
    a.pooled = within("the size of delta", delta.shape[1 + i], 1, 1 << 24);
    a.kernel = within("the size of weight_gradient", w.shape[2 + i], 1, most);
    a.stride = within("stride", geometry[i], 1, most);
    a.padding = within("padding", geometry[2 + i], 0, most);
    a.dilation = within("dilation", geometry[4 + i], 1, most);
    a.pool_kernel = within("kernel_size", sizes[i], 1, 256);
    a.pool_stride = within("the pool's stride", sizes[2 + i], 1, most);
    a.pool_padding = within("the pool's padding", sizes[4 + i], 0, a.pool_kernel / 2);
    int64_t reach = a.in + 2 * a.padding - a.dilation * (a.kernel - 1) - 1;
    require(reach >= 0, "weight_gradient must not be larger than the padded x");
    a.out = reach / a.stride + 1;
    require((a.pooled - 1) * a.pool_stride - a.pool_padding < a.out,
            "delta must not have windows outside the convolution's output of size " + std::to_string(a.out));
    return a;
  };
  p.y = axis(0), p.x = axis(1);
  require(p.y.pool_kernel * p.x.pool_kernel <= 256, "kernel_size must have at most 256 places");
  p.delta = delta.ptr<float>();
  p.winner = winner.ptr<uint8_t>();
  p.input = x.ptr<void>();
  p.input_is_bf16 = storage == fbk::Storage::bfloat16;
  p.weight = w.ptr<float>();
  p.bias = bias_gradient.ptr<float>();
  std::copy(w.strides, w.strides + 4, p.weight_strides);
  fbk::Simd path = simd_named(simd);
  py::gil_scoped_release release;
  fbk::pooled_weight_gradient_cpu(p, path, threads);
}

using Views = std::vector<TensorView>;

static void mirror(const Views& B, const Views& W, const Views& out, const TensorView& residual,
                   const std::optional<TensorView>& scratch, const TensorView& step, int64_t seed,
                   const std::vector<int64_t>& points, int64_t samples, const std::string& kind, int64_t offset,
                   int threads, const std::string& simd) {
  const size_t count = B.size();
  require(W.size() == count && out.size() == count && points.size() == count,
          "B, W, out and points must be of one length");
  require(samples >= 1 && samples <= 1 << 20, "samples must be in [1, 2^20], got " + std::to_string(samples));
  require(threads >= 1, "threads must be >= 1, got " + std::to_string(threads));
  expect("residual", residual, {int64_t(count)}, fbk::dl_float, 32, &residual);
  std::vector<fbk::MirrorLayer> layers;
  NoiseKind k{};
  for (size_t i = 0; i < count; ++i) {
    require(B[i].ndim == 2, "B must be [outputs, units]");
    const int64_t outputs = B[i].shape[0], units = B[i].shape[1];
    fbk::MirrorLayer layer{};
    for (auto [name, t] : {std::pair("B", &B[i]), {"W", &W[i]}, {"out", &out[i]}})
      expect(name, *t, {outputs, units}, fbk::dl_float, 32, &residual);
    layer.B = B[i].ptr<float>(), layer.W = W[i].ptr<float>(), layer.out = out[i].ptr<float>();
    require((layer.out != layer.B && layer.out != layer.W) || B[i].numel() == 0, "out must be neither B nor W");
    layer.outputs = outputs;
    layer.residual = residual.ptr<float>() + i;
    std::tie(layer.noise, k) =
        NoiseKey{step, seed, points[i], 1, kind, offset}.params("B", B[i], nullptr, samples, units);
    layers.push_back(layer);
  }
  fbk::Simd path = simd_named(simd);
  if (is_gpu(residual)) {
    require(scratch.has_value(), "scratch must be given on a GPU");
    expect("scratch", *scratch, {fbk::mirror_scratch(layers)}, fbk::dl_float, 32, &residual);
    return on_gpu(residual, [&](int device, void* stream) {
      FBK_CUDA(mirror_cuda(layers, k, scratch->ptr<float>(), device, stream));
    });
  }
  py::gil_scoped_release release;
  fbk::mirror_cpu(layers, k, path, threads);
}

// Returns the bytes of scratch that it needs and has not got, or 0 where it has trained.
static int64_t fused_mlp(const std::vector<int64_t>& sizes, const std::vector<std::string>& activations,
                         const std::string& loss, bool layerwise, const std::string& rule, double rule_rate,
                         double forgetting, bool downdate, const std::string& optimizer, double lr, double noise_std,
                         const std::string& noise, uint64_t seed, int64_t warmup, const Views& weights,
                         const Views& biases, const Views& weight_state, const Views& bias_state, const Views& B,
                         const Views& statistics, const TensorView& x, const TensorView& y, const TensorView& rows,
                         const TensorView& losses, const TensorView& counters, const TensorView& scratch, int threads,
                         int blocks, const std::string& simd) {
  auto positive = [](const char* name, double v) {
    require(std::isfinite(float(v)) && v > 0, std::string(name) + " must be finite and > 0, got " + std::to_string(v));
  };
  fbk::FusedMlpParams p{};
  require(sizes.size() >= 3 && sizes.size() <= fbk::FusedMlpParams::max_layers + 1,
          "sizes must have 3 to " + std::to_string(fbk::FusedMlpParams::max_layers + 1) + " entries, got " +
              std::to_string(sizes.size()));
  for (int64_t n : sizes) require(n >= 1 && n <= INT32_MAX, "sizes must be in [1, 2^31), got " + std::to_string(n));
  p.layers = int(sizes.size()) - 1;
  const size_t layers = size_t(p.layers), hidden = layers - 1;
  p.loss = named<fbk::Loss>("loss", loss, {"mse", "cross_entropy"});
  p.rule =
      named<fbk::MlpRule>("rule", rule, {"ridge", "lms", "joint_loss", "joint_output", "fixed", "weight_transport"});
  p.optimizer = named<fbk::Optimizer>("optimizer", optimizer, {"sgd", "momentum", "adam"});
  p.noise = named<NoiseKind>("noise", noise, {"gaussian", "rademacher"});
  require(p.rule != fbk::MlpRule::joint_output || !layerwise, "rule 'joint_output' needs direct feedback");
  require(p.rule != fbk::MlpRule::weight_transport || layerwise, "rule 'weight_transport' needs layerwise feedback");
  positive("lr", lr), positive("noise_std", noise_std), positive("rule_rate", rule_rate);
  require(forgetting > 0 && forgetting <= 1, "forgetting must be in (0, 1], got " + std::to_string(forgetting));
  require(!downdate || forgetting == 1, "downdate needs forgetting = 1");
  expect("counters", counters, {3}, fbk::dl_int, 64, &counters);
  const bool gpu = is_gpu(counters);
  const int64_t step = gpu ? 0 : counters.ptr<int64_t>()[0];
  require(warmup >= 0 && step >= 0 && step < INT64_MAX / 2, "warmup and step must be >= 0");
  require(threads >= 1, "threads must be >= 1, got " + std::to_string(threads));
  require(blocks >= 0, "blocks must be >= 0, got " + std::to_string(blocks));
  p.layerwise = layerwise, p.downdate = downdate, p.rule_rate = rule_rate, p.forgetting = forgetting;
  p.lr = float(lr), p.noise_std = float(noise_std), p.seed = seed, p.step = step, p.warmup = warmup;

  const bool ridge = p.rule == fbk::MlpRule::ridge, has_B = p.rule != fbk::MlpRule::weight_transport;
  const size_t states = p.optimizer == fbk::Optimizer::sgd ? 0 : layers;
  auto count = [](const char* name, size_t got, size_t expected) {
    require(got == expected,
            std::string(name) + " must have " + std::to_string(expected) + " entries, got " + std::to_string(got));
  };
  count("activations", activations.size(), layers), count("weights", weights.size(), layers);
  count("biases", biases.size(), layers), count("weight_state", weight_state.size(), states);
  count("bias_state", bias_state.size(), states), count("B", B.size(), has_B ? hidden : 0);
  count("statistics", statistics.size(), !ridge ? 0 : layerwise ? hidden : 1);
  auto single = [&](const char* name, const TensorView& t, const std::vector<int64_t>& shape) {
    expect(name, t, shape, fbk::dl_float, 32, &counters);
    return t.ptr<float>();
  };
  const int64_t copies = p.optimizer == fbk::Optimizer::adam ? 2 : 1, outputs = sizes.back();
  for (size_t l = 0; l < layers; ++l) {
    fbk::MlpLayer& layer = p.layer[l];
    int64_t inputs = layer.inputs = sizes[l], units = layer.units = sizes[l + 1];
    layer.activation =
        named<fbk::Activation>("activations", activations[l], {"identity", "relu", "tanh", "sigmoid", "gelu"});
    layer.weight = single("weights", weights[l], {units, inputs});
    layer.bias = single("biases", biases[l], {units});
    if (states) {
      layer.weight_state = single("weight_state", weight_state[l], {copies, units, inputs});
      layer.bias_state = single("bias_state", bias_state[l], {copies, units});
    }
    if (l == hidden) break;
    int64_t m = layer.regressors = layerwise ? sizes[l + 2] : outputs;
    if (has_B) layer.B = single("B", B[l], {units, m});
    if (l < statistics.size()) {
      expect("statistics", statistics[l], {m, m}, fbk::dl_float, 64, &counters);
      layer.statistics = statistics[l].ptr<double>();
    }
  }
  require(p.loss == fbk::Loss::mse || p.layer[hidden].activation == fbk::Activation::identity,
          "cross_entropy needs an identity output");

  require(x.ndim == 2 && y.ndim >= 1 && rows.ndim == 2, "x and rows must be matrices");
  const int64_t samples = x.shape[0];
  p.x = single("x", x, {samples, sizes[0]});
  if (y.ndim == 1 || p.loss == fbk::Loss::cross_entropy) {
    expect("y", y, {samples}, fbk::dl_int, 64, &counters);
    p.labels = y.ptr<int64_t>();
  } else {
    p.target = single("y", y, {samples, outputs});
  }
  p.steps = rows.shape[0], p.batch = rows.shape[1];
  expect("rows", rows, {p.steps, p.batch}, fbk::dl_int, 64, &counters);
  expect("losses", losses, {p.steps}, fbk::dl_float, 64, &counters);
  p.rows = rows.ptr<int64_t>(), p.losses = losses.ptr<double>();
  require(p.batch >= 1 && p.batch <= INT32_MAX, "a batch must have 1 to 2^31 - 1 samples");
  for (int64_t i = 0; !gpu && i < rows.numel(); ++i) {
    require(p.rows[i] >= 0 && p.rows[i] < samples,
            "rows must be in [0, " + std::to_string(samples) + "), got " + std::to_string(p.rows[i]));
    if (p.labels != nullptr) {
      int64_t label = p.labels[p.rows[i]];
      require(label >= 0 && label < outputs,
              "y must be classes in [0, " + std::to_string(outputs) + "), got " + std::to_string(label));
    }
  }
  fbk::Simd path = simd_named(simd);
  if (p.steps == 0) return 0;
  if (gpu) {
    int64_t missing = 0;
    expect("scratch", scratch, {scratch.numel()}, fbk::dl_uint, 8, &counters);
    on_gpu(counters, [&](int device, void* stream) {
      FBK_CUDA(fused_mlp_cuda(p, counters.ptr<int64_t>(), scratch.ptr<char>(), scratch.numel(), blocks, device, stream,
                              missing));
    });
    return missing;
  }
  fbk::FusedMlpResult result;
  {
    py::gil_scoped_release release;
    result = fbk::fused_mlp_cpu(p, path, threads);
  }
  counters.ptr<int64_t>()[0] += result.steps;
  counters.ptr<int64_t>()[1] += result.skipped;
  counters.ptr<int64_t>()[2] = result.failed;
  return 0;
}

static void shuffle(const TensorView& out, uint64_t seed, int64_t epoch) {
  require(out.ndim == 1 && out.shape[0] <= int64_t(UINT32_MAX), "out must be a vector of less than 2^32 elements");
  expect("out", out, {out.shape[0]}, fbk::dl_int, 64);
  py::gil_scoped_release release;
  fbk::shuffle_cpu(out.ptr<int64_t>(), out.shape[0], seed, epoch);
}

static void ridge_gain(const TensorView& R, const TensorView& w, const TensorView& V, const TensorView& V_out,
                       const TensorView& Q, const TensorView& M, const TensorView& G, const TensorView& scratch,
                       double gamma, double forgetting, const std::string& simd) {
  require(R.ndim == 2 || (R.ndim == 3 && is_gpu(R)), "R must be [samples, regressors], on a GPU also with groups");
  int64_t n = R.shape[R.ndim - 2], m = R.shape[R.ndim - 1], groups = R.ndim == 3 ? R.shape[0] : 1;
  require(std::isfinite(gamma) && gamma > 0, "gamma must be finite and > 0, got " + std::to_string(gamma));
  require(forgetting > 0 && forgetting <= 1, "forgetting must be in (0, 1], got " + std::to_string(forgetting));
  auto matrix = [&](const char* name, const TensorView& t, int64_t rows, uint8_t bits) {
    std::vector<int64_t> shape = {groups, rows, m};
    expect(name, t, {shape.begin() + (R.ndim == 2), shape.end()}, fbk::dl_float, bits, &R);
  };
  matrix("R", R, n, 32), matrix("V", V, m, 64), matrix("V_out", V_out, m, 64), matrix("Q", Q, n, 32);
  expect("w", w, {n}, fbk::dl_float, 32, &R);
  matrix("M", M, m, 32), matrix("G", G, n, 32), matrix("scratch", scratch, 3 * n + 2 * m, 64);
  fbk::RidgeGainParams p{R.ptr<float>(),
                         w.ptr<float>(),
                         V.ptr<double>(),
                         V_out.ptr<double>(),
                         Q.ptr<float>(),
                         M.ptr<float>(),
                         G.ptr<float>(),
                         scratch.ptr<double>(),
                         gamma,
                         forgetting,
                         n,
                         m,
                         groups};
  fbk::Simd path = simd_named(simd);
  if (m == 0 || groups == 0) return;
  if (is_gpu(R)) return on_gpu(R, [&](int device, void* stream) { FBK_CUDA(ridge_gain_cuda(p, device, stream)); });
  py::gil_scoped_release release;
  fbk::ridge_gain_cpu(p, path);
}

static std::array<uint32_t, 4> philox(const std::array<uint32_t, 4>& c, const std::array<uint32_t, 2>& key) {
  auto [w] = fbk::philox(fbk::Words<uint32_t>{{c[0], c[1], c[2], c[3]}}, uint64_t(key[1]) << 32 | key[0]);
  return {w[0], w[1], w[2], w[3]};
}

static py::dict build_info() {
  py::dict info;
  info["version"] = FBK_VERSION;
  info["sources"] = FBK_SOURCES;
#ifdef __clang__
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#ifdef FBK_NVCC
  info["cuda"] = true;
  info["nvcc"] = FBK_NVCC;
  info["cuda_archs"] = FBK_CUDA_ARCHS;
#else
  info["cuda"] = false;
  info["cuda_off"] = FBK_CUDA_OFF;
#endif
#ifdef __x86_64__
  info["simd_compiled"] = std::vector<std::string>{"portable", "avx2", "avx512"};
#else
  info["simd_compiled"] = std::vector<std::string>{"portable"};
#endif
  info["simd"] = usable_simd().back();
  return info;
}

PYBIND11_MODULE(_C, m) {
  using namespace py::literals;
  m.def("noise", &noise, "out"_a, "step"_a, "seed"_a, "point"_a, "std"_a, "kind"_a, "offset"_a = 0, "threads"_a = 1,
        "simd"_a = "", "Fills out (float32 [samples, units]) with the noise of SPEC 6.");
  m.def("perturbed_pointwise", &perturbed_pointwise, "z"_a, "dz"_a.none(true), "scale"_a.none(true),
        "bias"_a.none(true), "h"_a, "d"_a.none(true), "kept"_a.none(true), "winner"_a.none(true), "activation"_a,
        "pool"_a, "pool_first"_a, "sizes"_a, "step"_a, "seed"_a, "point"_a, "std"_a, "kind"_a, "rows"_a,
        "antithetic"_a = false, "offset"_a = 0, "threads"_a = 1, "simd"_a = "",
        "Bias, activation, pooling and noise of activity and difference; maps are [samples, height, width, channels].");
  m.def("perturbed_linear", &perturbed_linear, "x"_a, "dx"_a.none(true), "weight"_a, "bias"_a.none(true), "h"_a,
        "d"_a.none(true), "kept"_a.none(true), "activation"_a, "step"_a, "seed"_a, "point"_a, "std"_a, "kind"_a,
        "rows"_a, "antithetic"_a = false, "offset"_a = 0,
        "A linear map, bias, activation and noise of activity and difference, on a GPU.");
  m.def("unpool", &unpool, "delta"_a, "winner"_a, "out"_a, "sizes"_a, "threads"_a = 1, "simd"_a = "",
        "Sends the error of max-pooled maps back to the winners.");
  m.def("feedback_update", &feedback_update, "B"_a, "out"_a.none(true), "M"_a.none(true), "G"_a.none(true),
        "R"_a.none(true), "Q"_a.none(true), "w"_a.none(true), "prediction"_a.none(true), "step"_a.none(true),
        "predicted_step"_a.none(true), "seed"_a, "point"_a, "std"_a, "kind"_a, "offset"_a = 0, "threads"_a = 1,
        "simd"_a = "", "out = B (I - M) + Xi^T G, and the prediction Xi' out.");
  m.def("feedback", &feedback, "e"_a, "B"_a, "kept"_a.none(true), "delta"_a, "activation"_a, "threads"_a = 1,
        "simd"_a = "", "delta = (e B^T) * phi'(kept).");
  m.def("perturbed_cross_entropy", &perturbed_cross_entropy, "logits"_a, "perturbed"_a.none(true), "target"_a,
        "antithetic"_a, "scale"_a, "losses"_a, "e"_a, "dL"_a, "dy"_a, "ok"_a, "threads"_a = 1,
        "Cross-entropies, e = softmax - onehot, and what a perturbation of the logits did.");
  m.def("pooled_weight_gradient", &pooled_weight_gradient, "delta"_a, "winner"_a, "x"_a, "weight_gradient"_a,
        "bias_gradient"_a, "geometry"_a, "sizes"_a, "threads"_a = 1, "simd"_a = "",
        "The weight and bias gradient of a convolution from the winners of its max-pool.");
  m.def("mirror", &mirror, "B"_a, "W"_a, "out"_a, "residual"_a, "scratch"_a.none(true), "step"_a, "seed"_a, "points"_a,
        "samples"_a, "kind"_a, "offset"_a = 0, "threads"_a = 1, "simd"_a = "",
        "A step of the local mirror of all layers: out = B + rate (W - B) Xi^T Xi, and how far B was from W.");
  m.def("fused_mlp", &fused_mlp, py::kw_only(), "sizes"_a, "activations"_a, "loss"_a, "layerwise"_a, "rule"_a,
        "rule_rate"_a, "forgetting"_a, "downdate"_a, "optimizer"_a, "lr"_a, "noise_std"_a, "noise"_a, "seed"_a,
        "warmup"_a, "weights"_a, "biases"_a, "weight_state"_a, "bias_state"_a, "B"_a, "statistics"_a, "x"_a, "y"_a,
        "rows"_a, "losses"_a, "counters"_a, "scratch"_a, "threads"_a = 1, "blocks"_a = 0, "simd"_a = "",
        "Trains in place for a step per row of rows; counters are the steps, the samples that were not finite and "
        "whether "
        "a ridge failed. On a GPU it returns the bytes of scratch that are missing, and then has not trained.");
  m.def("shuffle", &shuffle, "out"_a, "seed"_a, "epoch"_a, "Fills out (int64) with the order of an epoch.");
  m.def("ridge_gain", &ridge_gain, "R"_a, "w"_a, "V"_a, "V_out"_a, "Q"_a, "M"_a, "G"_a, "scratch"_a, "gamma"_a,
        "forgetting"_a, "simd"_a = "", "A batch of recursive least squares: V, Q = D R V^-1, M = R^T Q and G = w * Q.");
  m.def("philox", &philox, "counter"_a, "key"_a, "Philox4x32-10 of one counter.");
  m.def(
      "simd_paths", [] { return usable_simd(); },
      "Paths that this CPU can run, the fastest last; none beyond FBK_SIMD.");
  m.def("build_info", &build_info);
}
