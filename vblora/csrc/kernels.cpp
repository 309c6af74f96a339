// CPU kernels of the server's step: products of few rows, composing adapters, their deltas, attention of one new token
// over a paged cache, RMS norms, rotary positions, the highest logits, and forbidding some.
//
// Each does in one call what torch does in five to fifteen, of which every one costs microseconds. They know tensors,
// not adapters or requests. The slow references are in vblora/batched.py, serving/engine/attention.py and transformers.
//
// Sums are in float32. A function marked CLONES is compiled for several kinds of processor, and the loader picks the
// best one that this machine has; what it calls must be inlined into it to be compiled so too.

#include <ATen/core/Tensor.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <Python.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

// Linux's builds of torch for this processor export where oneDNN has put what it packed, but declare it nowhere.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define READS_PACKED 1
#include <immintrin.h>
namespace at::native {
void* data_ptr_from_mkldnn(const at::Tensor& packed);
int64_t nbytes_from_mkldnn(const at::Tensor& packed);
}  // namespace at::native
#endif

namespace {

using Bits16 = uint16_t;  // a bfloat16, as the upper half of a float

INLINE float widen(float value) { return value; }

INLINE float widen(Bits16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

INLINE void narrow(float value, float& target) { target = value; }

// To the nearest, halves to even; NaN stays NaN.
INLINE void narrow(float value, Bits16& target) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  target = static_cast<Bits16>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// `ITEMS(job, begin, end)` for jobs on float32 and on bfloat16, compiled for several kinds of processor.
#define FOR_BOTH(ITEMS, JOB) \
  CLONES void ITEMS##_f(const JOB<float>& job, int64_t begin, int64_t end) { ITEMS(job, begin, end); } \
  CLONES void ITEMS##_b(const JOB<Bits16>& job, int64_t begin, int64_t end) { ITEMS(job, begin, end); } \
  void run(const JOB<float>& job, int64_t begin, int64_t end) { ITEMS##_f(job, begin, end); } \
  void run(const JOB<Bits16>& job, int64_t begin, int64_t end) { ITEMS##_b(job, begin, end); }

// A matrix whose rows lie `stride` elements apart, each row without gaps.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};

// ---- y[i] += (x[i] Aᵀ) B of slot i, for some modules that share x, each with columns of y of its own.
// A slot is a row of the table; in it lie a module's A (R, in), and right behind it its B (R, out). Slot 0 is none.

constexpr int64_t RANKS = 4;  // of A and B that are read in one pass

template <typename T, typename W>
struct Delta {
  Rows<T> y;
  Rows<const T> x;
  Rows<const W> table;
  const int32_t* slots;
  const int64_t* modules;  // where in a slot each begins, and how many outputs it has
  int64_t number, inputs, ranks;
};

template <typename T, typename W>
INLINE void delta_module(const T* x, T* y, const W* a, const W* b, int64_t inputs, int64_t outputs) {
  const W *a0 = a, *a1 = a0 + inputs, *a2 = a1 + inputs, *a3 = a2 + inputs;
  float low0 = 0, low1 = 0, low2 = 0, low3 = 0;
#pragma omp simd reduction(+ : low0, low1, low2, low3)
  for (int64_t i = 0; i < inputs; ++i) {
    const float value = widen(x[i]);
    low0 += value * widen(a0[i]);
    low1 += value * widen(a1[i]);
    low2 += value * widen(a2[i]);
    low3 += value * widen(a3[i]);
  }
  const W *b0 = b, *b1 = b0 + outputs, *b2 = b1 + outputs, *b3 = b2 + outputs;
#pragma omp simd
  for (int64_t o = 0; o < outputs; ++o) {
    const float delta = low0 * widen(b0[o]) + low1 * widen(b1[o]) + low2 * widen(b2[o]) + low3 * widen(b3[o]);
    narrow(widen(y[o]) + delta, y[o]);
  }
}

// Slots lie far apart, each read in short pieces: too short for the processor to see ahead by itself.
template <typename W>
INLINE void prefetch(const W* begin, int64_t number) {
  constexpr int64_t LINE = 64;
  const char *address = reinterpret_cast<const char*>(begin), *end = reinterpret_cast<const char*>(begin + number);
  for (; address < end; address += LINE) __builtin_prefetch(address, 0, 2);
}

template <typename T, typename W>
INLINE void delta_rows(const Delta<T, W>& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (job.slots[row] == 0) continue;
    const bool ahead = row + 1 < end && job.slots[row + 1] != job.slots[row];
    T* y = job.y[row];
    for (int64_t module = 0; module < job.number; ++module) {
      const int64_t outputs = job.modules[2 * module + 1];
      const W *a = job.table[job.slots[row]] + job.modules[2 * module], *b = a + job.ranks * job.inputs;
      if (ahead)
        prefetch(job.table[job.slots[row + 1]] + job.modules[2 * module], job.ranks * (job.inputs + outputs));
      for (int64_t first = 0; first < job.ranks; first += RANKS)
        delta_module(job.x[row], y, a + first * job.inputs, b + first * outputs, job.inputs, outputs);
      y += outputs;
    }
  }
}

CLONES void delta_rows_ff(const Delta<float, float>& job, int64_t begin, int64_t end) { delta_rows(job, begin, end); }
CLONES void delta_rows_bf(const Delta<Bits16, float>& job, int64_t begin, int64_t end) { delta_rows(job, begin, end); }
CLONES void delta_rows_bb(const Delta<Bits16, Bits16>& job, int64_t begin, int64_t end) { delta_rows(job, begin, end); }

void run(const Delta<float, float>& job, int64_t begin, int64_t end) { delta_rows_ff(job, begin, end); }
void run(const Delta<Bits16, float>& job, int64_t begin, int64_t end) { delta_rows_bf(job, begin, end); }
void run(const Delta<Bits16, Bits16>& job, int64_t begin, int64_t end) { delta_rows_bb(job, begin, end); }

// ---- Sub-vectors: each the sum of k vectors of the bank by their weights, of which the last is what is left of one.

template <typename I, typename W>
struct Composition {
  W* target;             // (number, length)
  const I* indices;      // (number, k)
  const float* weights;  // (number, k − 1)
  const float* bank;     // (vectors, length)
  int64_t k, length;
};

template <typename I, typename W>
INLINE void compose_items(const Composition<I, W>& job, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const I* index = job.indices + item * job.k;
    const float* weight = job.weights + item * (job.k - 1);
    W* target = job.target + item * job.length;
    float last = 1.0f;
    for (int64_t j = 0; j + 1 < job.k; ++j) last -= weight[j];
    last = std::max(last, 0.0f);
    if (job.k == 2) {
      const float *first = job.bank + index[0] * job.length, *second = job.bank + index[1] * job.length;
#pragma omp simd
      for (int64_t i = 0; i < job.length; ++i) narrow(weight[0] * first[i] + last * second[i], target[i]);
      continue;
    }
    for (int64_t i = 0; i < job.length; ++i) {
      float sum = last * job.bank[index[job.k - 1] * job.length + i];
      for (int64_t j = 0; j + 1 < job.k; ++j) sum += weight[j] * job.bank[index[j] * job.length + i];
      narrow(sum, target[i]);
    }
  }
}

#define COMPOSITION(NAME, I, W) \
  CLONES void NAME(const Composition<I, W>& job, int64_t begin, int64_t end) { compose_items(job, begin, end); } \
  void run(const Composition<I, W>& job, int64_t begin, int64_t end) { NAME(job, begin, end); }

COMPOSITION(compose_8f, uint8_t, float)
COMPOSITION(compose_8b, uint8_t, Bits16)
COMPOSITION(compose_16f, int16_t, float)
COMPOSITION(compose_16b, int16_t, Bits16)
COMPOSITION(compose_32f, int32_t, float)
COMPOSITION(compose_32b, int32_t, Bits16)

// ---- Attention of one query a row over the blocks of a paged cache.

constexpr int64_t HEADS = 4;  // query heads of one key head that are looked at in one pass

template <typename T>
struct Decode {
  T* output;       // (rows, heads, value size), without gaps
  const T* query;  // (rows, heads, key size), a head without gaps
  int64_t row_stride, head_stride;
  Rows<const T> keys, values;  // a row a position: (key heads, size)
  const int32_t* tables;       // (rows, blocks)
  const int32_t* lengths;      // positions of each row that are filled
  const float* sinks;          // (heads,), or null
  int64_t heads, key_heads, key_size, value_size, blocks, block_size, window;
  float scaling, softcap;  // softcap 0: none
};

template <typename T>
INLINE void decode_pass(const Decode<T>& job, int64_t row, int64_t key_head, int64_t head, std::vector<float>& scratch) {
  const int64_t length = job.lengths[row], first = job.window ? std::max<int64_t>(0, length - job.window) : 0;
  const int64_t number = length - first, group = job.heads / job.key_heads;
  const int64_t width = std::min(HEADS, (key_head + 1) * group - head);
  const int32_t* table = job.tables + row * job.blocks;
  scratch.resize(HEADS * (job.key_size + job.value_size + number));
  float *query = scratch.data(), *sums = query + HEADS * job.key_size, *scores = sums + HEADS * job.value_size;
  for (int64_t h = 0; h < width; ++h) {
    const T* from = job.query + row * job.row_stride + (head + h) * job.head_stride;
    for (int64_t i = 0; i < job.key_size; ++i) query[h * job.key_size + i] = widen(from[i]) * job.scaling;
  }
  std::fill(query + width * job.key_size, query + HEADS * job.key_size, 0.0f);
  const float *q0 = query, *q1 = q0 + job.key_size, *q2 = q1 + job.key_size, *q3 = q2 + job.key_size;
  for (int64_t j = 0; j < number; ++j) {
    const int64_t at = first + j, position = table[at / job.block_size] * job.block_size + at % job.block_size;
    const T* key = job.keys[position] + key_head * job.key_size;
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < job.key_size; ++i) {
      const float value = widen(key[i]);
      s0 += value * q0[i];
      s1 += value * q1[i];
      s2 += value * q2[i];
      s3 += value * q3[i];
    }
    float* score = scores + HEADS * j;
    score[0] = s0, score[1] = s1, score[2] = s2, score[3] = s3;
  }
  for (int64_t h = 0; h < width; ++h) {
    if (job.softcap > 0)
      for (int64_t j = 0; j < number; ++j)
        scores[HEADS * j + h] = std::tanh(scores[HEADS * j + h] / job.softcap) * job.softcap;
    float highest = job.sinks ? job.sinks[head + h] : -INFINITY;
    for (int64_t j = 0; j < number; ++j) highest = std::max(highest, scores[HEADS * j + h]);
    float total = job.sinks ? std::exp(job.sinks[head + h] - highest) : 0.0f;
    for (int64_t j = 0; j < number; ++j) total += scores[HEADS * j + h] = std::exp(scores[HEADS * j + h] - highest);
    for (int64_t j = 0; j < number; ++j) scores[HEADS * j + h] /= total;
  }
  std::fill(sums, sums + HEADS * job.value_size, 0.0f);
  float *o0 = sums, *o1 = o0 + job.value_size, *o2 = o1 + job.value_size, *o3 = o2 + job.value_size;
  for (int64_t j = 0; j < number; ++j) {
    const int64_t at = first + j, position = table[at / job.block_size] * job.block_size + at % job.block_size;
    const T* value = job.values[position] + key_head * job.value_size;
    const float* weight = scores + HEADS * j;
    const float w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3];
#pragma omp simd
    for (int64_t i = 0; i < job.value_size; ++i) {
      const float element = widen(value[i]);
      o0[i] += w0 * element;
      o1[i] += w1 * element;
      o2[i] += w2 * element;
      o3[i] += w3 * element;
    }
  }
  T* output = job.output + (row * job.heads + head) * job.value_size;
  for (int64_t i = 0; i < width * job.value_size; ++i) narrow(sums[i], output[i]);
}

// Items are (row, key head) pairs, in that order.
template <typename T>
INLINE void decode_items(const Decode<T>& job, int64_t begin, int64_t end) {
  std::vector<float> scratch;
  const int64_t group = job.heads / job.key_heads;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / job.key_heads, key_head = item % job.key_heads;
    for (int64_t head = key_head * group; head < (key_head + 1) * group; head += HEADS)
      decode_pass(job, row, key_head, head, scratch);
  }
}

FOR_BOTH(decode_items, Decode)

// ---- x / sqrt(mean(x²) + eps) · weight over the last dimension.

template <typename T>
struct Norm {
  T* output;  // without gaps
  const T* x;
  const float* weight;
  int64_t sizes[3], strides[3], width;  // of the dimensions before the last
  float epsilon;
};

template <typename T>
INLINE void norm_rows(const Norm<T>& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t last = row % job.sizes[2], rest = row / job.sizes[2];
    const T* x = job.x + last * job.strides[2] + rest % job.sizes[1] * job.strides[1] + rest / job.sizes[1] * job.strides[0];
    T* output = job.output + row * job.width;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < job.width; ++i) squares += widen(x[i]) * widen(x[i]);
    const float factor = 1.0f / std::sqrt(squares / static_cast<float>(job.width) + job.epsilon);
#pragma omp simd
    for (int64_t i = 0; i < job.width; ++i) narrow(widen(x[i]) * factor * job.weight[i], output[i]);
  }
}

FOR_BOTH(norm_rows, Norm)

// ---- Rows as 8-bit integers, each with a scale of its own: x ≈ q · scale.

template <typename T>
struct Quantization {
  int8_t* output;  // (rows, width)
  float* scales;   // (rows,)
  const T* x;
  int64_t width;
};

template <typename T>
INLINE void quantize_range(const Quantization<T>& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = job.x + row * job.width;
    int8_t* output = job.output + row * job.width;
    float highest = 0;
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < job.width; ++i) highest = std::max(highest, std::fabs(widen(x[i])));
    job.scales[row] = highest / 127;
    const float factor = highest > 0 ? 127 / highest : 0;
#pragma omp simd
    for (int64_t i = 0; i < job.width; ++i) output[i] = static_cast<int8_t>(std::nearbyint(widen(x[i]) * factor));
  }
}

FOR_BOTH(quantize_range, Quantization)

template <typename T>
struct Scaling {
  T* y;  // (rows, width)
  const float* scales;
  int64_t width;
};

template <typename T>
INLINE void scale_range(const Scaling<T>& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* y = job.y + row * job.width;
    const float scale = job.scales[row];
#pragma omp simd
    for (int64_t i = 0; i < job.width; ++i) narrow(widen(y[i]) * scale, y[i]);
  }
}

FOR_BOTH(scale_range, Scaling)

// ---- Rotary positions: each half of a head turned against the other, x · cos + (−second half, first half) · sin.

template <typename T>
struct Rotation {
  T* output;  // (tokens, heads, size), without gaps
  const T* x;
  const T *cos, *sin;  // (tokens, size), without gaps
  int64_t heads, size, head_stride, token_stride;
};

template <typename T>
INLINE void rotate_tokens(const Rotation<T>& job, int64_t begin, int64_t end) {
  const int64_t half = job.size / 2;
  for (int64_t token = begin; token < end; ++token) {
    const T *cos = job.cos + token * job.size, *sin = job.sin + token * job.size;
    for (int64_t head = 0; head < job.heads; ++head) {
      const T* x = job.x + head * job.head_stride + token * job.token_stride;
      T* output = job.output + (token * job.heads + head) * job.size;
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const float first = widen(x[i]), second = widen(x[i + half]);
        narrow(first * widen(cos[i]) - second * widen(sin[i]), output[i]);
        narrow(second * widen(cos[i + half]) + first * widen(sin[i + half]), output[i + half]);
      }
    }
  }
}

FOR_BOTH(rotate_tokens, Rotation)

// ---- The highest number of each row, and of equal ones the first; where something is not a number, the first of that.

template <typename T>
struct Argmax {
  int64_t* output;
  const T* x;
  int64_t width;
};

template <typename T>
INLINE void argmax_rows(const Argmax<T>& job, int64_t begin, int64_t end) {
  constexpr int64_t BLOCK = 512;  // looked through as a whole, and again only if it holds a new highest
  for (int64_t row = begin; row < end; ++row) {
    const T* x = job.x + row * job.width;
    float highest = -INFINITY;
    int64_t best = 0;
    for (int64_t start = 0; start < job.width; start += BLOCK) {
      const int64_t stop = std::min(start + BLOCK, job.width);
      float most = -INFINITY;
      int strange = 0;
#pragma omp simd reduction(max : most) reduction(| : strange)
      for (int64_t i = start; i < stop; ++i) {
        const float value = widen(x[i]);
        most = value > most ? value : most;
        strange |= value != value;
      }
      if (strange) {
        for (best = start; widen(x[best]) == widen(x[best]);) ++best;
        break;
      }
      if (most > highest) {
        highest = most;
        for (best = start; widen(x[best]) != most;) ++best;
      }
    }
    job.output[row] = best;
  }
}

FOR_BOTH(argmax_rows, Argmax)

// ---- Minus infinity for the numbers whose bits are not set, words of 32 at a time; also for those without a bit.

template <typename T>
struct Forbidding {
  T* x;  // (size,)
  const int32_t* bits;
  int64_t words, size;
};

template <typename T>
INLINE void forbid_words(const Forbidding<T>& job, int64_t begin, int64_t end) {
  constexpr int64_t WORD = 32;
  T lowest;
  narrow(-INFINITY, lowest);
  for (int64_t word = begin; word < end; ++word) {
    const uint32_t bits = word < job.words ? static_cast<uint32_t>(job.bits[word]) : 0;
    T* x = job.x + word * WORD;
    const int64_t size = std::min(WORD, job.size - word * WORD);
    if (bits == 0) {
      for (int64_t i = 0; i < size; ++i) x[i] = lowest;
    } else if (size == WORD) {
#pragma omp simd
      for (int64_t i = 0; i < WORD; ++i) x[i] = (bits >> i) & 1 ? x[i] : lowest;
    } else {
      for (int64_t i = 0; i < size; ++i) x[i] = (bits >> i) & 1 ? x[i] : lowest;
    }
  }
}

FOR_BOTH(forbid_words, Forbidding)

// ---- x Wᵀ + bias for few rows in bfloat16, on weights as oneDNN packs them for processors without tiles of AMX:
// blocks of 64 outputs, in each the inputs by twos, and of every two the 64 outputs' weights. Read once, in order.

constexpr int64_t BLOCK = 64;  // outputs; numbers that are not a multiple of it are filled up by oneDNN
constexpr int64_t TILE = 6;    // rows that are multiplied in one pass: four sums each, in registers

#ifdef READS_PACKED
struct FewRows {
  Bits16* y;  // (rows, outputs)
  const Bits16 *x, *weight, *bias;  // x (rows, inputs); the bias may be null
  int64_t rows, inputs, outputs;
};

#define BFLOAT16_PRODUCTS __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

BFLOAT16_PRODUCTS INLINE __m512bh sixteen_pairs(const Bits16* from) { return (__m512bh)_mm512_loadu_si512(from); }

template <int ROWS>
BFLOAT16_PRODUCTS INLINE void few_rows_tile(const FewRows& job, int64_t block, int64_t first) {
  constexpr int PARTS = 4;
  const int64_t begin = block * BLOCK;
  __m512 sums[ROWS][PARTS];
  const Bits16* x[ROWS];
  for (int row = 0; row < ROWS; ++row) {
    x[row] = job.x + (first + row) * job.inputs;
    for (int part = 0; part < PARTS; ++part) sums[row][part] = _mm512_setzero_ps();
  }
  const Bits16* weight = job.weight + begin * job.inputs;
  for (int64_t input = 0; input < job.inputs; input += 2, weight += 2 * BLOCK) {
    const __m512bh weights[PARTS] = {sixteen_pairs(weight), sixteen_pairs(weight + 32), sixteen_pairs(weight + 64),
                                     sixteen_pairs(weight + 96)};
    for (int row = 0; row < ROWS; ++row) {
      int32_t two;
      std::memcpy(&two, x[row] + input, sizeof two);
      const __m512bh inputs = (__m512bh)_mm512_set1_epi32(two);
      for (int part = 0; part < PARTS; ++part)
        sums[row][part] = _mm512_dpbf16_ps(sums[row][part], weights[part], inputs);
    }
  }
  const int64_t width = std::min(BLOCK, job.outputs - begin);
  for (int row = 0; row < ROWS; ++row) {
    float whole[BLOCK];
    for (int part = 0; part < PARTS; ++part) _mm512_storeu_ps(whole + 16 * part, sums[row][part]);
    Bits16* y = job.y + (first + row) * job.outputs + begin;
    if (job.bias)
      for (int64_t i = 0; i < width; ++i) whole[i] += widen(job.bias[begin + i]);
    for (int64_t i = 0; i < width; ++i) narrow(whole[i], y[i]);
  }
}

BFLOAT16_PRODUCTS void run(const FewRows& job, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    int64_t row = 0;
    for (; row + TILE <= job.rows; row += TILE) few_rows_tile<TILE>(job, block, row);
    switch (job.rows - row) {
      case 5: few_rows_tile<5>(job, block, row); break;
      case 4: few_rows_tile<4>(job, block, row); break;
      case 3: few_rows_tile<3>(job, block, row); break;
      case 2: few_rows_tile<2>(job, block, row); break;
      case 1: few_rows_tile<1>(job, block, row); break;
    }
  }
}
#endif

// ---- From tensors to the above.

// Runs all items, shared among torch's threads where the work is worth it.
//
// Not `at::parallel_for`: a library's copy of it sets the thread's number of cores anew, from the process's, at its
// first use. As there, idle threads join and do nothing: GNU's OpenMP ends threads that a smaller team leaves out.
template <typename Job>
void parallel(const Job& job, int64_t items, int64_t operations_each) {
  constexpr int64_t WORTH_A_THREAD = 1 << 15;
  const int64_t wanted = std::min(items, items * operations_each / WORTH_A_THREAD);
#ifdef _OPENMP
  if (wanted > 1 && omp_get_max_threads() > 1 && !omp_in_parallel()) {
#pragma omp parallel
    {
      const int64_t number = std::min<int64_t>(wanted, omp_get_num_threads()), thread = omp_get_thread_num();
      if (thread < number) run(job, items * thread / number, items * (thread + 1) / number);
    }
    return;
  }
#endif
  run(job, 0, items);
}

template <typename T>
const T* pointer(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* target(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

bool is_bfloat16(const at::Tensor& tensor) { return tensor.scalar_type() == at::kBFloat16; }

void check_type(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  TORCH_CHECK(is_bfloat16(tensor) || tensor.scalar_type() == at::kFloat, name, " must be float32 or bfloat16");
  TORCH_CHECK(tensor.dim() > 0 && tensor.stride(-1) == 1, name, "'s last dimension must lie without gaps");
}

void check_indices(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == at::kInt, name, " must be int32");
}

template <typename T, typename W>
void add_delta_of(const at::Tensor& y, const at::Tensor& x, const at::Tensor& table, const at::Tensor& slots,
                  const at::Tensor& modules, int64_t rank) {
  const Delta<T, W> job{{target<T>(y), y.stride(0)}, {pointer<T>(x), x.stride(0)}, {pointer<W>(table), table.stride(0)},
                        pointer<int32_t>(slots), pointer<int64_t>(modules), modules.size(0), x.size(1), rank};
  parallel(job, y.size(0), rank * (job.number * job.inputs + y.size(1)));
}

void add_delta_(at::Tensor& y_, const at::Tensor& x_, const at::Tensor& table, const at::Tensor& slots,
                const at::Tensor& modules, int64_t rank) {
  check_type(y_, "y"), check_type(x_, "x"), check_type(table, "table"), check_indices(slots, "slots");
  const at::Tensor y = y_.dim() == 2 ? y_ : y_.view({-1, y_.size(-1)});
  const at::Tensor x = x_.dim() == 2 ? x_ : x_.reshape({-1, x_.size(-1)});
  TORCH_CHECK(modules.is_cpu() && modules.is_contiguous() && modules.scalar_type() == at::kLong, "modules must be int64");
  TORCH_CHECK(table.dim() == 2 && slots.dim() == 1 && modules.dim() == 2, "shapes");
  TORCH_CHECK(modules.size(1) == 2, "modules must be (modules, 2)");
  TORCH_CHECK(x.size(0) == y.size(0) && slots.size(0) == y.size(0), "x, y and slots must have as many rows");
  TORCH_CHECK(x.scalar_type() == y.scalar_type(), "x and y must have one dtype");
  TORCH_CHECK(rank > 0 && rank % RANKS == 0, "the rank must be a multiple of 4");
  const int64_t* module = pointer<int64_t>(modules);
  int64_t outputs = 0;
  for (int64_t i = 0; i < modules.size(0); ++i) {
    const int64_t start = module[2 * i], width = module[2 * i + 1];
    TORCH_CHECK(start >= 0 && width > 0 && start + rank * (x.size(1) + width) <= table.size(1), "no such module");
    outputs += width;
  }
  TORCH_CHECK(outputs == y.size(1), "the modules must have as many outputs as y");
  const int32_t* slot = pointer<int32_t>(slots);
  for (int64_t row = 0; row < y.size(0); ++row)
    TORCH_CHECK(slot[row] >= 0 && slot[row] < table.size(0), "no such slot");
  if (!is_bfloat16(y)) {
    TORCH_CHECK(!is_bfloat16(table), "float32 rows need a float32 table");
    add_delta_of<float, float>(y, x, table, slots, modules, rank);
  } else if (is_bfloat16(table)) {
    add_delta_of<Bits16, Bits16>(y, x, table, slots, modules, rank);
  } else {
    add_delta_of<Bits16, float>(y, x, table, slots, modules, rank);
  }
}

// x Wᵀ + bias on weights as they are, and a delta as above: one operation, where each costs as much as its work.
at::Tensor linear_with_delta(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                             const at::Tensor& table, const at::Tensor& slots, const at::Tensor& modules, int64_t rank) {
  at::Tensor y = at::linear(x, weight, bias);
  add_delta_(y, x, table, slots, modules, rank);
  return y;
}

// Whether `few_rows` can take a weight that oneDNN has packed, given the same unpacked (outputs, inputs): the processor
// multiplies bfloat16, and the first and last block lie in the layout that is read above. oneDNN promises none.
bool reads_packed(const at::Tensor& packed, const at::Tensor& weight) {
#ifdef READS_PACKED
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bf16")) return false;
  const int64_t outputs = weight.size(0), inputs = weight.size(1), blocks = (outputs + BLOCK - 1) / BLOCK;
  if (!is_bfloat16(weight) || !weight.is_contiguous() || inputs % 2) return false;
  if (at::native::nbytes_from_mkldnn(packed) != blocks * BLOCK * inputs * static_cast<int64_t>(sizeof(Bits16)))
    return false;
  const auto* there = static_cast<const Bits16*>(at::native::data_ptr_from_mkldnn(packed));
  const Bits16* plain = pointer<Bits16>(weight);
  for (const int64_t block : {int64_t{0}, blocks - 1})
    for (int64_t output = block * BLOCK; output < std::min(outputs, (block + 1) * BLOCK); ++output)
      for (int64_t input = 0; input < inputs; ++input) {
        const int64_t at = block * BLOCK * inputs + input / 2 * 2 * BLOCK + output % BLOCK * 2 + input % 2;
        if (there[at] != plain[output * inputs + input]) return false;
      }
  return true;
#else
  return false;
#endif
}

at::Tensor few_rows(const at::Tensor& x_, const at::Tensor& packed, const std::optional<at::Tensor>& bias) {
#ifdef READS_PACKED
  const at::Tensor x = x_.contiguous();
  const int64_t inputs = packed.size(1), outputs = packed.size(0);
  TORCH_CHECK(x.is_cpu() && is_bfloat16(x) && x.size(-1) == inputs, "x must be (..., inputs) of bfloat16 on the CPU");
  if (bias) check_type(*bias, "bias");
  TORCH_CHECK(!bias || (is_bfloat16(*bias) && bias->numel() == outputs), "the bias must be (outputs,) of bfloat16");
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = outputs;
  at::Tensor y = at::empty(sizes, x.options());
  const FewRows job{target<Bits16>(y), pointer<Bits16>(x),
                    static_cast<const Bits16*>(at::native::data_ptr_from_mkldnn(packed)),
                    bias ? pointer<Bits16>(*bias) : nullptr, x.numel() / inputs, inputs, outputs};
  parallel(job, (outputs + BLOCK - 1) / BLOCK, BLOCK * inputs * job.rows);
  return y;
#else
  TORCH_CHECK(false, "not built for this processor: ask reads_packed first");
#endif
}

// x Wᵀ + bias on weights that oneDNN has packed, then the deltas as above, cut into the outputs of its modules.
//
// Up to `few` rows by the product above if `own`, which `reads_packed` must allow. oneDNN compiles code for every number
// of rows and keeps it: beyond `few` their number is filled up to a multiple of `step`, so that there are few numbers.
std::vector<at::Tensor> linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                               const std::vector<int64_t>& sizes, bool own, int64_t few, int64_t step,
                               const std::optional<at::Tensor>& table, const std::optional<at::Tensor>& slots,
                               const std::optional<at::Tensor>& modules, int64_t rank) {
  using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, c10::string_view,
                            c10::List<std::optional<at::Scalar>>, std::optional<c10::string_view>);
  static const auto packed_linear =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Linear>();
  const int64_t rows = x.size(-2), extra = rows > few ? (step - rows % step) % step : 0;
  at::Tensor y;
  if (own && rows <= few) {
    y = few_rows(x, weight, bias);
  } else {
    const at::Tensor filled = extra ? at::constant_pad_nd(x, {0, 0, 0, extra}) : x;
    y = packed_linear.call(filled, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
    if (extra) y = y.narrow(-2, 0, rows);
  }
  if (table) add_delta_(y, x, *table, *slots, *modules, rank);
  if (sizes.size() == 1) return {y};
  return y.split_with_sizes(sizes, -1);
}

template <typename I, typename W>
void compose_of(const at::Tensor& target_, const at::Tensor& indices, const at::Tensor& weights, const at::Tensor& bank) {
  const I* index = pointer<I>(indices);
  int64_t lowest = 0, highest = 0;
  for (int64_t i = 0; i < indices.numel(); ++i) {
    lowest = std::min<int64_t>(lowest, index[i]);
    highest = std::max<int64_t>(highest, index[i]);
  }
  TORCH_CHECK(lowest >= 0 && highest < bank.size(0), "no such vector in the bank");
  const Composition<I, W> job{target<W>(target_), index, pointer<float>(weights), pointer<float>(bank), indices.size(1),
                              bank.size(1)};
  parallel(job, indices.size(0), job.k * job.length);
}

template <typename W>
void compose_into(const at::Tensor& target, const at::Tensor& indices, const at::Tensor& weights, const at::Tensor& bank) {
  switch (indices.scalar_type()) {
    case at::kByte: return compose_of<uint8_t, W>(target, indices, weights, bank);
    case at::kShort: return compose_of<int16_t, W>(target, indices, weights, bank);
    case at::kInt: return compose_of<int32_t, W>(target, indices, weights, bank);
    default: TORCH_CHECK(false, "indices must be uint8, int16 or int32");
  }
}

void compose_(at::Tensor& target, const at::Tensor& indices, const at::Tensor& weights, const at::Tensor& bank) {
  check_type(target, "target"), check_type(weights, "weights"), check_type(bank, "bank");
  TORCH_CHECK(!is_bfloat16(weights) && !is_bfloat16(bank), "weights and bank must be float32");
  TORCH_CHECK(indices.is_cpu() && indices.dim() == 2 && weights.dim() == 2 && bank.dim() == 2 && target.dim() == 1, "shapes");
  TORCH_CHECK(indices.is_contiguous() && weights.is_contiguous() && bank.is_contiguous() && target.is_contiguous(), "gaps");
  TORCH_CHECK(weights.size(0) == indices.size(0) && weights.size(1) + 1 == indices.size(1), "a weight less than indices");
  TORCH_CHECK(target.size(0) == indices.size(0) * bank.size(1), "the target must hold all sub-vectors");
  if (is_bfloat16(target))
    compose_into<Bits16>(target, indices, weights, bank);
  else
    compose_into<float>(target, indices, weights, bank);
}

// New keys or values (heads, tokens, size) into their places in a paged cache (positions, heads, size).
template <typename T>
void store_of(const at::Tensor& cache, const at::Tensor& fresh, const int64_t* targets) {
  const int64_t heads = fresh.size(0), size = fresh.size(2);
  const T* from = pointer<T>(fresh);
  T* to = target<T>(cache);
  for (int64_t token = 0; token < fresh.size(1); ++token)
    for (int64_t head = 0; head < heads; ++head)
      std::copy_n(from + head * fresh.stride(0) + token * fresh.stride(1), size, to + (targets[token] * heads + head) * size);
}

void store_(const at::Tensor& cache, const at::Tensor& fresh, const at::Tensor& targets) {
  check_type(cache, "cache"), check_type(fresh, "fresh");
  TORCH_CHECK(cache.dim() == 3 && fresh.dim() == 3 && targets.dim() == 1 && cache.is_contiguous(), "shapes");
  TORCH_CHECK(targets.is_cpu() && targets.is_contiguous() && targets.scalar_type() == at::kLong, "targets must be int64");
  TORCH_CHECK(cache.scalar_type() == fresh.scalar_type(), "cache and fresh must have one dtype");
  TORCH_CHECK(fresh.size(0) == cache.size(1) && fresh.size(2) == cache.size(2) && fresh.size(1) == targets.size(0), "sizes");
  const int64_t* target = pointer<int64_t>(targets);
  for (int64_t i = 0; i < targets.size(0); ++i)
    TORCH_CHECK(target[i] >= 0 && target[i] < cache.size(0), "no such position");
  if (is_bfloat16(cache))
    store_of<Bits16>(cache, fresh, target);
  else
    store_of<float>(cache, fresh, target);
}

struct DecodeOptions {
  int64_t block_size, window;
  double scaling, softcap;
};

template <typename T>
void decode_of(at::Tensor& output, const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
               const at::Tensor& tables, const at::Tensor& lengths, const float* sinks, const DecodeOptions& options) {
  const Decode<T> job{
      target<T>(output), pointer<T>(query), query.stride(0), query.stride(1), {pointer<T>(keys), keys.stride(0)}, {pointer<T>(values), values.stride(0)},
      pointer<int32_t>(tables), pointer<int32_t>(lengths), sinks, query.size(1), keys.size(1), keys.size(2),
      values.size(2), tables.size(1), options.block_size, options.window, static_cast<float>(options.scaling),
      static_cast<float>(options.softcap)};
  const int32_t* length = pointer<int32_t>(lengths);
  int64_t total = 0;
  for (int64_t row = 0; row < query.size(0); ++row)
    total += options.window ? std::min<int64_t>(length[row], options.window) : length[row];
  const int64_t each = total / query.size(0) * (job.heads / job.key_heads) * (job.key_size + job.value_size);
  parallel(job, query.size(0) * job.key_heads, each);
}

at::Tensor decode_attention(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                            const at::Tensor& tables, const at::Tensor& lengths, int64_t block_size, int64_t window,
                            double scaling, double softcap, const std::optional<at::Tensor>& sinks) {
  check_type(query, "query"), check_type(keys, "keys"), check_type(values, "values");
  check_indices(tables, "tables"), check_indices(lengths, "lengths");
  TORCH_CHECK(query.dim() == 3 && keys.dim() == 3 && values.dim() == 3 && tables.dim() == 2 && lengths.dim() == 1, "shapes");
  TORCH_CHECK(keys.is_contiguous() && values.is_contiguous(), "keys and values must lie without gaps");
  TORCH_CHECK(query.size(2) == keys.size(2) && keys.size(1) == values.size(1) && keys.size(0) == values.size(0), "sizes");
  TORCH_CHECK(query.size(1) % keys.size(1) == 0, "query heads must be a multiple of the key heads");
  TORCH_CHECK(tables.size(0) == query.size(0) && lengths.size(0) == query.size(0), "tables and lengths need a row each");
  TORCH_CHECK(query.scalar_type() == keys.scalar_type() && keys.scalar_type() == values.scalar_type(), "dtypes");
  TORCH_CHECK(query.size(0) > 0 && block_size > 0 && window >= 0, "rows, block_size and window");
  const int32_t *table = pointer<int32_t>(tables), *length = pointer<int32_t>(lengths);
  for (int64_t row = 0; row < query.size(0); ++row) {
    const int64_t used = (length[row] + block_size - 1) / block_size;
    TORCH_CHECK(length[row] > 0 && used <= tables.size(1), "a row's length must fit its blocks");
    for (int64_t i = 0; i < used; ++i) {
      const int64_t block = table[row * tables.size(1) + i];
      TORCH_CHECK(block >= 0 && (block + 1) * block_size <= keys.size(0), "no such block");
    }
  }
  at::Tensor sink;
  if (sinks) {
    sink = sinks->to(at::kFloat).contiguous();
    TORCH_CHECK(sink.numel() == query.size(1), "a sink for every head");
  }
  at::Tensor output = at::empty({query.size(0), query.size(1), values.size(2)}, query.options());
  const float* sink_data = sinks ? pointer<float>(sink) : nullptr;
  const DecodeOptions options{block_size, window, scaling, softcap};
  if (is_bfloat16(query))
    decode_of<Bits16>(output, query, keys, values, tables, lengths, sink_data, options);
  else
    decode_of<float>(output, query, keys, values, tables, lengths, sink_data, options);
  return output;
}

template <typename T>
void rms_norm_of(at::Tensor& output, const at::Tensor& x, const at::Tensor& weight, double epsilon) {
  Norm<T> job{target<T>(output), pointer<T>(x), pointer<float>(weight), {1, 1, 1}, {0, 0, 0}, x.size(-1),
              static_cast<float>(epsilon)};
  const int64_t before = x.dim() - 1;
  for (int64_t i = 0; i < before; ++i) {
    job.sizes[3 - before + i] = x.size(i);
    job.strides[3 - before + i] = x.stride(i);
  }
  parallel(job, job.sizes[0] * job.sizes[1] * job.sizes[2], 2 * job.width);
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon) {
  check_type(x, "x"), check_type(weight, "weight");
  TORCH_CHECK(x.dim() <= 4, "x has more than four dimensions");
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(-1) && !is_bfloat16(weight), "weight must be float32 (width,)");
  at::Tensor output = at::empty(x.sizes(), x.options());
  if (is_bfloat16(x))
    rms_norm_of<Bits16>(output, x, weight, epsilon);
  else
    rms_norm_of<float>(output, x, weight, epsilon);
  return output;
}

template <typename T>
void quantize_of(const at::Tensor& output, const at::Tensor& scales, const at::Tensor& x) {
  const Quantization<T> job{target<int8_t>(output), target<float>(scales), pointer<T>(x), x.size(-1)};
  parallel(job, scales.numel(), 4 * job.width);
}

std::tuple<at::Tensor, at::Tensor> quantize_rows(const at::Tensor& x_) {
  check_type(x_, "x");
  const at::Tensor x = x_.contiguous();
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = 1;
  const at::Tensor output = at::empty(x.sizes(), x.options().dtype(at::kChar));
  const at::Tensor scales = at::empty(sizes, x.options().dtype(at::kFloat));
  if (is_bfloat16(x))
    quantize_of<Bits16>(output, scales, x);
  else
    quantize_of<float>(output, scales, x);
  return {output, scales};
}

void scale_rows_(const at::Tensor& y, const at::Tensor& scales) {
  check_type(y, "y"), check_type(scales, "scales");
  TORCH_CHECK(y.is_contiguous() && scales.is_contiguous() && !is_bfloat16(scales), "y and float32 scales without gaps");
  TORCH_CHECK(scales.numel() * y.size(-1) == y.numel(), "a scale for each row");
  if (is_bfloat16(y))
    parallel(Scaling<Bits16>{target<Bits16>(y), pointer<float>(scales), y.size(-1)}, scales.numel(), y.size(-1));
  else
    parallel(Scaling<float>{target<float>(y), pointer<float>(scales), y.size(-1)}, scales.numel(), y.size(-1));
}

template <typename T>
void rotate_of(const at::Tensor& output, const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const Rotation<T> job{target<T>(output), pointer<T>(x), pointer<T>(cos), pointer<T>(sin), x.size(1), x.size(3),
                        x.stride(1), x.stride(2)};
  parallel(job, x.size(2), 4 * job.heads * job.size);
}

at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  check_type(x, "x"), check_type(cos, "cos"), check_type(sin, "sin");
  TORCH_CHECK(x.dim() == 4 && x.size(0) == 1 && x.size(3) % 2 == 0, "x must be (1, heads, tokens, size), an even size");
  TORCH_CHECK(cos.is_contiguous() && sin.is_contiguous() && cos.sizes() == sin.sizes(), "cos and sin");
  TORCH_CHECK(cos.size(-1) == x.size(3) && cos.numel() == x.size(2) * x.size(3), "an angle for each token");
  TORCH_CHECK(x.scalar_type() == cos.scalar_type() && x.scalar_type() == sin.scalar_type(), "dtypes");
  const at::Tensor output = at::empty({x.size(2), x.size(1), x.size(3)}, x.options());
  if (is_bfloat16(x))
    rotate_of<Bits16>(output, x, cos, sin);
  else
    rotate_of<float>(output, x, cos, sin);
  return output.transpose(0, 1).unsqueeze(0);
}

at::Tensor argmax(const at::Tensor& x) {
  check_type(x, "x");
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.size(1) > 0, "x must be (rows, width), without gaps");
  const at::Tensor output = at::empty({x.size(0)}, x.options().dtype(at::kLong));
  if (is_bfloat16(x))
    parallel(Argmax<Bits16>{target<int64_t>(output), pointer<Bits16>(x), x.size(1)}, x.size(0), x.size(1));
  else
    parallel(Argmax<float>{target<int64_t>(output), pointer<float>(x), x.size(1)}, x.size(0), x.size(1));
  return output;
}

void forbid_(const at::Tensor& x, const at::Tensor& bits) {
  check_type(x, "x");
  check_indices(bits, "bits");
  TORCH_CHECK(x.dim() == 1 && bits.dim() == 1, "x and bits must have one dimension");
  const int64_t words = bits.size(0), size = x.size(0), items = (size + 31) / 32;
  if (is_bfloat16(x))
    parallel(Forbidding<Bits16>{target<Bits16>(x), pointer<int32_t>(bits), words, size}, items, 8);
  else
    parallel(Forbidding<float>{target<float>(x), pointer<int32_t>(bits), words, size}, items, 8);
}

}  // namespace

TORCH_LIBRARY(vblora, library) {
  library.def("add_delta_(Tensor(a!) y, Tensor x, Tensor table, Tensor slots, Tensor modules, int rank) -> ()");
  library.def("compose_(Tensor(a!) target, Tensor indices, Tensor weights, Tensor bank) -> ()");
  library.def(
      "decode_attention(Tensor query, Tensor keys, Tensor values, Tensor tables, Tensor lengths, int block_size, "
      "int window, float scaling, float softcap, Tensor? sinks) -> Tensor");
  library.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, int[] sizes, bool own, int few, int step, Tensor? table, "
      "Tensor? slots, Tensor? modules, int rank) -> Tensor[]");
  library.def(
      "linear_with_delta(Tensor x, Tensor weight, Tensor? bias, Tensor table, Tensor slots, Tensor modules, int rank) "
      "-> Tensor");
  library.def("reads_packed(Tensor packed, Tensor weight) -> bool");
  library.def("store_(Tensor(a!) cache, Tensor fresh, Tensor targets) -> ()");
  library.def("quantize_rows(Tensor x) -> (Tensor, Tensor)");
  library.def("scale_rows_(Tensor(a!) y, Tensor scales) -> ()");
  library.def("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  library.def("argmax(Tensor x) -> Tensor");
  library.def("forbid_(Tensor(a!) x, Tensor bits) -> ()");
  library.def("rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor");
}

TORCH_LIBRARY_IMPL(vblora, CPU, library) {
  library.impl("add_delta_", &add_delta_);
  library.impl("compose_", &compose_);
  library.impl("decode_attention", &decode_attention);
  library.impl("linear_with_delta", &linear_with_delta);
  library.impl("store_", &store_);
  library.impl("quantize_rows", &quantize_rows);
  library.impl("scale_rows_", &scale_rows_);
  library.impl("rotate", &rotate);
  library.impl("argmax", &argmax);
  library.impl("forbid_", &forbid_);
  library.impl("rms_norm", &rms_norm);
}

// Packed weights are tensors of a kind of their own.
TORCH_LIBRARY_IMPL(vblora, MkldnnCPU, library) {
  library.impl("linear", &linear);
  library.impl("reads_packed", &reads_packed);
}

// Importing the module loads the library, which registers the operations; there is nothing in it.
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__kernels() { return PyModule_Create(&module); }
