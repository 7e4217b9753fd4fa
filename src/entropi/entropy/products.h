// Products of small matrices for native.cpp: C = A B or C += A B with C (M x N) in float32, and A and B in float32 or bfloat16.
//
// A lies row by row. B lies in groups of PAIR rows, column by column within a group: element (k, n) is at
// (k / PAIR) ldb PAIR + n PAIR + k % PAIR. PAIR is 1 for float32, so B too lies row by row, and 2 for bfloat16, because the
// instructions that multiply it (AVX-512's and the tiles of AMX) add two products at once.
//
// N is a multiple of LANES. Operands are zero from K to `terms(K)`. Behind M, A and C have rows up to the next multiple of 16,
// which tiles read and write.

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_VECTORS = 4, TILE_ROWS = 6;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE_VECTORS = 2, TILE_ROWS = 6;
#else
constexpr int LANES = 4, TILE_VECTORS = 4, TILE_ROWS = 4;
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float vec_u __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint16_t bfloat16;  // its bits

static inline vec load(const float *p) { return *reinterpret_cast<const vec_u *>(p); }
static inline void store(float *p, vec x) { *reinterpret_cast<vec_u *>(p) = x; }
static inline vec splat(float x) { return vec{} + x; }

static inline bfloat16 to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bfloat16(x != x ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}
static inline float to_float(bfloat16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

template <typename E> constexpr int PAIR = sizeof(E) == 4 ? 1 : 2;
static inline long round_up(long x, long to) { return (x + to - 1) / to * to; }

// The instructions for products of bfloat16: none, AVX-512's, or AMX's, which tests also run in software.
enum Instructions { NONE, VECTORS, TILES };
static Instructions find_instructions() {
#if defined(TILES_IN_SOFTWARE)
  return TILES;
#endif
#if defined(__AMX_BF16__)
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // Linux gives a process the tiles' registers on request
  if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0) return TILES;
#endif
#if defined(__AVX512BF16__)
  return VECTORS;
#endif
  return NONE;
}
static Instructions bfloat16_instructions() {
  static const Instructions found = find_instructions();
  return found;
}

template <typename E> static long terms(long k);
template <> long terms<float>(long k) { return k; }
template <> long terms<bfloat16>(long k) { return round_up(k, bfloat16_instructions() == TILES ? 32 : 2); }

// `count` numbers, a multiple of LANES, in bfloat16.
static inline void narrow(const float *from, long count, bfloat16 *to) {
#if defined(__AVX512BF16__)
  for (long i = 0; i < count; i += 16) {
    const __m256bh x = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
    std::memcpy(to + i, &x, sizeof x);
  }
#else
  for (long i = 0; i < count; i++) to[i] = to_bfloat16(from[i]);
#endif
}
// Two rows of a matrix as a group of rows of B.
static inline void narrow_pair(const float *even, const float *odd, long count, bfloat16 *to) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t ORDER[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  for (long i = 0; i < count; i += 16) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(odd + i), _mm512_loadu_ps(even + i));
    __m512i x;
    std::memcpy(&x, &both, sizeof x);
    _mm512_storeu_si512(to + 2 * i, _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), x));
  }
#else
  for (long i = 0; i < count; i++) to[2 * i] = to_bfloat16(even[i]), to[2 * i + 1] = to_bfloat16(odd[i]);
#endif
}

// A matrix of words (rows, columns), `stride` apart, as (columns, rows).
static inline void transpose(const uint32_t *from, long rows, long columns, long stride, uint32_t *to) {
  long whole_rows = 0, whole_columns = 0;
#if defined(__AVX512F__)
  whole_rows = rows / 16 * 16, whole_columns = columns / 16 * 16;
  for (long i = 0; i < whole_rows; i += 16)
    for (long j = 0; j < whole_columns; j += 16) {
      const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      __m512i x[16];
      for (int r = 0; r < 16; r++) x[r] = _mm512_loadu_si512(from + (i + r) * stride + j);
#pragma GCC unroll 4
      for (int half = 8; half > 0; half /= 2) {  // swap the two blocks beside the diagonal, then within every block
        const __m512i size = _mm512_set1_epi32(half);
        const __mmask16 right = _mm512_test_epi32_mask(lane, size);
        const __m512i upper = _mm512_mask_add_epi32(lane, right, lane, _mm512_set1_epi32(16 - half));
        const __m512i lower = _mm512_mask_add_epi32(_mm512_add_epi32(lane, size), right, lane, _mm512_set1_epi32(16));
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) {
          if (r & half) continue;
          const __m512i a = x[r], b = x[r + half];
          x[r] = _mm512_permutex2var_epi32(a, upper, b);
          x[r + half] = _mm512_permutex2var_epi32(a, lower, b);
        }
      }
      for (int r = 0; r < 16; r++) _mm512_storeu_si512(to + (j + r) * rows + i, x[r]);
    }
#endif
  for (long j = 0; j < columns; j++)
    for (long i = j < whole_columns ? whole_rows : 0; i < rows; i++) to[j * rows + i] = from[i * stride + j];
}

// Two terms of a sum at once, one lane a column: a's pair is the same in all lanes.
static inline vec multiply_add(vec sum, float a, vec b) { return sum + a * b; }
#if defined(__AVX512BF16__)
static inline vec multiply_add(vec sum, uint32_t a, __m512i b) {
  const __m512i both = _mm512_set1_epi32(int(a));
  __m512bh x, y;
  std::memcpy(&x, &both, sizeof x);
  std::memcpy(&y, &b, sizeof y);
  return (vec)_mm512_dpbf16_ps((__m512)sum, x, y);
}
static inline __m512i load(const uint32_t *p) { return _mm512_loadu_si512(p); }
#endif

// M rows and NV vectors of columns of C, over K words: a word of A or B is a float32 or a pair of bfloat16.
template <int M, int NV, typename Word>
static inline void tile(int K, const Word *A, long lda, const Word *B, long ldb, float *C, long ldc, bool add) {
  vec acc[M][NV];
  for (int i = 0; i < M; i++)
    for (int n = 0; n < NV; n++) acc[i][n] = add ? load(C + i * ldc + n * LANES) : vec{};
  for (int k = 0; k < K; k++) {
    decltype(load(B)) b[NV];
    for (int n = 0; n < NV; n++) b[n] = load(B + k * ldb + n * LANES);
    for (int i = 0; i < M; i++) {
      const Word a = A[i * lda + k];
      for (int n = 0; n < NV; n++) acc[i][n] = multiply_add(acc[i][n], a, b[n]);
    }
  }
  for (int i = 0; i < M; i++)
    for (int n = 0; n < NV; n++) store(C + i * ldc + n * LANES, acc[i][n]);
}

template <int NV, typename Word>
static void strips(int M, int K, const Word *A, long lda, const Word *B, long ldb, float *C, long ldc, bool add) {
  int i = 0;
  for (; i + TILE_ROWS <= M; i += TILE_ROWS) tile<TILE_ROWS, NV>(K, A + i * lda, lda, B, ldb, C + i * ldc, ldc, add);
  for (; i + 4 <= M; i += 4) tile<4, NV>(K, A + i * lda, lda, B, ldb, C + i * ldc, ldc, add);
  for (; i + 2 <= M; i += 2) tile<2, NV>(K, A + i * lda, lda, B, ldb, C + i * ldc, ldc, add);
  for (; i < M; i++) tile<1, NV>(K, A + i * lda, lda, B, ldb, C + i * ldc, ldc, add);
}

template <typename Word>
static void in_vectors(int M, int N, int K, const Word *A, long lda, const Word *B, long ldb, float *C, long ldc, bool add) {
  int n = 0;
  for (; n + TILE_VECTORS * LANES <= N; n += TILE_VECTORS * LANES)
    strips<TILE_VECTORS>(M, K, A, lda, B + n, ldb, C + n, ldc, add);
  const int rest = (N - n) / LANES;  // fewer accumulators than this would wait for each other
  if (TILE_VECTORS > 3 && rest == 3) return strips<3>(M, K, A, lda, B + n, ldb, C + n, ldc, add);
  if (TILE_VECTORS > 2 && rest == 2) return strips<2>(M, K, A, lda, B + n, ldb, C + n, ldc, add);
  for (; n < N; n += LANES) strips<1>(M, K, A, lda, B + n, ldb, C + n, ldc, add);
}

// A tile of AMX is 16 rows of 16 words. Tiles 0 to 3 are sums, 4 and 5 hold A, 6 and 7 hold B.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
#if defined(TILES_IN_SOFTWARE)
static thread_local uint32_t SOFTWARE_TILES[8][16][16];
static inline void multiply_tiles(float (*sums)[16], const uint32_t (*a)[16], const uint32_t (*b)[16]) {
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++) {
        sums[m][n] += to_float(bfloat16(a[m][k])) * to_float(bfloat16(b[k][n]));
        sums[m][n] += to_float(bfloat16(a[m][k] >> 16)) * to_float(bfloat16(b[k][n] >> 16));
      }
}
static void copy_tile(uint32_t (*tile)[16], void *memory, long row_bytes, bool out) {
  for (int i = 0; i < 16; i++) {
    char *row = static_cast<char *>(memory) + i * row_bytes;
    out ? std::memcpy(row, tile[i], 64) : std::memcpy(tile[i], row, 64);
  }
}
#define TILE_LOAD(t, from, row_bytes) copy_tile(SOFTWARE_TILES[t], const_cast<void *>(static_cast<const void *>(from)), row_bytes, false)
#define TILE_STORE(t, to, row_bytes) copy_tile(SOFTWARE_TILES[t], to, row_bytes, true)
#define TILE_ZERO(t) std::memset(SOFTWARE_TILES[t], 0, sizeof SOFTWARE_TILES[t])
#define TILE_MULTIPLY(c, a, b) multiply_tiles(reinterpret_cast<float (*)[16]>(SOFTWARE_TILES[c]), SOFTWARE_TILES[a], SOFTWARE_TILES[b])
#define TILES_BEGIN(shapes) (void)(shapes)
#define TILES_END() (void)0
#elif defined(__AMX_BF16__)
#define TILE_LOAD(t, from, row_bytes) _tile_loadd(t, from, row_bytes)
#define TILE_STORE(t, to, row_bytes) _tile_stored(t, to, row_bytes)
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)
#define TILES_BEGIN(shapes) _tile_loadconfig(shapes)
#define TILES_END() _tile_release()
#endif

#if defined(TILE_MULTIPLY)
// MT x NT tiles of C (at most 2 x 2).
template <int MT, int NT>
static inline void in_tile_registers(int K, const bfloat16 *A, long lda, const bfloat16 *B, long ldb, float *C, long ldc, bool add) {
  if (add) {
    TILE_LOAD(0, C, ldc * 4);
    if (NT > 1) TILE_LOAD(1, C + 16, ldc * 4);
    if (MT > 1) TILE_LOAD(2, C + 16 * ldc, ldc * 4);
    if (MT > 1 && NT > 1) TILE_LOAD(3, C + 16 * ldc + 16, ldc * 4);
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  for (int k = 0; k < K; k += 32) {
    TILE_LOAD(4, A + k, lda * 2);
    if (MT > 1) TILE_LOAD(5, A + 16 * lda + k, lda * 2);
    TILE_LOAD(6, B + k * ldb, ldb * 4);
    if (NT > 1) TILE_LOAD(7, B + k * ldb + 32, ldb * 4);
    TILE_MULTIPLY(0, 4, 6);
    if (NT > 1) TILE_MULTIPLY(1, 4, 7);
    if (MT > 1) TILE_MULTIPLY(2, 5, 6);
    if (MT > 1 && NT > 1) TILE_MULTIPLY(3, 5, 7);
  }
  TILE_STORE(0, C, ldc * 4);
  if (NT > 1) TILE_STORE(1, C + 16, ldc * 4);
  if (MT > 1) TILE_STORE(2, C + 16 * ldc, ldc * 4);
  if (MT > 1 && NT > 1) TILE_STORE(3, C + 16 * ldc + 16, ldc * 4);
}

template <int NT>
static void tile_strips(int M, int K, const bfloat16 *A, long lda, const bfloat16 *B, long ldb, float *C, long ldc, bool add) {
  int i = 0;
  for (; i + 16 < M; i += 32) in_tile_registers<2, NT>(K, A + i * lda, lda, B, ldb, C + i * ldc, ldc, add);
  if (i < M) in_tile_registers<1, NT>(K, A + i * lda, lda, B, ldb, C + i * ldc, ldc, add);
}
#endif

static void matmul(int M, int N, int K, const float *A, long lda, const float *B, long ldb, float *C, long ldc, bool add) {
  in_vectors(M, N, K, A, lda, B, ldb, C, ldc, add);
}
static void matmul(int M, int N, int K, const bfloat16 *A, long lda, const bfloat16 *B, long ldb, float *C, long ldc, bool add) {
#if defined(TILE_MULTIPLY)
  if (bfloat16_instructions() == TILES) {
    int n = 0;
    for (; n + 32 <= N; n += 32) tile_strips<2>(M, K, A, lda, B + 2 * n, ldb, C + n, ldc, add);
    if (n < N) tile_strips<1>(M, K, A, lda, B + 2 * n, ldb, C + n, ldc, add);
    return;
  }
#endif
#if defined(__AVX512BF16__)
  const uint32_t *a = reinterpret_cast<const uint32_t *>(A), *b = reinterpret_cast<const uint32_t *>(B);
  in_vectors(M, N, (K + 1) / 2, a, lda / 2, b, ldb, C, ldc, add);
#endif
}

// What a thread does before and after products.
static void begin_products() {
#if defined(TILE_MULTIPLY)
  static const TileShapes shapes;
  if (bfloat16_instructions() == TILES) TILES_BEGIN(&shapes);
#endif
}
static void end_products() {
#if defined(TILE_MULTIPLY)
  if (bfloat16_instructions() == TILES) TILES_END();
#endif
}
