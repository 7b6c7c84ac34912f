#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "build_config.h"
#include "noise.h"
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
  return paths;
}

static const std::vector<std::string> usable_simd = simd_paths();

static fbk::Simd simd_named(const std::string& name) {
  auto found = name.empty() ? usable_simd.end() - 1 : std::find(usable_simd.begin(), usable_simd.end(), name);
  require(found != usable_simd.end(), "simd must be one of simd_paths(), got '" + name + "'");
  return fbk::Simd(found - usable_simd.begin());
}

static void noise(const TensorView& out, const TensorView& step, int64_t seed, int64_t point, double std,
                  const std::string& kind, int64_t offset, int threads, const std::string& simd) {
  require(out.dtype.code == fbk::dl_float && out.dtype.bits == 32 && out.dtype.lanes == 1, "out must be float32");
  require(out.ndim == 2 && out.contiguous(), "out must be a contiguous tensor [samples, units]");
  require(step.dtype.code == fbk::dl_int && step.dtype.bits == 64 && step.ndim == 0,
          "step must be a 0-dim int64 tensor");
  require(step.device.type == out.device.type && step.device.id == out.device.id, "step must be on the device of out");
  require(point >= 0 && point <= UINT32_MAX, "point must be in [0, 2^32), got " + std::to_string(point));
  require(std::isfinite(float(std)) && std >= 0, "std must be finite in float32 and >= 0, got " + std::to_string(std));
  require(kind == "gaussian" || kind == "rademacher", "kind must be 'gaussian' or 'rademacher', got '" + kind + "'");
  require(threads >= 1, "threads must be >= 1, got " + std::to_string(threads));

  fbk::NoiseParams p{out.ptr<float>(), step.ptr<int64_t>(), uint64_t(seed), uint32_t(point),
                     float(std),       out.shape[0],        out.shape[1],   0};
  auto k = kind == "gaussian" ? NoiseKind::gaussian : NoiseKind::rademacher;
  int64_t rows = std::numeric_limits<int64_t>::max() / std::max<int64_t>(p.per_sample(k), 1);
  require(offset >= 0 && offset <= rows - p.samples, "offset must be in [0, " + std::to_string(rows - p.samples) +
                                                         "] for this shape, got " + std::to_string(offset));
  if (out.numel() == 0) return;
  p.first = uint64_t(offset) * uint64_t(p.per_sample(k));
  if (out.device.type == fbk::dl_cuda) {
#ifdef FBK_NVCC
    void* stream = out.stream();
    py::gil_scoped_release release;
    fbk::noise_cuda(p, k, out.device.id, stream);
    return;
#else
    throw std::runtime_error("fbkernels._C was compiled without CUDA: " FBK_CUDA_OFF);
#endif
  }
  require(out.device.type == fbk::dl_cpu, "out must be on the CPU or on a CUDA device");
  fbk::Simd path = simd_named(simd);
  py::gil_scoped_release release;
  fbk::noise_cpu(p, k, path, threads);
}

static std::array<uint32_t, 4> philox(const std::array<uint32_t, 4>& c, const std::array<uint32_t, 2>& key) {
  auto [w] = fbk::philox(fbk::Words<uint32_t>{{c[0], c[1], c[2], c[3]}}, uint64_t(key[1]) << 32 | key[0]);
  return {w[0], w[1], w[2], w[3]};
}

static py::dict build_info() {
  py::dict info;
  info["version"] = FBK_VERSION;
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
  info["simd"] = usable_simd.back();
  return info;
}

PYBIND11_MODULE(_C, m) {
  using namespace py::literals;
  m.def("noise", &noise, "out"_a, "step"_a, "seed"_a, "point"_a, "std"_a, "kind"_a, "offset"_a = 0, "threads"_a = 1,
        "simd"_a = "", "Fills out (float32 [samples, units]) with the noise of SPEC 6.");
  m.def("philox", &philox, "counter"_a, "key"_a, "Philox4x32-10 of one counter.");
  m.def("simd_paths", [] { return usable_simd; }, "Paths that this CPU can run, the fastest last.");
  m.def("build_info", &build_info);
}
