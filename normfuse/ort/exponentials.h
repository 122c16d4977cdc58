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

/* The largest of all lanes, and their sum, by halves. */
static INLINE float FN(largest)(V v) {
#ifdef REDUCE
  return REDUCE(max_ps)((FLOATS)v);
#else
  float f[W];
  __builtin_memcpy(f, &v, sizeof v);
  for (int half = W / 2; half; half /= 2)
    for (int k = 0; k < half; k++) f[k] = f[k] > f[k + half] ? f[k] : f[k + half];
  return f[0];
#endif
}

static INLINE float FN(total)(V v) {
#ifdef REDUCE
  return REDUCE(add_ps)((FLOATS)v);
#else
  float f[W];
  __builtin_memcpy(f, &v, sizeof v);
  for (int half = W / 2; half; half /= 2)
    for (int k = 0; k < half; k++) f[k] += f[k + half];
  return f[0];
#endif
}

/* e^v for v <= 0: 2^k e^t with |t| <= ln(2) / 2 and a polynomial, which errs by an ulp. At -88 and below k is -127, and 0 are
 * the bits of 2^k. */
static INLINE V FN(exponential)(V v) {
  const V rounding = (V){0} + 0x1.8000fep23f; /* to an integer, which the lowest bits have with 127, as an exponent has */
  v = FN(larger)((V){0} - 88, v);
  V shifted = FN(fma)(v, (V){0} + 0x1.715476p0f, rounding), k = shifted - rounding;
  V t = FN(fma)(k, (V){0} - 0x1.62e4p-1f, v); /* ln(2) in two parts; k times the first is exact */
  t = FN(fma)(k, (V){0} - 0x1.7f7d1cp-20f, t);
  V p = (V){0} + 0x1.a0d2cep-13f; /* Cephes, expf */
  p = FN(fma)(p, t, (V){0} + 0x1.6e879cp-10f);
  p = FN(fma)(p, t, (V){0} + 0x1.11121ep-7f);
  p = FN(fma)(p, t, (V){0} + 0x1.555382p-5f);
  p = FN(fma)(p, t, (V){0} + 0x1.555554p-3f);
  p = FN(fma)(p, t, (V){0} + 0.5f);
  p = FN(fma)(p, t * t, t) + 1;
  return p * (V)((U)shifted << 23);
}

static INLINE void FN(softmax_row)(const float *x, float by, const float *r, float number, int half, float *y, long long n,
                                   float *h) {
  const float lowest = -0x1.fffffep127f;
  const int kept = r || by != 1 || number != 0; /* in h, else they are read from x again */
  V most[2] = {(V){0} + lowest, (V){0} + lowest}, v;
  double total = 0;
  long long i = 0, whole = n / W * W;
#define READ(I, K) v = FN(ld)(F32, x, I, K) * by, v += r ? FN(ld)(F32, r, I, K) : (V){0} + number
#define TAKE(A, I)                                      \
  {                                                     \
    READ(I, W);                                         \
    if (kept) FN(st)(F32, h, I, W, v);                  \
    most[A] = FN(larger)(v, most[A]);                   \
  }
  for (; i + 2 * W <= whole; i += 2 * W) {
    TAKE(0, i)
    TAKE(1, i + W)
  }
  if (i < whole) TAKE(0, i)
#undef TAKE
  if (whole < n) {
    READ(whole, n - whole);
    for (long long k = n - whole; k < W; k++) v[k] = -__builtin_inff(); /* behind the row: e^that is 0 */
    FN(st)(F32, h, whole, W, v);
    most[0] = FN(larger)(v, most[0]);
  }
#undef READ
  float largest = FN(largest)(FN(larger)(most[0], most[1]));
  const float *from = kept ? h : x;
/* What is behind the row, which is the next row as a rule: to read it would wait, this computes. */
#define AHEAD(P, I) __builtin_prefetch(P + n + I)
#define TERM(FROM, I) v = FN(exponential)(FN(ld)(F32, FROM, I, W) - largest), FN(st)(F32, h, I, W, v)
  for (i = 0; i < whole;) { /* in float over at most 16 values a lane, from there in double */
    long long stop = whole - i > 32 * W ? i + 32 * W : whole;
    V sums[2] = {{0}, {0}};
    for (; i + 2 * W <= stop; i += 2 * W) {
      AHEAD(x, i);
      __builtin_prefetch(y + i, 1);
      if (r) AHEAD(r, i);
      TERM(from, i), sums[0] += v;
      TERM(from, i + W), sums[1] += v;
    }
    if (i < stop) TERM(from, i), sums[0] += v, i += W;
    total += FN(total)(sums[0] + sums[1]);
  }
  if (whole < n) TERM(h, whole), total += FN(total)(v);
#undef TERM
#undef AHEAD
  float scale = (float)(1 / total);
  if (!half && total == 0) { /* there is nothing but -inf */
    for (i = 0; i < n; i += W) FN(st)(F32, h, i, W, (V){0} + 1);
    scale = 1 / (float)n;
  }
#define GIVE(K) v = FN(ld)(F32, h, i, W) * scale, FN(st)(F32, y, i, K, (V)((U)v & ~(U)(v < 0x1p-126f)))
  for (i = 0; i < whole; i += W) GIVE(W);
  if (i < n) GIVE(n - i);
#undef GIVE
}

static void FN(softmax)(int from, const void *x, float by, const float *r, float number, int half, int to, void *y,
                        long long n, float *scratch) {
  const float *in = x;
  float *out = y;
#define WHOLE (n - i < W ? n - i : W)
  if (from == F16) {
    for (long long i = 0; i < n; i += W) FN(st)(F32, scratch, i, W, FN(ld)(F16, x, i, WHOLE));
    in = scratch;
  }
  if (to == F16) out = scratch;
  if (r && by == 1) FN(softmax_row)(in, 1, r, 0, half, out, n, scratch);
  else if (r) FN(softmax_row)(in, by, r, 0, half, out, n, scratch);
  else if (by == 1 && number == 0) FN(softmax_row)(in, 1, NULL, 0, half, out, n, scratch);
  else FN(softmax_row)(in, by, NULL, number, half, out, n, scratch);
  if (to == F16)
    for (long long i = 0; i < n; i += W) FN(st)(F16, y, i, WHOLE, FN(ld)(F32, scratch, i, WHOLE));
#undef WHOLE
}
