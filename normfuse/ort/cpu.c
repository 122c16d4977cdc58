/* The operators on the CPU: statistics in float, a LayerNorm in two passes over a row in the cache, never
 * E[x^2] - E[x]^2. Compiled without contraction to fused multiply-adds, which would skip roundings that a model has. */
#include "ops.h"

#include <math.h>

#ifndef INLINE /* tests set it: forced, it takes a sanitizer forty seconds */
#define INLINE __attribute__((always_inline)) inline
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* vectors never cross a call */
#endif

/* inside the files that are included here */
#define V FN(V)
#define D FN(D)
#define U FN(U)
#define H FN(H)
/* `a` where the mask is set, else `b`. */
#define PICK(MASK, A, B) (((U)(MASK) & (A)) | (~(U)(MASK) & (B)))

#define W 4
#define FN(NAME) NAME##_base
#include "vectors.h"
#include "rows.h"
#include "exponentials.h"
#undef FN
#undef W

#if defined(__x86_64__)
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,f16c,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c,fma")
#endif
#define W 8
#define FN(NAME) NAME##_avx2
#define INTEL(NAME) _mm256_##NAME
#define FLOATS __m256
#define HALVES __m128i
#include "vectors.h"
#include "rows.h"
#include "exponentials.h"
#undef FN
#undef W
#undef INTEL
#undef FLOATS
#undef HALVES
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f")
#endif
#define W 16 /* for what computes more than it reads: a norm waits for its memory */
#define FN(NAME) NAME##_avx512
#define INTEL(NAME) _mm512_##NAME
#define REDUCE(NAME) _mm512_reduce_##NAME
#define FLOATS __m512
#define HALVES __m256i
#include "vectors.h"
#include "exponentials.h"
#undef FN
#undef W
#undef INTEL
#undef REDUCE
#undef FLOATS
#undef HALVES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static int avx2(void) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
}
static int avx512(void) { return __builtin_cpu_supports("avx512f"); }
#else
#define rows_avx2 rows_base
#define load_avx2 load_base
#define softmax_avx2 softmax_base
#define softmax_avx512 softmax_base
static int avx2(void) { return 0; }
static int avx512(void) { return 0; }
#endif

#ifdef NORMFUSE_BASELINE /* for tests: the code of machines without AVX2 */
#define FAST (0 && avx2())
#define WIDE (0 && avx512())
#else
#define FAST avx2()
#ifdef NORMFUSE_AVX2 /* and of those without AVX-512 */
#define WIDE (0 && avx512())
#else
#define WIDE avx512()
#endif
#endif

void nf_cpu_rows(const Spec *spec, const Args *args, long long begin, long long end, float *scratch) {
  (FAST ? rows_avx2 : rows_base)(spec, args, begin, end, scratch);
}

void nf_cpu_softmax(int from, const void *x, float by, const float *r, float number, int half, int to, void *y, long long n,
                    float *scratch) {
  (WIDE ? softmax_avx512 : FAST ? softmax_avx2 : softmax_base)(from, x, by, r, number, half, to, y, n, scratch);
}

void nf_cpu_load(int type, const void *from, float *to, long long n) {
  (FAST ? load_avx2 : load_base)(type, from, to, n);
}

const char *nf_cpu_isa(void) { return WIDE ? "avx2, avx512" : FAST ? "avx2" : "baseline"; }
