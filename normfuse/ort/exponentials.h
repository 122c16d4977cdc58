/* Rows of a softmax for one instruction set: see vectors.h. */

/* a * b + c, rounded once where the processor does that. */
static INLINE V FN(fma)(V a, V b, V c) {
#ifdef INTEL
  return (V)INTEL(fmadd_ps)((FLOATS)a, (FLOATS)b, (FLOATS)c);
#else
  return a * b + c;
#endif
}

/* The larger; b where one of them is no number. */
static INLINE V FN(larger)(V a, V b) {
#ifdef INTEL
  return (V)INTEL(max_ps)((FLOATS)a, (FLOATS)b);
#else
  return (V)PICK(a > b, (U)a, (U)b);
#endif
}

/* The largest of all lanes, and their sum: an intrinsic, where there is one, takes them by halves. */
static INLINE float FN(largest)(V v) {
#ifdef REDUCE
  return REDUCE(max_ps)((FLOATS)v);
#else
  float found = v[0];
  for (int k = 1; k < W; k++) found = v[k] > found ? v[k] : found;
  return found;
#endif
}

static INLINE double FN(total)(V v) {
#ifdef REDUCE
  return REDUCE(add_ps)((FLOATS)v);
#else
  D wide = __builtin_convertvector(v, D);
  return FN(lanes)(&wide);
#endif
}

/* e^v for v <= 0: 2^k e^t with |t| <= ln(2) / 2 and a polynomial, which errs by an ulp; 0 below -87. */
static INLINE V FN(exponential)(V v) {
  V shifted = FN(fma)(v, (V){0} + 0x1.715476p0f, (V){0} + 0x1.8p23f), k = shifted - 0x1.8p23f; /* rounded: to an integer */
  V t = FN(fma)(k, (V){0} - 0x1.62e4p-1f, v); /* ln(2) in two parts; k times the first is exact */
  t = FN(fma)(k, (V){0} - 0x1.7f7d1cp-20f, t);
  V p = (V){0} + 0x1.a0d2cep-13f; /* Cephes, expf */
  p = FN(fma)(p, t, (V){0} + 0x1.6e879cp-10f);
  p = FN(fma)(p, t, (V){0} + 0x1.11121ep-7f);
  p = FN(fma)(p, t, (V){0} + 0x1.555382p-5f);
  p = FN(fma)(p, t, (V){0} + 0x1.555554p-3f);
  p = FN(fma)(p, t, (V){0} + 0.5f);
  p = FN(fma)(p, t * t, t) + 1;
  U made = (U)p + ((U)shifted << 23);
  return (V)PICK(v != v, (U)v, made & (U)(v >= -87.0f));
}

/* K elements of x + r from the i-th on, those of r alike without a step. */
static INLINE V FN(masked)(int type, const void *x, const void *r, int r_step, V number, long long i, long long k) {
  V v = FN(ld)(type, x, i, k);
  if (r) v += r_step ? FN(ld)(type, r, i, k) : number;
  return v;
}

static INLINE void FN(softmax_row)(int type, const void *x, const void *r, int r_step, void *y, long long n, float *h) {
  const float lowest = -0x1.fffffep127f;
  V most[4], sums[4], v = {0}, number = {0};
  if (r && !r_step) number += FN(ld)(type, r, 0, 1)[0];
#define KEEP(A, I, VALUE) v = VALUE, FN(st)(F32, h, I, W, v), most[A] = FN(larger)(v, most[A])
#define READ(A, I) KEEP(A, I, FN(masked)(type, x, r, r_step, number, I, W))
  for (int a = 0; a < 4; a++) most[a] = (V){0} + lowest, sums[a] = (V){0};
  long long i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    READ(0, i);
    READ(1, i + W);
    READ(2, i + 2 * W);
    READ(3, i + 3 * W);
  }
  for (; i + W <= n; i += W) READ(0, i);
  if (i < n) {
    V last = FN(masked)(type, x, r, r_step, number, i, n - i);
    for (long long k = n - i; k < W; k++) last[k] = -__builtin_inff(); /* behind the row: e^that is 0 */
    KEEP(0, i, last);
  }
#undef READ
#undef KEEP
  float largest = FN(largest)(FN(larger)(FN(larger)(most[0], most[1]), FN(larger)(most[2], most[3])));
  double total = 0;
  for (i = 0; i < n;) { /* in float over at most 16 values a lane, from there in double */
    long long stop = n - i > 64 * W ? i + 64 * W : n;
    for (int a = 0; a < 4; a++) sums[a] = (V){0};
#define TERM(A, I) v = FN(exponential)(FN(ld)(F32, h, I, W) - largest), FN(st)(F32, h, I, W, v), sums[A] += v
    for (; i + 4 * W <= stop; i += 4 * W) TERM(0, i), TERM(1, i + W), TERM(2, i + 2 * W), TERM(3, i + 3 * W);
    for (; i < stop; i += W) TERM(0, i);
#undef TERM
    total += FN(total)((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  float scale = (float)(1 / total);
  if (type == F32 && total == 0) { /* there is nothing but -inf */
    for (i = 0; i < n; i += W) FN(st)(F32, h, i, W, (V){0} + 1);
    scale = 1 / (float)n;
  }
#define GIVE(K) v = FN(ld)(F32, h, i, W) * scale, FN(st)(type, y, i, K, (V)((U)v & ~(U)(v < 0x1p-126f)))
  for (i = 0; i + W <= n; i += W) GIVE(W);
  if (i < n) GIVE(n - i);
#undef GIVE
}

static void FN(softmax)(int type, const void *x, const void *r, int r_step, void *y, long long n, float *scratch) {
#define ROWS_OF(T)                                                              \
  if (type == T) {                                                              \
    if (!r) FN(softmax_row)(T, x, NULL, 0, y, n, scratch);                      \
    else if (r_step) FN(softmax_row)(T, x, r, 1, y, n, scratch);                \
    else FN(softmax_row)(T, x, r, 0, y, n, scratch);                            \
  }
  ROWS_OF(F32)
  ROWS_OF(F16)
#undef ROWS_OF
}
