/* Rows of the norms for one instruction set: see vectors.h. A row's sums are made in an order that depends on its length
 * alone: in float over at most 8 values a lane and 4 lanes, from there in double. */

enum { FN(SUM), FN(SQUARES), FN(CENTRED) };

/* Sums over a row v = x, x + r or x - pivot: of v (SUM), of v^2 (SQUARES), or of both (CENTRED, that of v in *linear).
 * x + r goes to s, and is what s then holds, but if it is `unrounded`; v as floats goes to h, where that is given. To x
 * comes `more` first, where that is given, with a rounding of its own where the sum has one. */
static INLINE double FN(sum)(int type, int mode, const void *x, const void *r, const float *more, float pivot,
                             int unrounded, void *s, float *h, long long n, double *linear) {
  D total = {0}, first = {0};
  V acc[4], lin[4];
#define TERM(A, I, K)                                 \
  do {                                                \
    V v = FN(ld)(type, x, I, K);                      \
    if (r) {                                          \
      if (more) {                                     \
        v += FN(ld)(F32, more, I, K);                 \
        if (!unrounded) v = FN(rounded)(type, v);     \
      }                                               \
      v += FN(ld)(type, r, I, K);                     \
      V kept = FN(st)(type, s, I, K, v);              \
      if (!unrounded) v = kept;                       \
    }                                                 \
    if (h) FN(st)(F32, h, I, K, v);                   \
    if (mode == FN(CENTRED)) v -= pivot, lin[A] += v; \
    acc[A] += mode == FN(SUM) ? v : v * v;            \
  } while (0)
#define CLEAR(A) acc[A] = lin[A] = (V){0}
  for (long long i = 0; i < n;) {
    long long stop = n - i > 32 * W ? i + 32 * W : n;
    CLEAR(0), CLEAR(1), CLEAR(2), CLEAR(3);
    for (; i + 4 * W <= stop; i += 4 * W) {
      TERM(0, i, W);
      TERM(1, i + W, W);
      TERM(2, i + 2 * W, W);
      TERM(3, i + 3 * W, W);
    }
    if (i < stop) {
      for (; i + W <= n; i += W) TERM(0, i, W);
      if (i < n) {
        V before = lin[1], squares = acc[1];
        TERM(1, i, n - i);
        for (long long k = n - i; k < W; k++)
          acc[1][k] = squares[k], lin[1][k] = before[k]; /* behind the row lies -pivot */
        i = n;
      }
    }
    total += __builtin_convertvector((acc[0] + acc[1]) + (acc[2] + acc[3]), D);
    if (mode == FN(CENTRED)) first += __builtin_convertvector((lin[0] + lin[1]) + (lin[2] + lin[3]), D);
  }
#undef TERM
#undef CLEAR
  if (mode == FN(CENTRED)) *linear = FN(lanes)(&first);
  return FN(lanes)(&total);
}

/* out = affine(rstd * (h - pivot - rest)) [+ res], with a rounding where the types ask for one. */
static INLINE void FN(scale)(int first, int affine, int result, int layer, const float *h, float pivot, float rest,
                             float rstd, const float *w, const float *b, const void *res, void *out, long long n) {
  int last = affine == result && !res; /* what is stored is rounded anyway */
#define ELEMENTS(I, K)                                                                        \
  do {                                                                                        \
    V v = FN(ld)(F32, h, I, K);                                                               \
    if (layer) v = v - pivot - rest;                                                          \
    v = FN(rounded)(first, v * rstd);                                                         \
    if (w) v *= FN(ld)(F32, w, I, K);                                                         \
    if (w && (b || !last)) v = FN(rounded)(affine, v);                                        \
    if (b) v += FN(ld)(F32, b, I, K);                                                         \
    if (b && !last) v = FN(rounded)(affine, v);                                               \
    if (res) v = (affine == result ? v : FN(rounded)(result, v)) + FN(ld)(result, res, I, K); \
    FN(st)(result, out, I, K, v);                                                             \
  } while (0)
  long long i = 0;
  for (; i + W <= n; i += W) ELEMENTS(i, W);
  if (i < n) ELEMENTS(i, n - i);
#undef ELEMENTS
}

/* The statistics of a row in a narrow type, where the model itself computes in it: each step rounded; h becomes n. */
static void FN(narrow)(int type, int layer, float eps, float *h, long long n) {
#define ROUND1(VALUE) (FN(rounded)(type, (V){0} + (float)(VALUE))[0])
#define EACH(...)                        \
  for (long long i = 0; i < n; i += W) { \
    long long k = n - i < W ? n - i : W; \
    V v = FN(ld)(F32, h, i, k);          \
    __VA_ARGS__;                         \
  }
  EACH(FN(st)(F32, h, i, k, FN(rounded)(type, v)))
  if (layer) {
    float mean = ROUND1(FN(sum)(F32, FN(SUM), h, NULL, NULL, 0, 0, NULL, NULL, n, NULL) / (double)n);
    EACH(FN(st)(F32, h, i, k, FN(rounded)(type, v - mean)))
  }
  double total = 0;
  EACH(D q = __builtin_convertvector(FN(rounded)(type, v * v), D); total += FN(lanes)(&q)) /* zeros behind the row */
  float root = ROUND1(sqrtf(ROUND1(ROUND1(total / (double)n) + ROUND1(eps))));
  EACH(FN(st)(F32, h, i, k, FN(rounded)(type, v / root)))
#undef EACH
#undef ROUND1
}

/* [s = x [+ more] + r,] out = norm(x or s) [+ res], one row. `type` is that of x. */
static void FN(norm)(const Spec *spec, int type, const void *x, const void *r, const float *more, void *s,
                     const float *w, const float *b, const void *res, void *out, long long n, float eps,
                     float *scratch) {
  const float *h = scratch;
  float pivot = 0, rest = 0, rstd = 1;
  double total = 0;
  int exact = spec->compute == F32, layer = spec->layer && exact;
#define SUM(T, R, M, U, S, H)                                       \
  (spec->layer ? FN(sum)(T, FN(SUM), x, R, M, 0, U, S, H, n, NULL) \
               : FN(sum)(T, FN(SQUARES), x, R, M, 0, U, S, H, n, NULL))
#define ADD(T, U, H) (more ? SUM(T, r, more, U, s, H) : SUM(T, r, NULL, U, s, H))
#define READ(T) (!r ? SUM(T, NULL, NULL, 0, NULL, scratch) : spec->unrounded ? ADD(T, 1, scratch) : ADD(T, 0, scratch))
  if (type == F32) { /* the row itself, just read or written, is in the cache */
    h = r ? s : x;
    total = r ? ADD(F32, 0, NULL) : SUM(F32, NULL, NULL, 0, NULL, NULL);
  } else {
    total = type == F16 ? READ(F16) : READ(BF16);
  }
#undef READ
#undef ADD
#undef SUM
  if (!exact) { /* x is of this type, too: nothing is narrowed before it is normalised */
    FN(narrow)(spec->compute, spec->layer, eps, scratch, n);
  } else {
    if (layer) { /* the mean in two parts: what its rounding leaves is seen, and taken away, in the second pass */
      double left;
      pivot = (float)(total / (double)n);
      total = FN(sum)(F32, FN(CENTRED), h, NULL, NULL, pivot, 0, NULL, NULL, n, &left);
      left /= (double)n;
      rest = (float)left;
      total -= (double)n * left * left;
    }
    rstd = (float)(1 / sqrt(total / (double)n + (double)eps));
  }
  int first = spec->first ? type : F32, affine = nf_affine(spec), result = spec->result;
#define SCALE(F, A, R)                                                         \
  if (first == F && affine == A && result == R) {                              \
    if (layer) FN(scale)(F, A, R, 1, h, pivot, rest, rstd, w, b, res, out, n); \
    else FN(scale)(F, A, R, 0, h, 0, 0, rstd, w, b, res, out, n);              \
    return;                                                                    \
  }
  SCALE(F32, F32, F32)
  SCALE(F16, F16, F16)
  SCALE(BF16, BF16, BF16)
  SCALE(F32, F32, F16)
  SCALE(F32, F32, BF16)
  SCALE(F16, F32, F32)
  SCALE(BF16, F32, F32)
#undef SCALE
  FN(scale)(first, affine, result, layer, h, pivot, rest, rstd, w, b, res, out, n);
}

static void FN(rows)(const Spec *spec, const Args *a, long long begin, long long end, float *scratch) {
  static const int size[] = {4, 2, 2};
  int in = size[spec->x], out = size[spec->result];
  const float *w = a->w, *b = a->b, *w2 = a->w2, *b2 = a->b2, *more = a->x_bias;
  for (long long i = begin; i < end; i++) {
    long long n = a->n;
    const char *x = (const char *)a->x + i * n * in;
    char *s = (char *)a->s + i * n * out, *y = (char *)a->y + i * n * out;
    switch (spec->op) {
    case OP_ADD_NORM:
      s = (char *)a->s + i * n * in;
      FN(norm)(spec, spec->x, x, (const char *)a->r + i * n * in, more, s, w, b, NULL, y, n, a->eps,
               scratch);
      break;
    case OP_NORM_ADD:
      FN(norm)(spec, spec->x, x, NULL, NULL, NULL, w, b, (const char *)a->r + i * n * out, s, n, a->eps, scratch);
      break;
    case OP_NORM_ADD_NORM:
      FN(norm)(spec, spec->x, x, NULL, NULL, NULL, w, b, (const char *)a->r + i * n * out, s, n, a->eps, scratch);
      FN(norm)(spec, spec->result, s, NULL, NULL, NULL, w2, b2, NULL, y, n, a->eps, scratch);
      break;
    default:
      if (i < a->m) {
        FN(norm)(spec, spec->x, x, NULL, NULL, NULL, w, b, NULL, y, n, a->eps, scratch);
      } else {
        n = a->n2;
        FN(norm)(spec, spec->x, (const char *)a->x2 + (i - a->m) * n * in, NULL, NULL, NULL, w2, b2, NULL,
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
