/* Rows of the operators for one instruction set: `cpu.c` includes this file once for each, with FN(name) and W defined.
 *
 * Vectors are those of GCC and clang, which run on every machine. A row's sums are made in an order that depends on its
 * length alone: in float over at most 64 values a lane, from there in double. */

typedef float FN(V) __attribute__((vector_size(4 * W)));
typedef uint32_t FN(U) __attribute__((vector_size(4 * W)));
typedef uint16_t FN(H) __attribute__((vector_size(2 * W)));
#define V FN(V)
#define U FN(U)
#define H FN(H)

/* `a` where the mask is set, else `b`. */
#define PICK(MASK, A, B) (((U)(MASK) & (A)) | (~(U)(MASK) & (B)))

static INLINE V FN(from_f16)(H half) {
#ifdef HAS_F16C
  return (V)_mm256_cvtph_ps((__m128i)half);
#else
  U u = __builtin_convertvector(half, U), magnitude = (u & 0x7fff) << 13;
  U bits = (U)((V)magnitude * 0x1p112f); /* exact for subnormals too */
  bits |= (U)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return (V)(bits | (u & 0x8000) << 16);
#endif
}

static INLINE H FN(to_f16)(V v) {
#ifdef HAS_F16C
  return (H)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  U u = (U)v, sign = u & 0x80000000u, a = u ^ sign;
  U normal = (a - (112u << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
  U tiny = (U)((V)a + 0.5f) - 0x3f000000u; /* the addition rounds at the last place of a subnormal */
  U large = PICK(a > 0x7f800000u, (a >> 13 & 0x3ff) | 0x7e00u, (U){0} + 0x7c00u);
  U out = PICK(a < 0x38800000u, tiny, PICK(a >= 0x47800000u, large, normal));
  return __builtin_convertvector(out | sign >> 16, H);
#endif
}

static INLINE V FN(from_bf16)(H half) { return (V)(__builtin_convertvector(half, U) << 16); }

static INLINE H FN(to_bf16)(V v) {
  U u = (U)v, nan = (U)((u & 0x7fffffffu) > 0x7f800000u);
  U out = PICK(nan, u >> 16 | 0x40, (u + 0x7fff + ((u >> 16) & 1)) >> 16);
  return __builtin_convertvector(out, H);
}

/* k <= W elements from the i-th on, zeros behind them. */
static INLINE V FN(ld)(int type, const void *from, long long i, long long k) {
  if (type == F32) {
    V v = {0};
    if (k == W) __builtin_memcpy(&v, (const float *)from + i, sizeof v);
    else __builtin_memcpy(&v, (const float *)from + i, (size_t)k * 4);
    return v;
  }
  H half = {0};
  if (k == W) __builtin_memcpy(&half, (const uint16_t *)from + i, sizeof half);
  else __builtin_memcpy(&half, (const uint16_t *)from + i, (size_t)k * 2);
  return type == F16 ? FN(from_f16)(half) : FN(from_bf16)(half);
}

static INLINE void FN(st)(int type, void *to, long long i, long long k, V v) {
  if (type == F32) {
    if (k == W) __builtin_memcpy((float *)to + i, &v, sizeof v);
    else __builtin_memcpy((float *)to + i, &v, (size_t)k * 4);
    return;
  }
  H half = type == F16 ? FN(to_f16)(v) : FN(to_bf16)(v);
  if (k == W) __builtin_memcpy((uint16_t *)to + i, &half, sizeof half);
  else __builtin_memcpy((uint16_t *)to + i, &half, (size_t)k * 2);
}

static INLINE V FN(rounded)(int type, V v) {
  return type == F32 ? v : type == F16 ? FN(from_f16)(FN(to_f16)(v)) : FN(from_bf16)(FN(to_bf16)(v));
}

static INLINE double FN(lanes)(V v) {
  float part[W];
  __builtin_memcpy(part, &v, sizeof v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) part[i] += part[i + half];
  return part[0];
}

/* The sum of v, or of v^2 (`square`), over a row v = x, x + r or x - mean; v is stored in s, and as floats in h, where
 * these are given. */
static INLINE double FN(sum)(int type, int square, const void *x, const void *r, float mean, void *s, float *h, long long n) {
  double total = 0;
  long long i = 0, even = n - n % (4 * W);
  V acc[4];
#define TERM(A, I, K)                                                \
  do {                                                               \
    V v = FN(ld)(type, x, I, K);                                     \
    if (r) v = FN(rounded)(type, v + FN(ld)(type, r, I, K));         \
    if (s) FN(st)(type, s, I, K, v);                                 \
    if (h) FN(st)(F32, h, I, K, v);                                  \
    if (mean != 0) v -= mean;                                        \
    A += square ? v * v : v;                                         \
  } while (0)
  while (i < even) {
    long long stop = even - i > 256 * W ? i + 256 * W : even;
    acc[0] = acc[1] = acc[2] = acc[3] = (V){0};
    for (; i < stop; i += 4 * W) {
      TERM(acc[0], i, W);
      TERM(acc[1], i + W, W);
      TERM(acc[2], i + 2 * W, W);
      TERM(acc[3], i + 3 * W, W);
    }
    total += FN(lanes)((acc[0] + acc[1]) + (acc[2] + acc[3]));
  }
  acc[0] = (V){0};
  for (; i + W <= n; i += W) TERM(acc[0], i, W);
  total += FN(lanes)(acc[0]);
  if (i < n) {
    V last = {0};
    TERM(last, i, n - i);
    float part[W];
    __builtin_memcpy(part, &last, sizeof last);
    for (long long k = 0; k < n - i; k++) total += part[k]; /* not the lanes behind the row: they hold -mean */
  }
#undef TERM
  return total;
}

/* out = affine(rstd * (h - mean)) [+ res], with a rounding where the types ask for one. */
static INLINE void FN(scale)(int first, int affine, int result, const float *h, float mean, float rstd, const float *w,
                             const float *b, const void *res, void *out, long long n) {
#define ELEMENTS(I, K)                                                     \
  do {                                                                     \
    V v = FN(ld)(F32, h, I, K);                                            \
    if (mean != 0) v -= mean;                                              \
    v = FN(rounded)(first, v * rstd);                                      \
    if (w) v = FN(rounded)(affine, v * FN(ld)(F32, w, I, K));              \
    if (b) v = FN(rounded)(affine, v + FN(ld)(F32, b, I, K));              \
    if (res) v = FN(rounded)(result, v) + FN(ld)(result, res, I, K);       \
    FN(st)(result, out, I, K, v);                                          \
  } while (0)
  long long i = 0;
  for (; i + W <= n; i += W) ELEMENTS(i, W);
  if (i < n) ELEMENTS(i, n - i);
#undef ELEMENTS
}

/* The statistics of a row in a narrow type, where the model itself computes in it: each step rounded; h becomes n. */
static void FN(narrow)(int type, int layer, float eps, float *h, long long n) {
#define ROUND1(VALUE) (FN(rounded)(type, (V){0} + (float)(VALUE))[0])
#define EACH(...)                                                     \
  for (long long i = 0; i < n; i += W) {                              \
    long long k = n - i < W ? n - i : W;                              \
    V v = FN(ld)(F32, h, i, k);                                       \
    __VA_ARGS__;                                                      \
  }
  EACH(FN(st)(F32, h, i, k, FN(rounded)(type, v)))
  if (layer) {
    float mean = ROUND1(FN(sum)(F32, 0, h, NULL, 0, NULL, NULL, n) / (double)n);
    EACH(FN(st)(F32, h, i, k, FN(rounded)(type, v - mean)))
  }
  double total = 0;
  EACH(V q = FN(rounded)(type, v * v); total += FN(lanes)(q)) /* zeros behind the row */
  float root = ROUND1(sqrtf(ROUND1(ROUND1(total / (double)n) + ROUND1(eps))));
  EACH(FN(st)(F32, h, i, k, FN(rounded)(type, v / root)))
#undef EACH
#undef ROUND1
}

/* [s = x + r,] out = norm(x or s) [+ res], one row. `type` is that of x. */
static void FN(norm)(const Spec *spec, int type, const void *x, const void *r, void *s, const float *w, const float *b,
                     const void *res, void *out, long long n, float eps, float *scratch) {
  const float *h = scratch;
  float mean = 0, rstd = 1;
  double total;
  int exact = spec->compute == F32;
  if (type == F32 && exact) { /* the row itself, just read or written, is in the cache */
    h = r ? s : x;
    if (r) total = spec->layer ? FN(sum)(F32, 0, x, r, 0, s, NULL, n) : FN(sum)(F32, 1, x, r, 0, s, NULL, n);
    else total = spec->layer ? FN(sum)(F32, 0, x, NULL, 0, NULL, NULL, n) : FN(sum)(F32, 1, x, NULL, 0, NULL, NULL, n);
  } else {
#define READ(T)                                                                                                      \
  (r ? spec->layer ? FN(sum)(T, 0, x, r, 0, s, scratch, n) : FN(sum)(T, 1, x, r, 0, s, scratch, n)                   \
     : spec->layer ? FN(sum)(T, 0, x, NULL, 0, NULL, scratch, n) : FN(sum)(T, 1, x, NULL, 0, NULL, scratch, n))
    total = type == F16 ? READ(F16) : type == BF16 ? READ(BF16) : READ(F32);
#undef READ
  }
  if (!exact) {
    FN(narrow)(spec->compute, spec->layer, eps, scratch, n);
  } else {
    if (spec->layer) {
      mean = (float)(total / (double)n);
      total = mean == 0 ? FN(sum)(F32, 1, h, NULL, 0, NULL, NULL, n) : FN(sum)(F32, 1, h, NULL, mean, NULL, NULL, n);
    }
    rstd = (float)(1 / sqrt(total / (double)n + (double)eps));
  }
  int first = spec->first ? type : F32, affine = nf_affine(spec), result = spec->result;
#define SCALE(F, A, R)                                                             \
  if (first == F && affine == A && result == R) {                                  \
    if (mean == 0) FN(scale)(F, A, R, h, 0, rstd, w, b, res, out, n);              \
    else FN(scale)(F, A, R, h, mean, rstd, w, b, res, out, n);                     \
    return;                                                                        \
  }
  SCALE(F32, F32, F32)
  SCALE(F16, F16, F16)
  SCALE(BF16, BF16, BF16)
  SCALE(F32, F32, F16)
  SCALE(F32, F32, BF16)
  SCALE(F16, F32, F32)
  SCALE(BF16, F32, F32)
#undef SCALE
  FN(scale)(first, affine, result, h, mean, rstd, w, b, res, out, n);
}

static void FN(rows)(const Spec *spec, const Args *a, long long begin, long long end, float *scratch) {
  static const int size[] = {4, 2, 2};
  int in = size[spec->x], out = size[spec->result];
  const float *w = a->w, *b = a->b, *w2 = a->w2, *b2 = a->b2;
  for (long long i = begin; i < end; i++) {
    long long n = a->n;
    const char *x = (const char *)a->x + i * n * in;
    char *s = (char *)a->s + i * n * out, *y = (char *)a->y + i * n * out;
    switch (spec->op) {
    case OP_ADD_NORM:
      s = (char *)a->s + i * n * in;
      FN(norm)(spec, spec->x, x, (const char *)a->r + i * n * in, s, w, b, NULL, y, n, a->eps, scratch);
      break;
    case OP_NORM_ADD:
      FN(norm)(spec, spec->x, x, NULL, NULL, w, b, (const char *)a->r + i * n * out, s, n, a->eps, scratch);
      break;
    case OP_NORM_ADD_NORM:
      FN(norm)(spec, spec->x, x, NULL, NULL, w, b, (const char *)a->r + i * n * out, s, n, a->eps, scratch);
      FN(norm)(spec, spec->result, s, NULL, NULL, w2, b2, NULL, y, n, a->eps, scratch);
      break;
    default:
      if (i < a->m) {
        FN(norm)(spec, spec->x, x, NULL, NULL, w, b, NULL, y, n, a->eps, scratch);
      } else {
        n = a->n2;
        FN(norm)(spec, spec->x, (const char *)a->x2 + (i - a->m) * n * in, NULL, NULL, w2, b2, NULL,
                 (char *)a->y2 + (i - a->m) * n * out, n, a->eps, scratch);
      }
    }
  }
}

static void FN(load)(int type, const void *from, float *to, long long n) {
  for (long long i = 0; i < n; i += W) {
    long long k = n - i < W ? n - i : W;
    FN(st)(F32, to, i, k, FN(ld)(type, from, i, k));
  }
}

#undef V
#undef U
#undef H
#undef PICK
