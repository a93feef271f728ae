// Convolutions and fully connected layers, INT8 codes in and out, exact to the bit.
//
// build.py compiles this file once for each instruction set and links the results into one library, whose functions
// carry the set's name (LEVEL). layers.py fills in `Layer` and proves that the sums fit.
//
// Images are (n, height, width, channels). Some pixels' windows are gathered side by side as the rows of a panel, in
// the form in which the multiplying instruction takes codes; tiles of rows x outputs are summed up in registers and
// requantized there. Sums are kept modulo 2^32, so that their order and what lies between do not matter.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Mirrored by layers.py, field by field.
struct Layer {
  int32_t height, width, channels, out_height, out_width, outputs;
  int32_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int32_t groups, depthwise;
  int32_t rule, narrow, wrapped_bits, register_low, register_high;  // of the register, if narrower than 32 bits
  int32_t zero_point, low, high;                                    // of the output
  const void* weights;    // by pack()
  const int8_t* padding;  // as many codes of the input's zero point as there are channels, to the next 64
  // One entry a position, see order().
  const int32_t *start, *left, *mantissa, *half, *sign, *right;
  const int64_t *nudge, *step, *shift;
  const float* factor;
  const double* wide_factor;
};

namespace {

enum Rule { kTwoSteps, kFixed, kFloat32, kFloat64 };

// ---- What an instruction set offers: a vector of sums, what a panel holds of a code, and a multiplication of a
// step, which is four bytes of the panel.

#if defined(__AVX512VNNI__)
constexpr int kLanes = 16, kRows = 12, kOffset = 128;  // a cell is a code + kOffset
using Cell = uint8_t;
using Weight = int8_t;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6, kOffset = 0;
using Cell = int16_t;
using Weight = int16_t;
#else
constexpr int kLanes = 4, kRows = 4, kOffset = 0;
using Cell = int16_t;
using Weight = int16_t;
#endif
constexpr int kVectors = 2, kCells = 4 / sizeof(Cell);
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

inline Ints load(const void* from) {
  Ints v;
  memcpy(&v, from, sizeof v);
  return v;
}

inline Ints every(int32_t x) { return x - Ints{}; }

inline Ints dot(Ints sums, Ints cells, Ints weights) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)cells, (__m512i)weights);
#elif defined(__AVX2__)
  return sums + (Ints)_mm256_madd_epi16((__m256i)cells, (__m256i)weights);
#elif defined(__SSE2__)
  return sums + (Ints)_mm_madd_epi16((__m128i)cells, (__m128i)weights);
#else
  return sums + ((cells << 16) >> 16) * ((weights << 16) >> 16) + (cells >> 16) * (weights >> 16);
#endif
}

// (a * b + 2^31) >> 32
inline Ints high_half(Ints a, Ints b) {
#if defined(__AVX512VNNI__)
  const __m512i half = _mm512_set1_epi64(1LL << 31);
  __m512i x = (__m512i)a, y = (__m512i)b;
  __m512i even = _mm512_add_epi64(_mm512_mul_epi32(x, y), half);
  __m512i odd = _mm512_add_epi64(_mm512_mul_epi32(_mm512_srli_epi64(x, 32), _mm512_srli_epi64(y, 32)), half);
  return (Ints)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
#elif defined(__AVX2__)
  const __m256i half = _mm256_set1_epi64x(1LL << 31);
  __m256i x = (__m256i)a, y = (__m256i)b;
  __m256i even = _mm256_add_epi64(_mm256_mul_epi32(x, y), half);
  __m256i odd = _mm256_add_epi64(_mm256_mul_epi32(_mm256_srli_epi64(x, 32), _mm256_srli_epi64(y, 32)), half);
  return (Ints)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
  for (int i = 0; i < kLanes; ++i) a[i] = (int64_t(a[i]) * b[i] + (1LL << 31)) >> 32;
  return a;
#endif
}

inline Ints clamp(Ints v, Ints low, Ints high) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_min_epi32(_mm512_max_epi32((__m512i)v, (__m512i)low), (__m512i)high);
#elif defined(__AVX2__)
  return (Ints)_mm256_min_epi32(_mm256_max_epi32((__m256i)v, (__m256i)low), (__m256i)high);
#else
  v = v < low ? low : v;
  return v > high ? high : v;
#endif
}

// Stores the first `count` lanes, which are codes.
inline void store(int8_t* to, Ints codes, int count) {
#if defined(__AVX512VNNI__)
  const __m128i narrow = _mm512_cvtepi32_epi8((__m512i)codes);
  if (count >= kLanes)  // a store with a mask is slow on some CPUs
    _mm_storeu_si128((__m128i*)to, narrow);
  else if (count == 8)
    _mm_storel_epi64((__m128i*)to, narrow);
  else
    _mm_mask_storeu_epi8(to, (1 << count) - 1, narrow);
#else
  int8_t narrow[kLanes];
  for (int i = 0; i < kLanes; ++i) narrow[i] = codes[i];
  memcpy(to, narrow, count >= kLanes ? kLanes : count);
#endif
}

// ---- From a sum to a code.

inline Ints held(const Layer& layer, Ints v) {
  if (!layer.narrow) return v;
  v = (v << layer.wrapped_bits) >> layer.wrapped_bits;
  return clamp(v, every(layer.register_low), every(layer.register_high));
}

// ((v << left) * mantissa rounded half up to its high half, + half, less 1 where negative and `sign`) >> right
template <int RULE>
struct Requantizer {
  const Layer& layer;
  Ints left, mantissa, half, sign, right, zero_point, low, high;
  Requantizer(const Layer& l, int64_t at)
      : layer(l), left(load(l.left + at)), mantissa(load(l.mantissa + at)), half(load(l.half + at)),
        sign(load(l.sign + at)), right(load(l.right + at)), zero_point(every(l.zero_point)), low(every(l.low)),
        high(every(l.high)) {}
  Ints operator()(Ints v) const {
    v = high_half(held(layer, v) << left, mantissa);
    return clamp(((v + half + ((v >> 31) & sign)) >> right) + zero_point, low, high);
  }
};

template <class Real>
inline Real within(Real x, Real low, Real high) {
  return x < low ? low : x > high ? high : x;
}

// What works lane by lane; the compiler makes vectors of it.
template <int RULE>
struct ByLane {
  const Layer& layer;
  int64_t at;
  ByLane(const Layer& l, int64_t position) : layer(l), at(position) {}
  Ints operator()(Ints sums) const {
    Ints v = held(layer, sums);
    const int64_t zero_point = layer.zero_point, low = layer.low - zero_point, high = layer.high - zero_point;
    alignas(64) int32_t x[kLanes];
    memcpy(x, &v, sizeof x);
    for (int i = 0; i < kLanes; ++i) {
      if (RULE == kFixed) {
        int64_t p = int64_t(x[i]) * layer.mantissa[at + i];
        p = (p + layer.nudge[at + i] + ((p >> 63) & layer.step[at + i])) >> layer.shift[at + i];
        x[i] = int32_t(within<int64_t>(p, low, high) + zero_point);
      } else if (RULE == kFloat32) {
        // The bounds are whole numbers, so that rounding after them is the same.
        float f = within<float>(float(x[i]) * layer.factor[at + i], float(low), float(high));
        x[i] = int32_t(__builtin_rintf(f)) + int32_t(zero_point);
      } else {
        double d = within<double>(double(x[i]) * layer.wide_factor[at + i], double(low), double(high));
        double whole = __builtin_trunc(d);
        // Twice what is left is exact: 0, or one step away from zero.
        x[i] = int32_t(whole + __builtin_trunc(2 * (d - whole))) + int32_t(zero_point);
      }
    }
    memcpy(&v, x, sizeof v);
    return v;
  }
};
template <>
struct Requantizer<kFixed> : ByLane<kFixed> { using ByLane::ByLane; };
template <>
struct Requantizer<kFloat32> : ByLane<kFloat32> { using ByLane::ByLane; };
template <>
struct Requantizer<kFloat64> : ByLane<kFloat64> { using ByLane::ByLane; };

// ---- Panels.

struct Scratch {
  void* memory = nullptr;
  int64_t size = 0;
  ~Scratch() { free(memory); }
  void* of(int64_t bytes) {
    if (bytes > size) {
      free(memory);
      memory = nullptr;
      size = posix_memalign(&memory, 64, bytes) ? 0 : bytes;
    }
    return memory;
  }
};
thread_local Scratch scratch;

// May write up to 64 bytes beyond, where the next cells come.
inline void copy(Cell* to, const int8_t* from, int64_t count) {
#if defined(__AVX512VNNI__)
  const __m512i flip = _mm512_set1_epi8(char(0x80));  // s8 + 128 = u8
  int64_t i = 0;
  for (; i + 64 <= count; i += 64)
    _mm512_storeu_si512(to + i, _mm512_xor_si512(_mm512_loadu_si512(from + i), flip));
  if (i < count) {
    const __mmask64 mask = (1ULL << (count - i)) - 1;
    _mm512_storeu_si512(to + i, _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, from + i), flip));
  }
#else
  for (int64_t i = 0; i < count; ++i) to[i] = Cell(from[i] + kOffset);
#endif
}

// The window of one output pixel: kernel row by kernel row, column by column, the group's channels.
inline void gather(const Layer& l, const int8_t* x, int64_t pixel, int group, Cell* to) {
  const int64_t channels = l.channels / l.groups, first = group * channels;
  const int64_t across = pixel % l.out_width, down = pixel / l.out_width % l.out_height;
  const int64_t top = down * l.stride_h - l.pad_top, left = across * l.stride_w - l.pad_left;
  const int8_t* image = x + pixel / l.out_width / l.out_height * l.height * l.width * l.channels;
  const bool whole = l.groups == 1 && l.dilation_w == 1 && left >= 0 && left + l.kernel_w <= l.width;
  for (int64_t i = 0; i < l.kernel_h; ++i) {
    const int64_t row = top + i * l.dilation_h;
    const bool inside = row >= 0 && row < l.height;
    if (whole && inside) {
      copy(to, image + (row * l.width + left) * channels, l.kernel_w * channels);
      to += l.kernel_w * channels;
      continue;
    }
    for (int64_t j = 0; j < l.kernel_w; ++j, to += channels) {
      const int64_t column = left + j * l.dilation_w;
      const bool there = inside && column >= 0 && column < l.width;
      copy(to, there ? image + (row * l.width + column) * l.channels + first : l.padding, channels);
    }
  }
}

inline int64_t window_cells(const Layer& l) { return int64_t(l.kernel_h) * l.kernel_w * (l.channels / l.groups); }
inline int64_t steps_of(const Layer& l) { return (window_cells(l) + kCells - 1) / kCells; }
inline int64_t vectors_of(const Layer& l) { return (l.outputs / l.groups + kLanes - 1) / kLanes; }  // of a group

// ---- Sums over all channels of a group.

template <int RULE, int ROWS, int VECTORS>
void tile(const Layer& l, const char* panel, int64_t stride, int64_t steps, const char* weights, int64_t position,
          int8_t* y, int count) {
  Ints sums[ROWS][VECTORS];
  for (int v = 0; v < VECTORS; ++v) {
    Ints start = load(l.start + position + v * kLanes);
    for (int r = 0; r < ROWS; ++r) sums[r][v] = start;
  }
  const char* rows[(ROWS + 2) / 3];  // a base for each three rows, which an address can tell apart
  for (int b = 0; b < (ROWS + 2) / 3; ++b) rows[b] = panel + 3 * b * stride;
  for (int64_t s = 0; s < steps; ++s) {
    Ints w[VECTORS];
    for (int v = 0; v < VECTORS; ++v) w[v] = load(weights + v * sizeof(Ints));
    weights += VECTORS * sizeof(Ints);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      int32_t cells;
      memcpy(&cells, rows[r / 3] + r % 3 * stride, 4);
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = dot(sums[r][v], every(cells), w[v]);
    }
    for (int b = 0; b < (ROWS + 2) / 3; ++b) rows[b] += 4;
  }
  for (int v = 0; v < VECTORS; ++v) {
    const Requantizer<RULE> codes(l, position + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) store(y + r * l.outputs + v * kLanes, codes(sums[r][v]), count - v * kLanes);
  }
}

template <int RULE, int VECTORS>
void column(const Layer& l, const char* panel, int64_t rows, int64_t steps, const char* weights, int64_t position,
            int8_t* y, int count) {
  const int64_t stride = 4 * steps;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    tile<RULE, kRows, VECTORS>(l, panel + r * stride, stride, steps, weights, position, y + r * l.outputs, count);
  for (; r + 3 <= rows; r += 3)
    tile<RULE, 3, VECTORS>(l, panel + r * stride, stride, steps, weights, position, y + r * l.outputs, count);
  for (; r < rows; ++r)
    tile<RULE, 1, VECTORS>(l, panel + r * stride, stride, steps, weights, position, y + r * l.outputs, count);
}

template <int RULE>
bool dense(const Layer& l, const int8_t* x, int8_t* y, int64_t first, int64_t last) {
  const int64_t steps = steps_of(l), stride = 4 * steps, outputs = l.outputs / l.groups, vectors = vectors_of(l);
  // Panel and what comes of it stay in the cache while the weights pass.
  int64_t rows = (128 << 10) / (stride + outputs) / kRows * kRows;
  rows = within<int64_t>(rows, 4 * kRows, 64 * kRows);
  if (rows > last - first) rows = last - first;
  char* panel = (char*)scratch.of(rows * stride + 64);
  if (!panel) return false;
  for (int64_t pixel = first; pixel < last; pixel += rows) {
    const int64_t count = pixel + rows < last ? rows : last - pixel;
    for (int64_t g = 0; g < l.groups; ++g) {
      // Cells between the window's last and the step's last meet weights of 0.
      for (int64_t r = 0; r < count; ++r) gather(l, x, pixel + r, g, (Cell*)(panel + r * stride));
      for (int64_t v = 0; v < vectors; v += kVectors) {
        const int64_t vector = g * vectors + v;
        const char* weights = (const char*)l.weights + vector * steps * sizeof(Ints);
        int8_t* to = y + pixel * l.outputs + g * outputs + v * kLanes;
        const int left = outputs - v * kLanes;
        if (vectors - v >= kVectors)
          column<RULE, kVectors>(l, panel, count, steps, weights, vector * kLanes, to, left);
        else
          column<RULE, 1>(l, panel, count, steps, weights, vector * kLanes, to, left);
      }
    }
  }
  return true;
}

// ---- Sums over a window of one channel: 64 channels at a time.

constexpr int kBlock = 64, kMostTaps = 64;

#if defined(__AVX512VNNI__)
// Four taps are brought together byte by byte, in each quarter of the vectors on its own: vector j holds of each
// quarter q the channels 16 q + 4 j to 16 q + 4 j + 3. Packing the codes undoes it.
inline int channel_at(int position) {
  const int j = position / 16, q = position % 16 / 4;
  return 16 * q + 4 * j + position % 4;
}
constexpr int kTaps = 4;

template <int RULE>
inline void block(const Layer& l, const int8_t* const* taps, int count, const char* weights, int64_t position,
                  int8_t* y, int channels, int64_t room) {
  const __mmask64 mask = channels >= kBlock ? ~0ULL : (1ULL << channels) - 1;
  const __m512i flip = _mm512_set1_epi8(char(0x80));
  Ints sums[4];
  for (int j = 0; j < 4; ++j) sums[j] = load(l.start + position + 16 * j);
  for (int t = 0; t < count; t += kTaps, weights += 4 * sizeof(Ints)) {
    __m512i x[kTaps];
    for (int i = 0; i < kTaps; ++i)
      x[i] = t + i < count ? _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, taps[t + i]), flip) : flip;
    __m512i low = _mm512_unpacklo_epi8(x[0], x[1]), high = _mm512_unpackhi_epi8(x[0], x[1]);
    __m512i low2 = _mm512_unpacklo_epi8(x[2], x[3]), high2 = _mm512_unpackhi_epi8(x[2], x[3]);
    sums[0] = dot(sums[0], (Ints)_mm512_unpacklo_epi16(low, low2), load(weights));
    sums[1] = dot(sums[1], (Ints)_mm512_unpackhi_epi16(low, low2), load(weights + 64));
    sums[2] = dot(sums[2], (Ints)_mm512_unpacklo_epi16(high, high2), load(weights + 128));
    sums[3] = dot(sums[3], (Ints)_mm512_unpackhi_epi16(high, high2), load(weights + 192));
  }
  for (int j = 0; j < 4; ++j) sums[j] = Requantizer<RULE>(l, position + 16 * j)(sums[j]);
  __m512i first = _mm512_packs_epi32((__m512i)sums[0], (__m512i)sums[1]);
  __m512i second = _mm512_packs_epi32((__m512i)sums[2], (__m512i)sums[3]);
  const __m512i codes = _mm512_packs_epi16(first, second);
  if (room >= kBlock)
    _mm512_storeu_si512(y, codes);
  else
    _mm512_mask_storeu_epi8(y, mask, codes);
}
#else
inline int channel_at(int position) { return position; }
constexpr int kTaps = 1;

template <int RULE>
inline void block(const Layer& l, const int8_t* const* taps, int count, const char* weights, int64_t position,
                  int8_t* y, int channels, int64_t) {
  alignas(64) int32_t sums[kBlock];
  memcpy(sums, l.start + position, sizeof sums);
  const Weight* w = (const Weight*)weights;
  for (int t = 0; t < count; ++t, w += kBlock) {
    const int8_t* x = taps[t];
    if (channels >= kBlock)
      for (int c = 0; c < kBlock; ++c) sums[c] += int16_t(x[c]) * w[c];
    else
      for (int c = 0; c < channels; ++c) sums[c] += int16_t(x[c]) * w[c];
  }
  for (int c = 0; c < channels && c < kBlock; c += kLanes)
    store(y + c, Requantizer<RULE>(l, position + c)(load(sums + c)), channels - c);
}
#endif

inline int64_t blocks_of(const Layer& l) { return (l.channels + kBlock - 1) / kBlock; }
inline int64_t block_weights(const Layer& l) {  // how many
  return (int64_t(l.kernel_h) * l.kernel_w + kTaps - 1) / kTaps * kTaps * kBlock;
}

template <int RULE, int TAPS>
void depthwise(const Layer& l, const int8_t* x, int8_t* y, int64_t first, int64_t last) {
  const int count = TAPS ? TAPS : l.kernel_h * l.kernel_w;
  const int64_t line = int64_t(l.width) * l.channels, size = block_weights(l) * sizeof(Weight);
  for (int64_t pixel = first; pixel < last; ++pixel) {
    const int64_t across = pixel % l.out_width, down = pixel / l.out_width % l.out_height;
    const int64_t top = down * l.stride_h - l.pad_top, left = across * l.stride_w - l.pad_left;
    const int8_t* image = x + pixel / l.out_width / l.out_height * l.height * line;
    const int8_t* taps[TAPS ? TAPS : kMostTaps];
    for (int i = 0, t = 0; i < l.kernel_h; ++i) {
      const int64_t row = top + i * l.dilation_h;
      for (int j = 0; j < l.kernel_w; ++j, ++t) {
        const int64_t at = left + j * l.dilation_w;
        const bool there = row >= 0 && row < l.height && at >= 0 && at < l.width;
        taps[t] = there ? image + row * line + at * l.channels : l.padding;
      }
    }
    int8_t* to = y + pixel * l.channels;
    for (int64_t b = 0; b < blocks_of(l); ++b) {
      const int8_t* here[TAPS ? TAPS : kMostTaps];
      for (int t = 0; t < count; ++t) here[t] = taps[t] + b * kBlock;
      // What is written beyond the pixel's last channel the next pixel overwrites.
      block<RULE>(l, here, count, (const char*)l.weights + b * size, b * kBlock, to + b * kBlock,
                  l.channels - b * kBlock, (last - pixel) * l.channels - b * kBlock);
    }
  }
}

template <int RULE>
bool run(const Layer& l, const int8_t* x, int8_t* y, int64_t first, int64_t last) {
  if (!l.depthwise) return dense<RULE>(l, x, y, first, last);
  if (l.kernel_h == 3 && l.kernel_w == 3)
    depthwise<RULE, 9>(l, x, y, first, last);
  else
    depthwise<RULE, 0>(l, x, y, first, last);
  return true;
}

}  // namespace

// ---- What layers.py calls.

#define JOIN(a, b) a##_##b
#define NAMED(level, name) JOIN(level, name)
#define EXPORT(type, name) extern "C" __attribute__((visibility("default"))) type NAMED(LEVEL, name)

EXPORT(int, supported)() {
#if defined(__AVX512VNNI__)
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2");
#else
  return 1;
#endif
}

#if defined(DIGEST)
extern "C" __attribute__((visibility("default"))) const char* digest() { return DIGEST; }
#endif

EXPORT(int, offset)() { return kOffset; }

// How many positions the vectors of a layer have.
EXPORT(int64_t, positions)(const Layer* l) {
  return l->depthwise ? blocks_of(*l) * kBlock : l->groups * vectors_of(*l) * kLanes;
}

// The output channel at each position, -1 at those that are left over.
EXPORT(void, order)(const Layer* l, int64_t* to) {
  const int64_t each = vectors_of(*l) * kLanes, outputs = l->outputs / l->groups;
  for (int64_t p = 0, n = NAMED(LEVEL, positions)(l); p < n; ++p) {
    const int64_t dense = p % each < outputs ? p / each * outputs + p % each : -1;
    const int64_t channel = p / kBlock * kBlock + channel_at(p % kBlock);
    to[p] = !l->depthwise ? dense : channel < l->channels ? channel : -1;
  }
}

EXPORT(int64_t, packed_bytes)(const Layer* l) {
  if (l->depthwise) return blocks_of(*l) * block_weights(*l) * sizeof(Weight);
  return l->groups * vectors_of(*l) * steps_of(*l) * sizeof(Ints);
}

// Codes of weights (out, in / groups, kernel_h, kernel_w) in the order of use, into memory that is all zero.
EXPORT(void, pack)(const Layer* l, const int8_t* codes, void* memory) {
  const int64_t taps = int64_t(l->kernel_h) * l->kernel_w, channels = l->channels / l->groups;
  Weight* to = (Weight*)memory;
  if (l->depthwise) {
    for (int64_t p = 0; p < blocks_of(*l) * kBlock; ++p) {
      const int64_t channel = p / kBlock * kBlock + channel_at(p % kBlock);
      if (channel >= l->channels) continue;
      for (int64_t t = 0; t < taps; ++t)
        to[p / kBlock * block_weights(*l) + (t / kTaps * kBlock + p % kBlock) * kTaps + t % kTaps] =
            codes[channel * taps + t];
    }
    return;
  }
  const int64_t steps = steps_of(*l), vectors = vectors_of(*l), outputs = l->outputs / l->groups;
  for (int64_t o = 0; o < l->outputs; ++o) {
    const int64_t v = o % outputs / kLanes, first = v / kVectors * kVectors;
    const int64_t side_by_side = vectors - first >= kVectors ? kVectors : 1;
    Weight* lane = to + ((o / outputs * vectors + first) * steps + v - first) * kLanes * kCells + o % outputs % kLanes * kCells;
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0, k = t * channels; c < channels; ++c, ++k)
        lane[k / kCells * side_by_side * kLanes * kCells + k % kCells] = codes[(o * channels + c) * taps + t];
  }
}

// Output pixels first to last - 1, counted over all images. Returns 0, or 1 where there is no memory.
EXPORT(int, run)(const Layer* l, const int8_t* x, int8_t* y, int64_t first, int64_t last) {
  switch (l->rule) {
    case kTwoSteps: return !run<kTwoSteps>(*l, x, y, first, last);
    case kFixed: return !run<kFixed>(*l, x, y, first, last);
    case kFloat32: return !run<kFloat32>(*l, x, y, first, last);
    default: return !run<kFloat64>(*l, x, y, first, last);
  }
}
