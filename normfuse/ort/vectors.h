/* Vectors for one instruction set: `cpu.c` includes this file, and those of the operators, once for each, with FN(name)
 * and W defined, and with INTEL(name) where there are intrinsics for vectors of that width.
 *
 * Vectors are those of GCC and clang, which run on every machine. */

typedef float V __attribute__((vector_size(4 * W)));
typedef double D __attribute__((vector_size(8 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
static INLINE V FN(from_f16)(H half) {
#ifdef INTEL
  return (V)INTEL(cvtph_ps)((HALVES)half);
#else
  U u = __builtin_convertvector(half, U), magnitude = (u & 0x7fff) << 13;
  U bits = (U)((V)magnitude * 0x1p112f); /* exact for subnormals too */
  bits |= (U)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return (V)(bits | (u & 0x8000) << 16);
#endif
}

static INLINE H FN(to_f16)(V v) {
#ifdef INTEL
  return (H)INTEL(cvtps_ph)((FLOATS)v, _MM_FROUND_TO_NEAREST_INT);
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

/* Store k elements; the values that are then there. */
static INLINE V FN(st)(int type, void *to, long long i, long long k, V v) {
  if (type == F32) {
    if (k == W) __builtin_memcpy((float *)to + i, &v, sizeof v);
    else __builtin_memcpy((float *)to + i, &v, (size_t)k * 4);
    return v;
  }
  H half = type == F16 ? FN(to_f16)(v) : FN(to_bf16)(v);
  if (k == W) __builtin_memcpy((uint16_t *)to + i, &half, sizeof half);
  else __builtin_memcpy((uint16_t *)to + i, &half, (size_t)k * 2);
  return type == F16 ? FN(from_f16)(half) : FN(from_bf16)(half);
}

static INLINE V FN(rounded)(int type, V v) {
  return type == F32 ? v : type == F16 ? FN(from_f16)(FN(to_f16)(v)) : FN(from_bf16)(FN(to_bf16)(v));
}

static INLINE double FN(lanes)(const D *v) {
  double total = 0;
  for (int i = 0; i < W; i++) total += (*v)[i];
  return total;
}
