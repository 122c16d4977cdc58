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

#define W 4
#define FN(NAME) NAME##_base
#include "rows.h"
#undef FN
#undef W

#if defined(__x86_64__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
#define HAS_F16C
#define W 8
#define FN(NAME) NAME##_avx2
#include "rows.h"
#undef FN
#undef W
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static int avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }
#else
#define rows_avx2 rows_base
#define load_avx2 load_base
static int avx2(void) { return 0; }
#endif

#ifdef NORMFUSE_BASELINE /* for tests: the code of machines without AVX2 */
#define FAST (0 && avx2())
#else
#define FAST avx2()
#endif

void nf_cpu_rows(const Spec *spec, const Args *args, long long begin, long long end, float *scratch) {
  (FAST ? rows_avx2 : rows_base)(spec, args, begin, end, scratch);
}

void nf_cpu_load(int type, const void *from, float *to, long long n) {
  (FAST ? load_avx2 : load_base)(type, from, to, n);
}

const char *nf_cpu_isa(void) { return FAST ? "avx2" : "baseline"; }
