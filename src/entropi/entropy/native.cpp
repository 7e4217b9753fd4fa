// Fused attention with row entropy for CPUs: forward and backward, memory linear in length. Everything between products is
// float32; what products.h multiplies is float32 too, or bfloat16 where tensors are and the processor has instructions for it.
//
// Threads take tasks (a batch entry and head each, in the forward pass a chunk of its query rows) from a shared counter
// until none is left; in the backward pass, where heads are fewer than threads, a share of a head's key blocks, whose
// shares of dQ are added afterwards. They are those of torch's own OpenMP runtime where it has one: a second set of threads would
// compete with the first, which spins between its parallel regions.
//
// Notation per row: s logits, p = exp(s - L), L log-normaliser, H entropy. Online over blocks of keys, with m the
// largest logit so far: l = sum exp(s - m), w = sum exp(s - m) (s - m); a new maximum m' = m - delta rescales
// l by e^-delta and turns w into e^-delta (w - delta l). In the end L = m + log l and H = log l - w / l.
//
// With `iterations` = t > 0 the exponential is k(x) = (1 + x / 2^t)^(2^t) of x = s - m (see secure_softmax.py). It has no
// such rule for a new maximum, so the logits of a block of rows are all kept until m is known. Then l = sum k(x),
// w = sum k(x) log k(x), L = log l. With `iterations` = -t < 0 logits become l = 2^t log |1 + s / 2^t|, the polynomial's,
// when they are computed, and everything above holds for them.
//
// A row's sink is a logit of its own, seen first: m, l and w start with it and everything else goes on as it would, in the
// backward pass with L and H that count it.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "products.h"

constexpr int ROWS = 64;   // query rows a block; a block of keys has as many rows or a multiple
constexpr int KEYS = 128;  // keys a block
constexpr float MASKED = -1.0e30f;

static inline float sum(vec x) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += x[i];
  return total;
}
// Of a and b the larger; a where a is not a number.
static inline vec larger(vec a, vec b) { return b > a ? b : a; }

// exp for x <= 0: 2^n * polynomial on [-ln 2 / 2, ln 2 / 2], relative error below 2e-7; exactly 0 below -87.
static inline vec exp_nonpositive(vec x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  vec clamped = larger(x, splat(-87.0f));
  vec shifted = clamped * 1.44269504f + magic;
  vec n = shifted - magic;
  vec r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  vec y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;

  ivec exponent = (__builtin_convertvector(n, ivec) + 127) << 23;
  vec power;
  std::memcpy(&power, &exponent, sizeof power);
  return x < -87.0f ? splat(0.0f) : y * power;
}

// log(1 + y) for y in [-1, 0], below -69 at -1: 1 + y = 2^n (1 + f) with 1 + f within [sqrt 1/2, sqrt 2], then a polynomial
// in f, which is y itself where n = 0 and loses nothing there. Relative error below 2e-7.
static inline vec log_of_1_plus(vec y) {
  const int32_t root = 0x3f3504f3;  // the bits of sqrt 1/2
  vec u = larger(y + 1.0f, splat(1e-30f));
  ivec bits;
  std::memcpy(&bits, &u, sizeof bits);
  ivec exponent = (bits - root) >> 23;
  bits -= exponent << 23;
  vec f, n = __builtin_convertvector(exponent, vec);
  std::memcpy(&f, &bits, sizeof f);
  f = n == 0.0f ? y : f - 1.0f;
  vec z = f * f, p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return (p * f * z - n * 2.12194440e-4f - z * 0.5f) + f + n * 0.693359375f;
}

// k(x) = (1 + x / 2^t)^(2^t) of x <= 0 and its logarithm. The last five squarings are of the base u itself; those before
// are of y = u - 1, because u would round away what 2^t multiplies: (1 + y)^2 = 1 + y (2 + y).
constexpr int PLAIN_SQUARINGS = 5;
static inline void power_exp(vec x, int iterations, float lowest, vec &weight, vec &log_weight) {
  const int plain = iterations < PLAIN_SQUARINGS ? iterations : PLAIN_SQUARINGS;
  vec y = larger(x, splat(lowest)) * (1.0f / float(1 << iterations));
  for (int i = plain; i < iterations; i++) y = y * (y + 2.0f);
  log_weight = log_of_1_plus(y) * float(1 << plain);
  vec u = y + 1.0f;
  u = u < 0.0655f ? splat(0.0f) : u;  // its 32nd power would be denormal, which is slow; clipped bases are at least 0.1
  for (int i = 0; i < plain; i++) u = u * u;
  weight = u;
}
// Its slope relative to itself: d log k / dx.
static inline vec power_rate(vec x, int iterations, float lowest) {
  return x < lowest ? splat(0.0f) : 1.0f / (x * (1.0f / float(1 << iterations)) + 1.0f);
}

// Logits s under the polynomial, l = 2^t log |1 + s / 2^t| with t = -iterations, hidden ones as they are; |1 + y| is 1 + y'
// with y' = y or its mirror image in -1. What is not finite becomes what is not a number.
static inline vec polynomial_logits(vec s, int iterations) {
  vec y = s * (1.0f / float(1 << -iterations));
  vec l = log_of_1_plus(y < -1.0f ? -2.0f - y : y) * float(1 << -iterations) + (s - s);
  return s <= MASKED / 2 ? splat(MASKED) : l;
}
// dl / ds.
static inline vec polynomial_rate(vec s, int iterations) {
  vec base = s * (1.0f / float(1 << -iterations)) + 1.0f;
  return 1.0f / (base * base < 1e-18f ? splat(1e-9f) : base);
}

// tanh: an odd polynomial below 0.625, where the quotient loses digits. Relative error below 2e-7.
static inline vec hyperbolic_tangent(vec x) {
  const vec size = x < 0.0f ? -x : x, e = exp_nonpositive(size * -2.0f), z = x * x;
  vec quotient = (1.0f - e) / (1.0f + e), p = splat(-5.7049867715e-3f);
  p = p * z + 2.0639087005e-2f;
  p = p * z - 5.3739714996e-2f;
  p = p * z + 1.3331442197e-1f;
  p = p * z - 3.3333281942e-1f;
  return size < 0.625f ? x + x * z * p : (x < 0.0f ? -quotient : quotient);
}
// Logits s of a row become c tanh(s / c).
static inline void cap(float *row, long columns, float c) {
  for (long j = 0; j < columns; j += LANES) store(row + j, hyperbolic_tangent(load(row + j) * (1.0f / c)) * c);
}
// And `rates` what that multiplies their slopes by.
static inline void cap(float *row, long columns, float c, float *rates) {
  for (long j = 0; j < columns; j += LANES) {
    const vec y = hyperbolic_tangent(load(row + j) * (1.0f / c));
    store(row + j, y * c);
    store(rates + j, 1.0f - y * y);
  }
}

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// A row of `width` numbers as floats, zeros behind it up to `padded`.
static void read_row(const void *from, long width, long padded, int kind, float *to) {
  if (kind == FLOAT32) {
    std::memcpy(to, from, size_t(width) * 4);
  } else if (kind == BFLOAT16) {
    for (long d = 0; d < width; d++) to[d] = to_float(static_cast<const bfloat16 *>(from)[d]);
  } else {
    for (long d = 0; d < width; d++) to[d] = float(static_cast<const _Float16 *>(from)[d]);
  }
  for (long d = width; d < padded; d++) to[d] = 0;
}
static void write_row(const float *from, float scale, long width, int kind, void *to) {
  if (kind == FLOAT32) {
    for (long d = 0; d < width; d++) static_cast<float *>(to)[d] = from[d] * scale;
  } else if (kind == BFLOAT16) {
    for (long d = 0; d < width; d++) static_cast<bfloat16 *>(to)[d] = to_bfloat16(from[d] * scale);
  } else {
    for (long d = 0; d < width; d++) static_cast<_Float16 *>(to)[d] = _Float16(from[d] * scale);
  }
}

struct Tensor {  // (B, H, T, width), the last dimension contiguous
  void *data;
  long batch, head, row;  // strides in elements
  long width;
};
struct Problem {
  long batches, heads, queries, keys;
  int kind, causal;
  Tensor query, key, value, output, grad_output, grad_query, grad_key, grad_value;  // of two widths: queries', values'
  Tensor mask;    // (B, H, T, S) with strides 0 where it is broadcast, the last one in mask_column
  long mask_column;
  int mask_kind;  // 0 none, 1 bytes (0 hides), 2 floats that are added
  float *entropy, *lse;  // (B, H, T) contiguous
  const float *grad_entropy;
  int iterations;  // t of the power, -t of the polynomial, 0 for the exponential
  float lowest;    // where it clips x
  float *largest;  // (B, H, T): what the backward pass needs of it, m and the first key that has it
  int32_t *argmax;
  float softcap;       // c, or 0 for none
  const float *sinks;  // (B, H, T) contiguous, or null
};

struct Free {
  void operator()(void *memory) const { std::free(memory); }
};
template <typename E> using Scratch = std::unique_ptr<E[], Free>;
template <typename E> static Scratch<E> scratch(long count) {
  return Scratch<E>(static_cast<E *>(std::aligned_alloc(64, size_t((count * long(sizeof(E)) + 63) / 64 * 64 + 64))));
}
static const void *at(const Tensor &x, long b, long h, long t, int kind) {
  return static_cast<const char *>(x.data) + (b * x.batch + h * x.head + t * x.row) * (kind == FLOAT32 ? 4 : 2);
}
// Products of bfloat16 tensors are those of bfloat16 numbers where the processor has instructions for them.
static bool in_bfloat16(const Problem &p) { return p.kind == BFLOAT16 && bfloat16_instructions() != NONE; }
// How long a row of a (T, D) matrix is with the zeros behind its width.
template <typename E> static long padded_width(const Tensor &x) { return round_up(terms<E>(x.width), LANES); }

// `count` rows from `first` and zeros up to `padded_rows`, each `padded` long.
template <typename E>
static void take_rows(const Problem &p, const Tensor &x, long b, long h, long first, long count, long padded_rows, long padded, E *out) {
  for (long i = 0; i < count; i++) {
    const void *row = at(x, b, h, first + i, p.kind);
    E *to = out + i * padded;
    if constexpr (sizeof(E) == 4) {
      read_row(row, x.width, padded, p.kind, to);
    } else {
      std::memcpy(to, row, size_t(x.width) * sizeof(E));
      std::memset(to + x.width, 0, size_t(padded - x.width) * sizeof(E));
    }
  }
  std::memset(out + count * padded, 0, size_t((padded_rows - count) * padded) * sizeof(E));
}
// Rows of a matrix where they lie, `stride` apart.
template <typename E> struct Rows {
  const E *first;
  long stride;
  Rows<E> from(long row) const { return {first + row * stride, stride}; }
};
// A block of a head's rows and zeros up to `padded_rows`: the tensor's own memory if it serves, otherwise copied to `memory`.
template <typename E>
static Rows<E> rows_of(const Problem &p, const Tensor &x, long b, long h, long first, long count, long padded_rows, long padded, E *memory) {
  const bool same_numbers = sizeof(E) == 2 || p.kind == FLOAT32;
  if (same_numbers && count == padded_rows && x.width == padded && x.row % PAIR<E> == 0)
    return {static_cast<const E *>(at(x, b, h, first, p.kind)), x.row};
  take_rows(p, x, b, h, first, count, padded_rows, padded, memory);
  return {memory, padded};
}
// Rows as B of a product that sums over the first `depth` columns:
template <typename E> static void sum_columns(const Rows<E> &rows, long size, long depth, E *to) {
  transpose(reinterpret_cast<const uint32_t *>(rows.first), size, depth / PAIR<E>, rows.stride / PAIR<E>, reinterpret_cast<uint32_t *>(to));
}
// as B of one that sums over the rows, which is how rows of float32 lie:
static Rows<float> sum_rows(const Rows<float> &rows, long, long, float *) { return rows; }
static Rows<bfloat16> sum_rows(const Rows<bfloat16> &rows, long size, long padded, bfloat16 *to) {
  for (long i = 0; i < size; i += 2) {
    const bfloat16 *even = rows.first + i * rows.stride, *odd = even + rows.stride;
    uint32_t *pairs = reinterpret_cast<uint32_t *>(to + i * padded);
    for (long d = 0; d < padded; d++) pairs[d] = even[d] | uint32_t(odd[d]) << 16;
  }
  return {to, padded};
}
// and as A of one that sums over the rows.
static void transposed(const Rows<float> &rows, long size, long padded, float *to) { sum_columns(rows, size, padded, to); }
static void transposed(const Rows<bfloat16> &rows, long size, long padded, bfloat16 *to) {
  const Scratch<uint32_t> pairs = scratch<uint32_t>(size * padded / 2);
  transpose(reinterpret_cast<const uint32_t *>(rows.first), size, padded / 2, rows.stride / 2, pairs.get());
  for (long d = 0; d < padded; d++)
    for (long i = 0; i < size; i++) to[d * size + i] = bfloat16(pairs[d / 2 * size + i] >> (d % 2 * 16));
}

// A head's keys and values as the forward pass multiplies them: blocks made when they are first asked for, in order, and
// kept where more than one block of queries will ask.
template <typename E> struct Sources {
  const Problem &p;
  const long b, h, seen;
  const bool kept;
  const long key_width = padded_width<E>(p.key), value_width = padded_width<E>(p.value), depth = terms<E>(p.key.width);
  const Scratch<E> copied = scratch<E>(KEYS * (key_width > value_width ? key_width : value_width));
  const Scratch<E> keys = scratch<E>(slots() * KEYS * depth), values = scratch<E>(slots() * KEYS * value_width);
  long end_of_keys = 0;    // of the blocks that are made
  long end_of_values = 0;

  long slots() const { return kept ? (seen + KEYS - 1) / KEYS : 1; }
  Rows<E> rows(const Tensor &x, long block, long padded, E *memory) const {
    return rows_of(p, x, b, h, block, seen - block < KEYS ? seen - block : KEYS, KEYS, padded, memory);
  }
  const E *keys_at(long block) {
    E *to = keys.get() + (kept ? block * depth : 0);
    if (block >= end_of_keys) {
      sum_columns(rows(p.key, block, key_width, copied.get()), KEYS, depth, to);
      end_of_keys = block + KEYS;
    }
    return to;
  }
  Rows<E> values_at(long block) {
    E *to = values.get() + (kept ? block * value_width : 0);
    if (PAIR<E> == 2 && block < end_of_values) return {to, value_width};
    end_of_values = block + KEYS;
    return sum_rows(rows(p.value, block, value_width, PAIR<E> == 2 ? copied.get() : to), KEYS, value_width, to);
  }
};

// A block of float32 numbers, (rows, KEYS), as operands of products that sum over its columns (as A) or its rows (as B);
// in float32 it is both itself. Rows of B end at `terms(rows)`, with zeros.
template <typename E> struct Block;
template <> struct Block<float> {
  const float *over_columns, *over_rows;
  void take_columns(const float *numbers, long, long) { over_columns = numbers; }
  void take_rows(float *numbers, long, long) { over_rows = numbers; }
};
template <> struct Block<bfloat16> {
  Scratch<bfloat16> memory = scratch<bfloat16>(2 * ROWS * KEYS);
  bfloat16 *over_columns = memory.get(), *over_rows = memory.get() + ROWS * KEYS;
  void take_columns(const float *numbers, long rows, long columns) {
    for (long r = 0; r < rows; r++) narrow(numbers + r * KEYS, columns, over_columns + r * KEYS);
  }
  void take_rows(float *numbers, long rows, long columns) {
    const long end = terms<bfloat16>(rows);
    for (long r = rows; r < end; r++) std::memset(numbers + r * KEYS, 0, size_t(columns) * 4);
    for (long r = 0; r < end; r += 2) narrow_pair(numbers + r * KEYS, numbers + (r + 1) * KEYS, columns, over_rows + r * KEYS);
  }
};

// Hide what query `t` does not see of a block of its logits: keys from `limit` on, and what the mask says.
static inline void hide(const Problem &p, long b, long h, long t, long block, long columns, long limit, float *row) {
  if (p.mask_kind) {
    const long first = b * p.mask.batch + h * p.mask.head + t * p.mask.row + block * p.mask_column;
    const long end = limit - block < KEYS ? limit - block : KEYS;
    if (p.mask_kind == 1) {
      const uint8_t *mask = static_cast<const uint8_t *>(p.mask.data) + first;
      for (long j = 0; j < end; j++) row[j] = mask[j * p.mask_column] ? row[j] : MASKED;
    } else {
      const float *mask = static_cast<const float *>(p.mask.data) + first;
      for (long j = 0; j < end; j++) {
        const float x = row[j] + mask[j * p.mask_column];
        row[j] = x < MASKED ? MASKED : x;  // what is not a number stays
      }
    }
  }
  for (long j = limit < block ? 0 : limit - block; j < columns; j++) row[j] = MASKED;
}

// How many columns of a block matter to rows that reach `reach` keys: the others are not computed.
template <typename E> static inline long columns_of(long block, long reach) {
  const long columns = round_up(terms<E>(reach - block), LANES);
  return columns < KEYS ? columns : KEYS;
}

// The results of rows whose sums are complete.
static void store_rows(const Problem &p, long b, long h, long start, long rows, long padded, const float *out, const float *m, const float *l, const float *w) {
  for (long r = 0; r < rows; r++) {
    const long index = (b * p.heads + h) * p.queries + start + r;
    const bool sees = l[r] != 0;  // true of what is not a number, which must not be hidden
    const float log_l = sees ? std::log(l[r]) : 0.0f, entropy = sees ? log_l - w[r] / l[r] : 0.0f;
    p.entropy[index] = entropy > 0 ? entropy : (entropy == entropy ? 0.0f : entropy);
    p.lse[index] = sees ? (p.iterations > 0 ? log_l : m[r] + log_l) : MASKED;
    void *to = const_cast<void *>(at(p.output, b, h, start + r, p.kind));
    write_row(out + r * padded, sees ? 1.0f / l[r] : 0.0f, p.output.width, p.kind, to);
  }
}

// Sums m, l, w and the unnormalised output of a block of rows under the power; `s` holds all their logits.
template <typename E>
static void power_rows(const Problem &p, long b, long h, long start, long rows, long reach, long seen, const Rows<E> &q, Sources<E> &sources, float *s, Block<E> &weights, float *out, float *m, float *l, float *w) {
  const long offset = p.keys - p.queries, padded = sources.value_width;
  int32_t *argmax = p.argmax + (b * p.heads + h) * p.queries + start;
  for (long r = 0; r < rows; r++) argmax[r] = 0;
  for (long block = 0; block < reach; block += KEYS) {
    const long columns = columns_of<E>(block, reach);
    float *logits = s + block * ROWS;
    matmul(rows, columns, sources.depth, q.first, q.stride, sources.keys_at(block), KEYS, logits, KEYS, false);
    for (long r = 0; r < rows; r++) {
      float *row = logits + r * KEYS;
      const long limit = p.causal ? (start + r + offset + 1 < seen ? start + r + offset + 1 : seen) : seen;
      hide(p, b, h, start + r, block, columns, limit, row);
      vec top = load(row);
      for (long j = LANES; j < columns; j += LANES) top = larger(load(row + j), top);
      float largest = m[r];
      for (int i = 0; i < LANES; i++) largest = top[i] > largest ? top[i] : largest;
      if (largest > m[r]) {
        long j = 0;
        while (j < columns - 1 && row[j] != largest) j++;
        m[r] = largest;
        argmax[r] = int32_t(block + j);
      }
    }
  }
  for (long r = 0; r < rows; r++) p.largest[(b * p.heads + h) * p.queries + start + r] = m[r];
  for (long block = 0; block < reach; block += KEYS) {
    const long columns = columns_of<E>(block, reach);
    float *logits = s + block * ROWS;
    for (long r = 0; r < rows; r++) {
      float *row = logits + r * KEYS;
      const bool sees = m[r] > MASKED / 2;
      vec sum_l{}, sum_w{};
      for (long j = 0; j < columns; j += LANES) {
        vec given = load(row + j), weight, log_weight;
        power_exp(given - m[r], p.iterations, p.lowest, weight, log_weight);
        // Clipped keys weigh something for small t, hidden ones never; what is not a number stays.
        weight = given <= MASKED / 2 ? splat(0.0f) : (sees ? weight : given);
        sum_l += weight;
        sum_w += weight * log_weight;
        store(row + j, weight);
      }
      l[r] += sum(sum_l);
      w[r] += sum(sum_w);
    }
    weights.take_columns(logits, rows, columns);
    const Rows<E> values = sources.values_at(block);
    matmul(rows, padded, columns, weights.over_columns, KEYS, values.first, values.stride, out, padded, true);
  }
}

template <typename E> static void forward_chunk(const Problem &p, long b, long h, long first, long last) {
  const long offset = p.keys - p.queries;
  long seen = p.causal ? last + offset : p.keys;
  seen = seen < 0 ? 0 : (seen > p.keys ? p.keys : seen);
  Sources<E> sources{p, b, h, seen, last - first > ROWS};
  const long depth = sources.depth, key_width = sources.key_width, padded = sources.value_width;
  const Scratch<float> s_memory = scratch<float>(ROWS * (p.iterations > 0 ? round_up(seen, KEYS) : KEYS)), out_memory = scratch<float>(ROWS * padded);
  const Scratch<E> q_memory = scratch<E>(ROWS * key_width);
  float *s = s_memory.get(), *out = out_memory.get();
  Block<E> weights;
  for (long start = first; start < last; start += ROWS) {
    const long rows = last - start < ROWS ? last - start : ROWS;
    const Rows<E> q = rows_of(p, p.query, b, h, start, rows, ROWS, key_width, q_memory.get());
    std::memset(out, 0, size_t(ROWS * padded) * 4);
    float m[ROWS], l[ROWS], w[ROWS];
    for (long r = 0; r < rows; r++) {
      const float sink = p.sinks ? p.sinks[(b * p.heads + h) * p.queries + start + r] : MASKED;
      const bool none = sink <= MASKED / 2;
      m[r] = none ? MASKED : sink, l[r] = none ? 0.0f : 1.0f, w[r] = 0;
    }
    const long reach = p.causal ? (start + rows + offset < seen ? start + rows + offset : seen) : seen;
    if (p.iterations > 0) {
      power_rows(p, b, h, start, rows, reach, seen, q, sources, s, weights, out, m, l, w);
      store_rows(p, b, h, start, rows, padded, out, m, l, w);
      continue;
    }
    for (long block = 0; block < reach; block += KEYS) {
      const long columns = columns_of<E>(block, reach);
      matmul(rows, columns, depth, q.first, q.stride, sources.keys_at(block), KEYS, s, KEYS, false);
      for (long r = 0; r < rows; r++) {
        float *row = s + r * KEYS;
        const long limit = p.causal ? (start + r + offset + 1 < seen ? start + r + offset + 1 : seen) : seen;
        if (p.softcap > 0) cap(row, columns, p.softcap);
        hide(p, b, h, start + r, block, columns, limit, row);
        if (p.iterations < 0)
          for (long j = 0; j < columns; j += LANES) store(row + j, polynomial_logits(load(row + j), p.iterations));
        vec top = load(row);
        for (long j = LANES; j < columns; j += LANES) top = larger(load(row + j), top);
        float largest = m[r];
        for (int i = 0; i < LANES; i++) largest = top[i] > largest ? top[i] : largest;
        if (largest <= MASKED / 2) {  // nothing visible yet, or nothing that is a number
          for (long j = 0; j < columns; j++) {
            const float x = row[j] == row[j] ? 0.0f : row[j];
            row[j] = x;
            l[r] += x;
          }
          continue;
        }
        if (largest > m[r]) {
          const float delta = m[r] - largest, factor = l[r] > 0 ? std::exp(delta) : 0.0f;
          w[r] = l[r] > 0 ? factor * (w[r] + delta * l[r]) : 0.0f;
          l[r] *= factor;
          m[r] = largest;
          for (long d = 0; d < padded; d += LANES) store(out + r * padded + d, load(out + r * padded + d) * factor);
        }
        vec sum_l{}, sum_w{};
        for (long j = 0; j < columns; j += LANES) {
          vec x = load(row + j) - largest, e = exp_nonpositive(x);
          sum_l += e;
          sum_w += e * larger(x, splat(-88.0f));
          store(row + j, e);
        }
        l[r] += sum(sum_l);
        w[r] += sum(sum_w);
      }
      weights.take_columns(s, rows, columns);
      const Rows<E> values = sources.values_at(block);
      matmul(rows, padded, columns, weights.over_columns, KEYS, values.first, values.stride, out, padded, true);
    }
    store_rows(p, b, h, start, rows, padded, out, m, l, w);
  }
}

// Turns logits and dP of a row of a block into p and dS as far as that does not pass through the row's maximum; returns
// the row's share of what does.
static float power_grad_logits(const Problem &p, float *sr, float *dr, long columns, float largest, float lse, float delta, float grad_h) {
  const float scale = std::exp(-lse), lowest = p.lowest;
  const int iterations = p.iterations;
  vec total{};
  for (long j = 0; j < columns; j += LANES) {
    vec given = load(sr + j), x = given - largest, weight, log_weight;
    x = x > 0.0f ? splat(0.0f) : x;
    power_exp(x, iterations, lowest, weight, log_weight);
    vec prob = given <= MASKED / 2 ? splat(0.0f) : weight * scale;
    vec slope = load(dr + j) - delta - grad_h * (log_weight - lse);
    vec ds = prob * slope * power_rate(x, iterations, lowest);
    total += ds;
    store(sr + j, prob);
    store(dr + j, ds);
  }
  return sum(total);
}

// What the blocks of keys of a head add to. Pieces of a head share dk, in which each has its own rows.
struct Sums {
  Scratch<float> dq, dk, correction;
};
static long padded_sums(const Problem &p) { return in_bfloat16(p) ? padded_width<bfloat16>(p.key) : padded_width<float>(p.key); }
static Sums sums_of(const Problem &p, bool with_dk) {
  const long padded = padded_sums(p);
  return {scratch<float>(round_up(p.queries, ROWS) * padded), with_dk ? scratch<float>(round_up(p.keys, KEYS) * padded) : nullptr, scratch<float>(p.queries)};
}

// The gradients of one head from every `pieces`-th block of keys, beginning with number `piece`: dV is written, the rest
// left in `dq`, `dk` and `correction` for `backward_finish`.
template <typename E>
static void backward_blocks(const Problem &p, long b, long h, long piece, long pieces, float *dq, float *dk, float *correction) {
  const long offset = p.keys - p.queries, padded_keys = round_up(p.keys, KEYS), padded_queries = round_up(p.queries, ROWS);
  const long key_width = padded_width<E>(p.key), key_depth = terms<E>(p.key.width);
  const long value_width = padded_width<E>(p.value), value_depth = terms<E>(p.value.width);
  const long wider = key_width > value_width ? key_width : value_width;
  const long q_size = padded_queries * key_width, g_size = padded_queries * value_width;
  const Scratch<E> operands =
      scratch<E>(2 * (q_size + g_size) + padded_keys * (key_depth + value_depth + wider + (PAIR<E> == 2 ? key_width : 0)));
  E *q_t = operands.get(), *g_t = q_t + q_size, *keys_t = g_t + g_size, *values_t = keys_t + padded_keys * key_depth;
  E *q_copy = values_t + padded_keys * value_depth, *g_copy = q_copy + q_size, *copy = g_copy + g_size;
  const Rows<E> q = rows_of(p, p.query, b, h, 0, p.queries, padded_queries, key_width, q_copy);
  const Rows<E> g = rows_of(p, p.grad_output, b, h, 0, p.queries, padded_queries, value_width, g_copy);
  const Rows<E> value_rows = rows_of(p, p.value, b, h, 0, p.keys, padded_keys, value_width, copy);
  for (long block = 0; block < padded_keys; block += KEYS) sum_columns(value_rows.from(block), KEYS, value_depth, values_t + block * value_depth);
  // Values are needed no more as they were: keys may take the place of their copy.
  const Rows<E> key_rows = rows_of(p, p.key, b, h, 0, p.keys, padded_keys, key_width, copy);
  for (long block = 0; block < padded_keys; block += KEYS) sum_columns(key_rows.from(block), KEYS, key_depth, keys_t + block * key_depth);
  const Rows<E> keys = sum_rows(key_rows, padded_keys, key_width, copy + padded_keys * wider);
  for (long start = 0; start < padded_queries; start += ROWS) {
    transposed(q.from(start), ROWS, key_width, q_t + start * key_width);
    transposed(g.from(start), ROWS, value_width, g_t + start * value_width);
  }
  const Scratch<float> memory = scratch<float>((2 * ROWS + value_width + wider) * KEYS + p.queries);
  float *s = memory.get(), *dp = s + ROWS * KEYS, *dv_t = dp + ROWS * KEYS, *dk_t = dv_t + value_width * KEYS, *delta = dk_t + wider * KEYS;
  Block<E> probabilities, slopes;
  std::memset(dq, 0, size_t(q_size) * 4);
  const long base = (b * p.heads + h) * p.queries;
  const float *lse = p.lse + base, *entropy = p.entropy + base, *grad_h = p.grad_entropy + base;
  const float *largest = p.largest + base;
  for (long t = 0; t < p.queries; t++) {  // rowsum(g_O * O) + g_H H, what every dP of the row is reduced by
    read_row(at(p.output, b, h, t, p.kind), p.output.width, value_width, p.kind, dv_t);
    read_row(at(p.grad_output, b, h, t, p.kind), p.output.width, value_width, p.kind, dk_t);
    vec total{};
    for (long d = 0; d < value_width; d += LANES) total += load(dv_t + d) * load(dk_t + d);
    delta[t] = sum(total) + grad_h[t] * entropy[t];
    correction[t] = 0;
  }
  for (long block = piece * KEYS; block < p.keys; block += pieces * KEYS) {
    std::memset(dv_t, 0, size_t((value_width + key_width) * KEYS) * 4);  // and dk_t
    long begin = p.causal ? block - offset : 0;  // the first row that sees this block
    begin = begin < 0 ? 0 : begin / ROWS * ROWS;
    for (long start = begin; start < p.queries; start += ROWS) {
      const long rows = p.queries - start < ROWS ? p.queries - start : ROWS;
      const long reach = p.causal && start + rows + offset < p.keys ? start + rows + offset : p.keys;
      const long columns = columns_of<E>(block, reach);
      matmul(rows, columns, key_depth, q.from(start).first, q.stride, keys_t + block * key_depth, KEYS, s, KEYS, false);
      matmul(rows, columns, value_depth, g.from(start).first, g.stride, values_t + block * value_depth, KEYS, dp, KEYS, false);
      for (long r = 0; r < rows; r++) {
        float *sr = s + r * KEYS, *dr = dp + r * KEYS;
        const long t = start + r, limit = p.causal && t + offset + 1 < p.keys ? t + offset + 1 : p.keys;
        float rates[KEYS];
        if (p.softcap > 0) cap(sr, columns, p.softcap, rates);
        hide(p, b, h, t, block, columns, limit, sr);
        if (lse[t] <= MASKED / 2) {  // a row that sees nothing
          std::memset(sr, 0, KEYS * 4);
          std::memset(dr, 0, KEYS * 4);
          continue;
        }
        if (p.iterations > 0) {
          correction[t] += power_grad_logits(p, sr, dr, columns, largest[t], lse[t], delta[t], grad_h[t]);
          continue;
        }
        // Copies, because for all the compiler knows the stores below change what they are copies of.
        const float row_lse = lse[t], row_delta = delta[t], grad_entropy = grad_h[t];
        const int iterations = p.iterations;
        for (long j = 0; j < columns; j += LANES) {
          vec given = load(sr + j), x = (iterations < 0 ? polynomial_logits(given, iterations) : given) - row_lse;
          vec prob = exp_nonpositive(x > 0.0f ? splat(0.0f) : x);  // rounding may leave x a little above 0
          vec slope = load(dr + j) - row_delta - grad_entropy * larger(x, splat(-88.0f));
          store(sr + j, prob);
          store(dr + j, prob * (iterations < 0 ? slope * polynomial_rate(given, iterations) : slope));
        }
        if (p.softcap > 0)
          for (long j = 0; j < columns; j += LANES) store(dr + j, load(dr + j) * load(rates + j));
      }
      probabilities.take_rows(s, rows, columns);
      slopes.take_rows(dp, rows, columns);
      slopes.take_columns(dp, rows, columns);
      const long summed = terms<E>(rows);
      matmul(p.value.width, columns, summed, g_t + start * value_width, ROWS, probabilities.over_rows, KEYS, dv_t, KEYS, true);
      matmul(p.key.width, columns, summed, q_t + start * key_width, ROWS, slopes.over_rows, KEYS, dk_t, KEYS, true);
      matmul(rows, key_width, columns, slopes.over_columns, KEYS, keys.from(block).first, keys.stride, dq + start * key_width, key_width, true);
    }
    transpose(reinterpret_cast<uint32_t *>(dk_t), key_width, KEYS, KEYS, reinterpret_cast<uint32_t *>(dk + block * key_width));
    transpose(reinterpret_cast<uint32_t *>(dv_t), value_width, KEYS, KEYS, reinterpret_cast<uint32_t *>(dk_t));
    for (long j = 0; j < KEYS && block + j < p.keys; j++)
      write_row(dk_t + j * value_width, 1.0f, p.value.width, p.kind, const_cast<void *>(at(p.grad_value, b, h, block + j, p.kind)));
  }
}

// Adds the pieces of a head up, lets the gradient through the rows' maxima, and writes dQ and dK.
static void backward_finish(const Problem &p, long b, long h, const Sums *sums, long pieces) {
  const long padded = padded_sums(p), base = (b * p.heads + h) * p.queries;
  float *dq = sums->dq.get(), *dk = sums->dk.get(), *correction = sums->correction.get();
  const Scratch<float> memory = scratch<float>(2 * padded);
  float *q = memory.get(), *k = q + padded;
  for (long piece = 1; piece < pieces; piece++) {
    for (long i = 0; i < p.queries * padded; i += LANES) store(dq + i, load(dq + i) + load(sums[piece].dq.get() + i));
    for (long t = 0; t < p.queries; t++) correction[t] += sums[piece].correction[t];
  }
  for (long t = 0; t < p.queries; t++) {
    if (p.iterations > 0 && p.lse[base + t] > MASKED / 2) {
      const long j = p.argmax[base + t];
      read_row(at(p.query, b, h, t, p.kind), p.key.width, padded, p.kind, q);
      read_row(at(p.key, b, h, j, p.kind), p.key.width, padded, p.kind, k);
      for (long d = 0; d < p.key.width; d++) {
        dq[t * padded + d] -= correction[t] * k[d];
        dk[j * padded + d] -= correction[t] * q[d];
      }
    }
    write_row(dq + t * padded, 1.0f, p.key.width, p.kind, const_cast<void *>(at(p.grad_query, b, h, t, p.kind)));
  }
  for (long j = 0; j < p.keys; j++)
    write_row(dk + j * padded, 1.0f, p.key.width, p.kind, const_cast<void *>(at(p.grad_key, b, h, j, p.kind)));
}

// OpenMP's entry point `GOMP_parallel`: run a function on so many threads, the caller among them.
typedef void (*Parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

struct Call {
  const Problem *problem;
  long chunks;  // of query rows in the forward pass, of key blocks in the backward pass
  enum { FORWARD, BACKWARD, PIECES, FINISH } pass;
  Sums *sums;  // of all heads' pieces, where heads have several
  std::atomic<long> next;
};

static void work(void *data) {
  Call &call = *static_cast<Call *>(data);
  const Problem &p = *call.problem;
  const long chunks = call.pass == Call::FORWARD || call.pass == Call::PIECES ? call.chunks : 1;
  const long rows = (p.queries + chunks - 1) / chunks;
  begin_products();
  for (long task; (task = call.next.fetch_add(1)) < p.batches * p.heads * chunks;) {
    const long head = task / chunks, b = head / p.heads, h = head % p.heads;
    const auto backward = [&](long piece, long pieces, const Sums &own, float *dk) {
      const auto blocks = in_bfloat16(p) ? backward_blocks<bfloat16> : backward_blocks<float>;
      blocks(p, b, h, piece, pieces, own.dq.get(), dk, own.correction.get());
    };
    if (call.pass == Call::FORWARD) {
      const long chunk = chunks - 1 - task % chunks;  // the longest chunk of a causal head first
      const long first = chunk * rows, last = first + rows < p.queries ? first + rows : p.queries;
      if (first < last) in_bfloat16(p) ? forward_chunk<bfloat16>(p, b, h, first, last) : forward_chunk<float>(p, b, h, first, last);
    } else if (call.pass == Call::BACKWARD) {
      const Sums sums = sums_of(p, true);
      backward(0, 1, sums, sums.dk.get());
      backward_finish(p, b, h, &sums, 1);
    } else if (call.pass == Call::PIECES) {
      backward(task % chunks, chunks, call.sums[task], call.sums[head * chunks].dk.get());
    } else {
      backward_finish(p, b, h, call.sums + head * call.chunks, call.chunks);
    }
  }
  end_products();
}

static void run(Call &call, unsigned threads, Parallel parallel) {
  if (parallel && threads > 1) {
    parallel(work, &call, threads, 0);
    return;
  }
  std::vector<std::thread> helpers;
  for (unsigned i = 1; i < threads; i++) helpers.emplace_back(work, &call);
  work(&call);
  for (std::thread &helper : helpers) helper.join();
}

extern "C" void entropi_forward(const Problem *problem, long chunks, unsigned threads, Parallel parallel) {
  Call call{problem, chunks, Call::FORWARD, nullptr, {0}};
  run(call, threads, parallel);
}
extern "C" void entropi_backward(const Problem *problem, long pieces, unsigned threads, Parallel parallel) {
  if (pieces == 1) {
    Call call{problem, 1, Call::BACKWARD, nullptr, {0}};
    return run(call, threads, parallel);
  }
  std::vector<Sums> sums;
  for (long i = 0; i < problem->batches * problem->heads * pieces; i++) sums.push_back(sums_of(*problem, i % pieces == 0));
  Call first{problem, pieces, Call::PIECES, sums.data(), {0}}, second{problem, pieces, Call::FINISH, sums.data(), {0}};
  run(first, threads, parallel);
  run(second, threads, parallel);
}
