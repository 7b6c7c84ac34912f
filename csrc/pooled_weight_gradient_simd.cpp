#include "simd.h"
// after the vector types
#include "pooled_weight_gradient.h"

namespace fbk::FBK_SIMD {

// Accumulators of a tile of the kernel, beside a register each for the error and, without fused arithmetic, a product.
#if defined(__AVX512F__)
constexpr int budget = 28, max_vectors = 9, max_rows = 7;
#elif defined(__AVX2__)
constexpr int budget = 15, max_vectors = 5, max_rows = 7;
#else
constexpr int budget = 12, max_vectors = 5, max_rows = 7;
#endif

static i32v load_bytes(const uint8_t* from, int64_t n) {
  uint8_t bytes[16] = {};
  n == lanes ? memcpy(bytes, from, lanes) : memcpy(bytes, from, size_t(n));
#if defined(__AVX512F__)
  return (i32v)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
#elif defined(__AVX2__)
  return (i32v)_mm256_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
#else
  i32v v;
  for (int i = 0; i < lanes; ++i) v[i] = bytes[i];
  return v;
#endif
}

// Appends what is not zero in the map, which is zero afterwards.
static int32_t compress(float* map, int64_t size, const int32_t* places, int32_t shift, int32_t count,
                        int32_t* to_places, float* to_errors) {
#ifdef __AVX512F__
  for (int64_t i = 0; i < size; i += lanes) {
    __m512 v = (__m512)load(map + i);
    store(map + i, f32v{});
    __m512i place = _mm512_add_epi32(_mm512_loadu_si512(places + i), _mm512_set1_epi32(shift));
    __mmask16 winners = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    _mm512_storeu_si512(to_places + count, _mm512_maskz_compress_epi32(winners, place));
    _mm512_storeu_ps(to_errors + count, _mm512_maskz_compress_ps(winners, v));
    count += __builtin_popcount(winners);
  }
#else
  for (int64_t i = 0; i < size; ++i) {
    to_places[count] = places[i] + shift;
    to_errors[count] = map[i];
    count += map[i] != 0;
    map[i] = 0;
  }
#endif
  return count;
}

// Lists what is not zero of the error of a pack in channels [channel, channel + lanes).
static bool find_winners(const PooledWeightGradientParams& p, const PooledWeightGradientPlan& plan,
                         const PooledWeightGradientTask& task, int64_t pack, int64_t channel) {
  int64_t channels = task.last - channel < lanes ? task.last - channel : lanes;
  int32_t count[lanes] = {};
  f32v bias{};
  i32v outside{}, maps;
  for (int c = 0; c < lanes; ++c) maps[c] = int32_t(c * plan.map);
  const int32_t kernel_x = int32_t(p.x.pool_kernel), kernel_y = int32_t(p.y.pool_kernel);
  const int32_t out_x = int32_t(p.x.out), out_y = int32_t(p.y.out);
  const float inverse = 1.0f / float(kernel_x);
  for (int64_t i = 0, b = pack * plan.together; i < plan.together && b < p.samples * plan.bands; ++i, ++b) {
    int64_t sample = b / plan.bands, first = b % plan.bands * plan.band;
    int32_t top = int32_t(first * p.y.pool_stride - p.y.pool_padding);
    for (int64_t oy = first; oy < first + plan.band && oy < p.y.pooled; ++oy) {
      int64_t at = (sample * p.y.pooled + oy) * p.x.pooled * p.outputs + channel;
      int32_t y0 = int32_t(oy * p.y.pool_stride - p.y.pool_padding), x0 = int32_t(-p.x.pool_padding);
      for (int64_t ox = 0; ox < p.x.pooled; ++ox, at += p.outputs, x0 += int32_t(p.x.pool_stride)) {
        f32v error = channels == lanes ? load(p.delta + at) : load(p.delta + at, channels);
        bias += error;
        i32v k = load_bytes(p.winner + at, channels);
        i32v ky = __builtin_convertvector((to_float(k) + 0.5f) * inverse, i32v);
        i32v y = ky + y0, x = k - ky * kernel_x + x0;
        i32v inside = (ky < kernel_y) & (y >= 0) & (y < out_y) & (x >= 0) & (x < out_x);
        outside |= ~inside & (error != 0);
        // windows overlap: those that share a winner become one term
        i32v place = (inside & ((y - top) * out_x + x)) + maps;
        int32_t place_of[lanes];
        float error_of[lanes];
        memcpy(place_of, &place, sizeof place);
        memcpy(error_of, &error, sizeof error);
        for (int64_t c = 0; c < channels; ++c) task.map[place_of[c]] += error_of[c];
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      int64_t start = (channel - task.first + c) * plan.capacity;
      count[c] = compress(task.map + c * plan.map, plan.map, task.places, int32_t(i * plan.image), count[c],
                          task.winners + start, task.errors + start);
    }
  }
  memcpy(task.counts + channel - task.first, count, size_t(channels) * sizeof(int32_t));
  if (task.first_chunk == 0)
    for (int64_t c = 0; c < channels; ++c) p.bias[channel + c] += bias[c];
  int32_t any = 0;
  for (int c = 0; c < lanes; ++c) any |= outside[c];
  return any == 0;
}

template <class T>
static void copy(float* to, const T* from, int64_t n) {
  for (; n >= lanes; n -= lanes, to += lanes, from += lanes) store(to, load(from));
  if (n > 0) store(to, load(from, n), n);
}

template <class T>
static void pack_images(const PooledWeightGradientParams& p, const PooledWeightGradientPlan& plan,
                        const PooledWeightGradientTask& task, int64_t pack) {
  int64_t channel = task.first_chunk * plan.width, chunks = task.last_chunk - task.first_chunk;
  int64_t last = plan.cells * p.x.dilation - p.x.padding;
  if (last > p.x.in) last = p.x.in;
  bool contiguous = plan.width == p.inputs && p.x.dilation == 1;
  if (pack == 0 || plan.bands > 1) memset(task.images, 0, size_t(chunks * plan.images) * sizeof(float));
  for (int64_t i = 0, b = pack * plan.together; i < plan.together && b < p.samples * plan.bands; ++i, ++b) {
    int64_t sample = b / plan.bands;
    int64_t top = (b % plan.bands * plan.band * p.y.pool_stride - p.y.pool_padding) * p.y.stride - p.y.padding;
    for (int64_t r = top < 0 ? -top : 0; r < plan.rows && top + r < p.y.in; ++r) {
      const T* from = (const T*)p.input + (sample * p.y.in + top + r) * p.x.in * p.inputs + channel;
      float* row = task.images + i * plan.image + r * plan.row;
      if (contiguous) {
        copy(row + p.x.padding * plan.width, from, last * plan.width);
        continue;
      }
      for (int64_t x = 0, cell = p.x.padding / p.x.dilation, residue = p.x.padding % p.x.dilation; x < last; ++x) {
        float* to = row + (residue * plan.cells + cell) * plan.width;
        for (int64_t c = 0, left = p.inputs - channel; c < chunks; ++c, left -= plan.width)
          copy(to + c * plan.images, from + x * p.inputs + c * plan.width, left < plan.width ? left : plan.width);
        if (++residue == p.x.dilation) residue = 0, ++cell;
      }
    }
  }
}

// Adds to the gradient of a tile of the kernel, R rows of V vectors each, which stays in registers.
template <int R, int V>
static void accumulate(const float* image, int64_t row, const int32_t* places, const float* errors, int32_t count,
                       float* sums, int64_t sums_row) {
  constexpr int chains = (7 + R * V) / (R * V);  // with fewer than 8 accumulators, additions would wait for one another
  f32v sum[chains][R][V] = {};
  auto add = [&](f32v(&to)[R][V], int32_t i) __attribute__((always_inline)) {
    const float* from = image + places[i];
    f32v error = broadcast(errors[i]);
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r, from += row) {
      asm("" : "+r"(from));  // one addition a row: of its own accord gcc computes each vector's address
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) to[r][v] = mul_add(load(from + v * lanes), error, to[r][v]);
    }
  };
  int32_t i = 0;
  for (; i + chains <= count; i += chains)
#pragma GCC unroll 32
    for (int j = 0; j < chains; ++j) add(sum[j], i + j);
  if constexpr (chains > 1)
    for (; i < count; ++i) add(sum[0], i);
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 32
      for (int j = 1; j < chains; ++j) sum[0][r][v] += sum[j][r][v];
      float* to = sums + r * sums_row + v * lanes;
      store(to, load(to) + sum[0][r][v]);
    }
}

using Accumulate = decltype(&accumulate<1, 1>);

template <int R = max_rows, int V = max_vectors>
static Accumulate accumulator(int64_t rows, int64_t vectors) {
  if constexpr (R > 1) {
    if (rows < R) return accumulator<R - 1, V>(rows, vectors);
  }
  if constexpr (V > 1) {
    if (vectors < V) return accumulator<R, V - 1>(rows, vectors);
  }
  if constexpr (R * V <= budget) return &accumulate<R, V>;
  return nullptr;
}

// The largest even part of n that is at most max
static int64_t share(int64_t n, int64_t max) {
  int64_t parts = (n + max - 1) / max;
  return (n + parts - 1) / parts;
}

bool pooled_weight_gradient(const PooledWeightGradientParams& p, const PooledWeightGradientPlan& plan,
                            const PooledWeightGradientTask& task) {
  int64_t chunks = task.last_chunk - task.first_chunk, row = plan.vectors * lanes, step = p.y.dilation * plan.row;
  int64_t V = share(plan.vectors, max_vectors);
  int64_t R = share(p.y.kernel, budget / V < max_rows ? budget / V : max_rows);
  bool inside = true;
  memset(task.sums, 0, size_t((task.last - task.first) * chunks * plan.sums) * sizeof(float));
  for (int64_t pack = 0; pack < plan.packs; ++pack) {
    for (int64_t c = task.first; c < task.last; c += lanes) inside &= find_winners(p, plan, task, pack, c);
    p.input_is_bf16 ? pack_images<bf16>(p, plan, task, pack) : pack_images<float>(p, plan, task, pack);
    for (int64_t r = 0; r < p.y.kernel; r += R)
      for (int64_t v = 0; v < plan.vectors; v += V) {
        Accumulate add =
            accumulator(p.y.kernel - r < R ? p.y.kernel - r : R, plan.vectors - v < V ? plan.vectors - v : V);
        for (int64_t i = 0; i < chunks; ++i)
          for (int64_t c = 0; c < task.last - task.first; ++c)
            add(task.images + i * plan.images + r * step + v * lanes, step, task.winners + c * plan.capacity,
                task.errors + c * plan.capacity, task.counts[c],
                task.sums + (c * chunks + i) * plan.sums + r * row + v * lanes, row);
      }
  }

  const int64_t* strides = p.weight_strides;
  for (int64_t c = task.first; c < task.last; ++c)
    for (int64_t chunk = task.first_chunk; chunk < task.last_chunk; ++chunk) {
      const float* from = task.sums + ((c - task.first) * chunks + chunk - task.first_chunk) * plan.sums;
      int64_t channel = chunk * plan.width,
              channels = p.inputs - channel < plan.width ? p.inputs - channel : plan.width;
      for (int64_t ky = 0; ky < p.y.kernel; ++ky)
        for (int64_t kx = 0; kx < p.x.kernel; ++kx) {
          const float* tap = from + ky * row + kx * plan.width;
          float* to = p.weight + c * strides[0] + channel * strides[1] + ky * strides[2] + kx * strides[3];
          if (strides[1] == 1) {
            copy(to, tap, channels);
          } else {
            for (int64_t i = 0; i < channels; ++i) to[i * strides[1]] = tap[i];
          }
        }
    }
  return inside;
}

}  // namespace fbk::FBK_SIMD
