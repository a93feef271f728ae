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
  const int8_t* padding;  // codes of the input's zero point, as many as four pixels have channels, to the next 64
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

// 1 where v is negative and `sign` is 31, 0 elsewhere; `sign` is 31 or 32.
inline Ints negative(Ints v, Ints sign) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_srlv_epi32((__m512i)v, (__m512i)sign);
#elif defined(__AVX2__)
  return (Ints)_mm256_srlv_epi32((__m256i)v, (__m256i)sign);
#else
  return (v >> 31) & (sign - 32) & 1;
#endif
}

// Clamps codes and stores them. Holds its bounds itself: a store of bytes might change any `Layer`, to a compiler.
struct Codes {
#if defined(__AVX512VNNI__)
  __m128i low, high;
  explicit Codes(const Layer& l) : low(_mm_set1_epi8(l.low)), high(_mm_set1_epi8(l.high)) {}
  void store(int8_t* to, Ints v, int count) const {
    const __m128i narrow = _mm_min_epi8(_mm_max_epi8(_mm512_cvtsepi32_epi8((__m512i)v), low), high);
    if (count >= kLanes)  // a store with a mask is slow on some CPUs
      _mm_storeu_si128((__m128i*)to, narrow);
    else if (count == 8)
      _mm_storel_epi64((__m128i*)to, narrow);
    else
      _mm_mask_storeu_epi8(to, (1 << count) - 1, narrow);
  }
#else
  Ints low, high;
  explicit Codes(const Layer& l) : low(every(l.low)), high(every(l.high)) {}
  void store(int8_t* to, Ints v, int count) const {
    v = clamp(v, low, high);
    int8_t narrow[kLanes];
    for (int i = 0; i < kLanes; ++i) narrow[i] = v[i];
    memcpy(to, narrow, count >= kLanes ? kLanes : count);
  }
#endif
};

// ---- From a sum to a code.

// What a register of fewer than 32 bits holds of a sum.
struct Register {
  bool narrow;
  int wrapped_bits;
  Ints low, high;
  explicit Register(const Layer& l)
      : narrow(l.narrow), wrapped_bits(l.wrapped_bits), low(every(l.register_low)), high(every(l.register_high)) {}
  Ints holds(Ints v) const {
    return narrow ? clamp((v << wrapped_bits) >> wrapped_bits, low, high) : v;
  }
};

// A code before it is clamped: ((v << left) * mantissa, rounded half up to its high half, + half, less 1 where it is
// negative and `sign` says so) >> right; `half` holds the output's zero point too.
template <int RULE>
struct Requantizer {
  Register held;
  Ints left, mantissa, half, sign, right;
  Requantizer(const Layer& l, int64_t at)
      : held(l), left(load(l.left + at)), mantissa(load(l.mantissa + at)), half(load(l.half + at)),
        sign(load(l.sign + at)), right(load(l.right + at)) {}
  Ints operator()(Ints v) const {
    v = high_half(held.holds(v) << left, mantissa);
    return (v + half - negative(v, sign)) >> right;
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
    Ints v = Register(layer).holds(sums);
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
  const __mmask64 mask = (1ULL << (count - i)) - 1;
  if (count - i > 32) {
    _mm512_storeu_si512(to + i, _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, from + i), flip));
  } else if (i < count) {
    const __m256i rest = _mm256_maskz_loadu_epi8(mask, from + i);
    _mm256_storeu_si256((__m256i*)(to + i), _mm256_xor_si256(rest, _mm512_castsi512_si256(flip)));
  }
#else
  for (int64_t i = 0; i < count; ++i) to[i] = Cell(from[i] + kOffset);
#endif
}

// An output pixel: in which image, row and column, and where its window begins.
struct Pixel {
  const Layer& l;
  int64_t image, down, across;
  Pixel(const Layer& layer, int64_t index)
      : l(layer), image(index / l.out_width / l.out_height), down(index / l.out_width % l.out_height),
        across(index % l.out_width) {}
  int64_t top() const { return down * l.stride_h - l.pad_top; }
  int64_t left() const { return across * l.stride_w - l.pad_left; }
  const int8_t* start(const int8_t* x) const { return x + image * l.height * l.width * l.channels; }
  void advance(int64_t pixels) {  // within the row, or to the next one
    across += pixels;
    if (across < l.out_width) return;
    across = 0;
    if (++down < l.out_height) return;
    down = 0;
    ++image;
  }
};

// The window of one output pixel: kernel row by kernel row, column by column, the group's channels.
inline void gather(const Layer& layer, const int8_t* x, const Pixel& pixel, int group, Cell* to) {
  // Copies: a store of bytes might change the layer, to a compiler.
  const int64_t height = layer.height, width = layer.width, kernel_h = layer.kernel_h, kernel_w = layer.kernel_w;
  const int64_t dilation_h = layer.dilation_h, dilation_w = layer.dilation_w, stride = layer.channels;
  const int64_t channels = stride / layer.groups, top = pixel.top(), left = pixel.left();
  const int8_t *image = pixel.start(x) + group * channels, *padding = layer.padding;
  const bool whole = layer.groups == 1 && dilation_w == 1 && left >= 0 && left + kernel_w <= width;
  for (int64_t i = 0; i < kernel_h; ++i) {
    const int64_t row = top + i * dilation_h;
    const bool inside = row >= 0 && row < height;
    if (whole && inside) {
      copy(to, image + (row * width + left) * channels, kernel_w * channels);
      to += kernel_w * channels;
      continue;
    }
    for (int64_t j = 0; j < kernel_w; ++j, to += channels) {
      const int64_t column = left + j * dilation_w;
      const bool there = inside && column >= 0 && column < width;
      copy(to, there ? image + (row * width + column) * stride : padding, channels);
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
  const Codes codes(l);
  const int64_t apart = l.outputs;
  for (int v = 0; v < VECTORS; ++v) {
    const Requantizer<RULE> code(l, position + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) codes.store(y + r * apart + v * kLanes, code(sums[r][v]), count - v * kLanes);
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
  const bool one_to_one = l.groups == 1 && l.kernel_h * l.kernel_w * l.stride_h * l.stride_w == 1 &&
                          l.height == l.out_height && l.width == l.out_width && l.channels % kCells == 0;
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
      Pixel next(l, pixel);
      if (one_to_one)
        copy((Cell*)panel, x + pixel * l.channels, count * l.channels);
      else
        for (int64_t r = 0; r < count; ++r, next.advance(1)) gather(l, x, next, g, (Cell*)(panel + r * stride));
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

// Where windows move by one pixel, neighbours are one long row of channels, and so many of them are whole blocks.
inline int64_t pixels_of(const Layer& l) {
  int64_t pixels = 1;
  while (l.stride_w == 1 && pixels * l.channels % kBlock && pixels < 4) pixels *= 2;
  return pixels * l.channels % kBlock ? 1 : pixels;
}
inline int64_t blocks_of(const Layer& l) { return (pixels_of(l) * l.channels + kBlock - 1) / kBlock; }

#if defined(__AVX512VNNI__)
// Four taps are brought together byte by byte, in each quarter of the vectors on its own: vector j holds of each
// quarter q the channels 16 q + 4 j to 16 q + 4 j + 3. Packing the codes undoes it.
inline int channel_at(int position) {
  const int j = position / 16, q = position % 16 / 4;
  return 16 * q + 4 * j + position % 4;
}
constexpr int kTaps = 4;

// Codes of one block of N windows, whose taps lie `apart[t]` bytes from each other.
template <int RULE, int N>
inline void block(const Layer& l, const int8_t* const* taps, const int64_t* apart, int64_t first, int count,
                  const char* weights, int8_t* y, int64_t y_apart, int64_t channels, int64_t room) {
  const bool full = channels >= kBlock;
  const __mmask64 mask = full ? ~0ULL : (1ULL << channels) - 1;
  const __m512i flip = _mm512_set1_epi8(char(0x80));
  Ints sums[N][4];
  for (int n = 0; n < N; ++n)
    for (int j = 0; j < 4; ++j) sums[n][j] = load(l.start + first + 16 * j);
  for (int t = 0; t < count; t += kTaps, weights += 4 * sizeof(Ints))
    for (int n = 0; n < N; ++n) {
      __m512i x[kTaps];
      for (int i = 0; i < kTaps; ++i) {
        if (t + i >= count) {
          x[i] = flip;  // meets weights of 0
          continue;
        }
        const int8_t* from = taps[t + i] + n * apart[t + i] + first;
        x[i] = _mm512_xor_si512(full ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(mask, from), flip);
      }
      const __m512i low = _mm512_unpacklo_epi8(x[0], x[1]), high = _mm512_unpackhi_epi8(x[0], x[1]);
      const __m512i low2 = _mm512_unpacklo_epi8(x[2], x[3]), high2 = _mm512_unpackhi_epi8(x[2], x[3]);
      sums[n][0] = dot(sums[n][0], (Ints)_mm512_unpacklo_epi16(low, low2), load(weights));
      sums[n][1] = dot(sums[n][1], (Ints)_mm512_unpackhi_epi16(low, low2), load(weights + 64));
      sums[n][2] = dot(sums[n][2], (Ints)_mm512_unpacklo_epi16(high, high2), load(weights + 128));
      sums[n][3] = dot(sums[n][3], (Ints)_mm512_unpackhi_epi16(high, high2), load(weights + 192));
    }
  for (int j = 0; j < 4; ++j) {
    const Requantizer<RULE> codes(l, first + 16 * j);
    for (int n = 0; n < N; ++n) sums[n][j] = codes(sums[n][j]);
  }
  const __m512i low = _mm512_set1_epi8(l.low), high = _mm512_set1_epi8(l.high);
  for (int n = 0; n < N; ++n, y += y_apart, room -= y_apart) {
    __m512i codes = _mm512_packs_epi16(_mm512_packs_epi32((__m512i)sums[n][0], (__m512i)sums[n][1]),
                                       _mm512_packs_epi32((__m512i)sums[n][2], (__m512i)sums[n][3]));
    codes = _mm512_min_epi8(_mm512_max_epi8(codes, low), high);
    if (room >= kBlock)  // what is written beyond the pixel's last channel, its owner overwrites
      _mm512_storeu_si512(y + first, codes);
    else
      _mm512_mask_storeu_epi8(y + first, mask, codes);
  }
}
#else
inline int channel_at(int position) { return position; }
constexpr int kTaps = 1;

template <int RULE, int N>
inline void block(const Layer& l, const int8_t* const* taps, const int64_t* apart, int64_t first, int count,
                  const char* weights, int8_t* y, int64_t y_apart, int64_t channels, int64_t) {
  for (int n = 0; n < N; ++n) {
    alignas(64) int32_t sums[kBlock];
    memcpy(sums, l.start + first, sizeof sums);
    const Weight* w = (const Weight*)weights;
    for (int t = 0; t < count; ++t, w += kBlock) {
      const int8_t* x = taps[t] + n * apart[t] + first;
      if (channels >= kBlock)
        for (int c = 0; c < kBlock; ++c) sums[c] += int16_t(x[c]) * w[c];
      else
        for (int c = 0; c < channels; ++c) sums[c] += int16_t(x[c]) * w[c];
    }
    for (int c = 0; c < channels && c < kBlock; c += kLanes)
      Codes(l).store(y + n * y_apart + first + c, Requantizer<RULE>(l, first + c)(load(sums + c)), channels - c);
  }
}
#endif

inline int64_t block_weights(const Layer& l) {  // how many
  return (int64_t(l.kernel_h) * l.kernel_w + kTaps - 1) / kTaps * kTaps * kBlock;
}

template <int RULE, int TAPS>
void depthwise(const Layer& l, const int8_t* x, int8_t* y, int64_t first, int64_t last) {
  constexpr int kMost = TAPS ? TAPS : kMostTaps;
  const int count = TAPS ? TAPS : l.kernel_h * l.kernel_w;
  const int64_t line = int64_t(l.width) * l.channels, size = block_weights(l) * sizeof(Weight);
  const int64_t together = pixels_of(l), reach = (l.kernel_w - 1) * l.dilation_w;
  Pixel next(l, first);
  for (int64_t pixel = first, taken; pixel < last; pixel += taken, next.advance(taken)) {
    const int64_t left = next.left(), top = next.top();
    // How many windows from here on lie between the image's sides, in this row.
    int64_t free = left < 0 ? 0 : (l.width - 1 - reach - left) / l.stride_w + 1;
    free = within<int64_t>(free, 0, within<int64_t>(l.out_width - next.across, 0, last - pixel));
    const int8_t* taps[kMost];
    int64_t apart[kMost];
    taken = free >= 2 * together ? 2 * together : free >= together ? together : 1;
    const int64_t unit = taken == 1 ? 1 : together;
    for (int i = 0, t = 0; i < l.kernel_h; ++i) {
      const int64_t row = top + i * l.dilation_h;
      const bool inside = row >= 0 && row < l.height;
      for (int j = 0; j < l.kernel_w; ++j, ++t) {
        const int64_t at = left + j * l.dilation_w;
        const bool there = inside && at >= 0 && at < l.width;
        taps[t] = there ? next.start(x) + row * line + at * l.channels : l.padding;
        apart[t] = there ? unit * l.stride_w * l.channels : 0;
      }
    }
    const int64_t width = unit * l.channels;
    int8_t* to = y + pixel * l.channels;
    // The last block first: what it writes beyond its pixel is the beginning of the next one.
    for (int64_t at = (width - 1) / kBlock * kBlock; at >= 0; at -= kBlock) {
      const char* weights = (const char*)l.weights + at / kBlock * size;
      const int64_t room = (last - pixel) * l.channels - at;
      if (taken == 2 * unit)
        block<RULE, 2>(l, taps, apart, at, count, weights, to, width, width - at, room);
      else
        block<RULE, 1>(l, taps, apart, at, count, weights, to, width, width - at, room);
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
    const int64_t neighbours = channel < pixels_of(*l) * l->channels ? channel % l->channels : -1;
    to[p] = l->depthwise ? neighbours : dense;
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
      int64_t channel = p / kBlock * kBlock + channel_at(p % kBlock);
      if (channel >= pixels_of(*l) * l->channels) continue;
      channel %= l->channels;
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
