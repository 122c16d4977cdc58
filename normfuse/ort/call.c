/* One run of an operator. What a function is not written for is an error that names operator and argument: a model made
 * by hand may hold anything. */
#include "kernel.h"

#include <math.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TILE = 16 };

static const int BYTES[] = {4, 2, 2};

OrtStatus *nf_fail(OrtApi *api, int code, const char *format, ...) {
  char message[400];
  va_list values;
  va_start(values, format);
  vsnprintf(message, sizeof message, format, values);
  va_end(values);
  return ORT(api, CreateStatus)(code, message);
}

/* The parameters that an operator has, in the order of its inputs: x_bias, weight1, bias1, weight2, bias2. */
static void parameters(const Spec *spec, int has[PARAMETERS]) {
  int two = spec->op >= OP_NORM_ADD_NORM;
  has[0] = spec->has_x_bias, has[1] = spec->has_w1, has[2] = spec->has_b1;
  has[3] = two && spec->has_w2, has[4] = two && spec->has_b2;
}

static int type_of(const Spec *spec, int parameter) { return parameter ? nf_affine(spec) : spec->x; }

static OrtStatus *shape_of(const Kernel *k, const OrtValue *value, const char *argument, Tensor *out) {
  OrtShape *shape = NULL;
  TRY(ORT(k->api, GetTensorTypeAndShape)(value, &shape));
  OrtStatus *status = ORT(k->api, GetDimensionsCount)(shape, &out->rank);
  if (!status && out->rank > MAX_RANK)
    status = nf_fail(k->api, ORT_NOT_IMPLEMENTED, "normfuse.%s: %s has %zu dimensions, expected at most %d",
                     k->op->name, argument, out->rank, MAX_RANK);
  if (!status) status = ORT(k->api, GetDimensions)(shape, out->dims, out->rank);
  ORT(k->api, ReleaseTensorTypeAndShapeInfo)(shape);
  return status;
}

OrtStatus *nf_input(const Kernel *k, const OrtKernelContext *context, size_t i, const char *argument, Tensor *out) {
  const OrtValue *value = NULL;
  TRY(ORT(k->api, KernelContext_GetInput)(context, i, &value));
  if (!value) return nf_fail(k->api, ORT_INVALID_ARGUMENT, "normfuse.%s: %s is missing", k->op->name, argument);
  TRY(shape_of(k, value, argument, out));
  return ORT(k->api, GetTensorMutableData)((OrtValue *)value, &out->data);
}

OrtStatus *nf_output(const Kernel *k, OrtKernelContext *context, size_t i, const Tensor *like, void **out) {
  OrtValue *value = NULL;
  TRY(ORT(k->api, KernelContext_GetOutput)(context, i, like->dims, like->rank, &value));
  return ORT(k->api, GetTensorMutableData)(value, out);
}

static const char *text(const Tensor *t, char *out, size_t size) {
  size_t used = (size_t)snprintf(out, size, "(");
  for (size_t i = 0; i < t->rank && used < size; i++)
    used += (size_t)snprintf(out + used, size - used, "%s%lld", i ? ", " : "", (long long)t->dims[i]);
  if (used < size) snprintf(out + used, size - used, ")");
  return out;
}

static OrtStatus *like(const Kernel *k, const Tensor *x, const Tensor *t, const char *argument) {
  if (x->rank == t->rank && !memcmp(x->dims, t->dims, x->rank * sizeof *x->dims)) return NULL;
  char want[160], have[160];
  return nf_fail(k->api, ORT_INVALID_ARGUMENT, "normfuse.%s: %s has shape %s, expected that of x, %s", k->op->name,
                 argument, text(t, have, sizeof have), text(x, want, sizeof want));
}

/* The rows of a tensor: `m` of length `n`; element j of a row lies `offset[j]` behind its first, or j where it is NULL.
 */
typedef struct {
  long long m, n;
  int trailing, reduced[MAX_RANK];
  int64_t stride[MAX_RANK];
} Rows;

static OrtStatus *rows_of(const Kernel *k, const Tensor *x, const char *argument, Rows *rows) {
  int64_t stride = 1;
  for (size_t d = x->rank; d-- > 0; stride *= x->dims[d]) rows->stride[d] = stride, rows->reduced[d] = !k->axes_count;
  for (size_t i = 0; i < k->axes_count; i++) {
    int64_t axis = k->axes[i] + (k->axes[i] < 0 ? (int64_t)x->rank : 0);
    if (axis < 0 || axis >= (int64_t)x->rank)
      return nf_fail(k->api, ORT_INVALID_ARGUMENT, "normfuse.%s: %s has %zu dimensions, expected one with axis %lld",
                     k->op->name, argument, x->rank, (long long)k->axes[i]);
    rows->reduced[axis] = 1;
  }
  rows->m = rows->n = rows->trailing = 1;
  for (size_t d = 0; d < x->rank; d++) {
    *(rows->reduced[d] ? &rows->n : &rows->m) *= x->dims[d];
    if (d && rows->reduced[d - 1] && !rows->reduced[d]) rows->trailing = 0;
  }
  return NULL;
}

/* Advance over the dimensions with reduced == `which`; the offset of the next element, from that of this one. */
static int64_t next(const Tensor *x, const Rows *rows, int which, int64_t *at, int64_t offset) {
  for (size_t d = x->rank; d-- > 0;) {
    if (rows->reduced[d] != which) continue;
    offset += rows->stride[d];
    if (++at[d] < x->dims[d]) break;
    offset -= at[d] * rows->stride[d];
    at[d] = 0;
  }
  return offset;
}

/* The i-th weight or bias, `input_index` among the inputs, as n floats in the order of a row (on CUDA in their own
 * type): where they lie, or in memory that becomes the caller's by `own`. */
static OrtStatus *parameter(const Kernel *k, const OrtKernelContext *context, int i, size_t input_index,
                            const Tensor *x, const Rows *rows, const void **out, float **own) {
  static const char *const names[][PARAMETERS] = {{"x_bias", "weight", "bias"},
                                                  {"", "weight1", "bias1", "weight2", "bias2"}};
  const char *argument = names[k->op->spec.op >= OP_NORM_ADD_NORM][i];
  int type = type_of(&k->op->spec, i), cuda = k->op->cuda;
  Tensor given;
  const Tensor *t = &k->fixed[i].tensor;
  if (!k->fixed[i].constant) {
    TRY(nf_input(k, context, input_index, argument, &given));
    t = &given;
  }
  int64_t stride = 1, strides[MAX_RANK] = {0};
  for (size_t d = t->rank, a = x->rank; d-- > 0; stride *= t->dims[d]) {
    int along = a > 0 && rows->reduced[--a] && t->dims[d] == x->dims[a];
    if (!along && (t->dims[d] != 1 || t->rank > x->rank)) {
      char have[160], want[160];
      return nf_fail(k->api, ORT_INVALID_ARGUMENT,
                     "normfuse.%s: %s has shape %s, expected the %lld elements of a normalised row of x, %s",
                     k->op->name, argument, text(t, have, sizeof have), rows->n, text(x, want, sizeof want));
    }
    if (along) strides[a] = stride;
  }
  int whole = stride == rows->n;
  *out = k->fixed[i].floats ? k->fixed[i].floats : t->data;
  if (whole && (type == F32 || cuda || k->fixed[i].floats)) return NULL;
  if (cuda)
    return nf_fail(k->api, ORT_NOT_IMPLEMENTED, "normfuse.%s: %s has %lld elements, expected the %lld of a row on CUDA",
                   k->op->name, argument, (long long)stride, rows->n);
  float *floats = *own = malloc((size_t)(rows->n + 1) * sizeof *floats);
  if (!floats) return nf_fail(k->api, ORT_FAIL, "normfuse.%s: no memory for %s", k->op->name, argument);
  *out = floats;
  if (whole) return nf_cpu_load(type, t->data, floats, rows->n), NULL;
  Rows along = *rows;
  memcpy(along.stride, strides, sizeof strides);
  int64_t at[MAX_RANK] = {0}, offset = 0;
  for (long long j = 0; j < rows->n; j++, offset = next(x, &along, 1, at, offset))
    nf_cpu_load(type, (char *)t->data + offset * BYTES[type], floats + j, 1);
  return NULL;
}

/* -- the work of a call, in parts that any thread may take ----------------------------------------------------------
 */

typedef struct {
  const Spec *spec;
  Args args;
  long long rows, block; /* all rows, and rows a part */
  const Tensor *x;       /* with `shape`: rows that do not lie in one piece, tiles of TILE of them */
  const Rows *shape;
  atomic_int failed;
} Work;

/* Copy rows that begin at `first` between a tensor and `count` rows in one piece: x to them (`gather`), or them to y.
 */
static void transpose(const Work *work, const int64_t *first, long long count, void *rows, int bytes, int gather) {
  const void *x = work->args.x;
  void *y = work->args.y;
  int64_t at[MAX_RANK] = {0}, offset = 0;
  long long n = work->shape->n;
  int together = first[count - 1] - first[0] == count - 1; /* they begin side by side: `first` only grows */
  for (long long j = 0; j < n; j++, offset = next(work->x, work->shape, 1, at, offset))
#define COPY(TYPE, PLACE)                                             \
  for (int t = 0; t < count; t++)                                     \
    if (gather) ((TYPE *)rows)[t * n + j] = ((const TYPE *)x)[PLACE]; \
    else ((TYPE *)y)[PLACE] = ((const TYPE *)rows)[t * n + j]
    if (bytes == 4 && together) COPY(uint32_t, first[0] + offset + t);
    else if (bytes == 4) COPY(uint32_t, first[t] + offset);
    else if (together) COPY(uint16_t, first[0] + offset + t);
    else COPY(uint16_t, first[t] + offset);
#undef COPY
}

/* `count` float rows that begin at `first`, side by side as they lie, each lane on its own: nothing is transposed. The
 * sums are in double, so that a row's result does not depend on the rows beside it. */
static void columns(const Work *work, const int64_t *first, long long count) {
  const Spec *spec = work->spec;
  const float *x = work->args.x, *w = work->args.w, *b = work->args.b;
  float *y = work->args.y;
  long long n = work->shape->n;
  int together = first[count - 1] - first[0] == count - 1;
  double sum[TILE] = {0}, left[TILE] = {0};
  float pivot[TILE] = {0}, rest[TILE] = {0}, rstd[TILE];
#define EACH(...)                                                                         \
  do {                                                                                    \
    int64_t at[MAX_RANK] = {0}, offset = 0;                                               \
    for (long long j = 0; j < n; j++, offset = next(work->x, work->shape, 1, at, offset)) \
      if (together && count == TILE)                                                      \
        for (int t = 0; t < TILE; t++) {                                                  \
          int64_t place = first[0] + offset + t;                                          \
          __VA_ARGS__;                                                                    \
        }                                                                                 \
      else                                                                                \
        for (int t = 0; t < count; t++) {                                                 \
          int64_t place = first[t] + offset;                                              \
          __VA_ARGS__;                                                                    \
        }                                                                                 \
  } while (0)
  if (spec->layer) {
    EACH(sum[t] += x[place]);
    for (int t = 0; t < count; t++) pivot[t] = (float)(sum[t] / (double)n), sum[t] = 0;
    EACH(float d = x[place] - pivot[t]; left[t] += d; sum[t] += (double)d * d);
  } else {
    EACH(sum[t] += (double)x[place] * x[place]);
  }
  for (int t = 0; t < count; t++) {
    left[t] /= (double)n, rest[t] = (float)left[t];
    rstd[t] = (float)(1 / sqrt((sum[t] - (double)n * left[t] * left[t]) / (double)n + (double)work->args.eps));
  }
  EACH(float v = x[place] - pivot[t] - rest[t]; v *= rstd[t]; if (w) v *= w[j]; if (b) v += b[j]; y[place] = v);
#undef EACH
}

/* Rows [begin, end) of a norm over inner axes: gathered, computed, scattered. */
static void inner_rows(const Work *work, long long begin, long long end, char *room, float *scratch) {
  const Rows *shape = work->shape;
  int in = BYTES[work->spec->x], out = BYTES[work->spec->result];
  long long n = shape->n;
  int floats = work->spec->x == F32 && work->spec->compute == F32 && work->spec->result == F32;
  char *from = room, *to = room + TILE * n * in;
  int64_t at[MAX_RANK] = {0}, start = 0;
  long long rest = begin;
  for (size_t d = work->x->rank; d-- > 0;)
    if (!shape->reduced[d]) {
      at[d] = rest % work->x->dims[d];
      rest /= work->x->dims[d];
      start += at[d] * shape->stride[d];
    }
  while (begin < end) {
    long long count = end - begin < TILE ? end - begin : TILE;
    int64_t first[TILE];
    for (int t = 0; t < count; t++, start = next(work->x, shape, 0, at, start)) first[t] = start;
    if (floats) {
      columns(work, first, count);
      begin += count;
      continue;
    }
    transpose(work, first, count, from, in, 1);
    Args args = work->args;
    args.x = from, args.y = to, args.m = count;
    nf_cpu_rows(work->spec, &args, 0, count, scratch);
    transpose(work, first, count, to, out, 0);
    begin += count;
  }
}

static void part(void *data, size_t i) {
  Work *work = data;
  long long begin = (long long)i * work->block,
            end = begin + work->block < work->rows ? begin + work->block : work->rows;
  long long n = work->args.n > work->args.n2 ? work->args.n : work->args.n2;
  float few[2048], *scratch = few; /* small enough for the stack of any thread */
  size_t bytes = work->shape ? (size_t)(TILE * n) * (size_t)(BYTES[work->spec->x] + BYTES[work->spec->result]) : 0;
  if (n * sizeof(float) + bytes > sizeof few) scratch = malloc((size_t)n * sizeof(float) + bytes);
  if (!scratch) {
    atomic_store(&work->failed, 1);
    return;
  }
  if (work->shape) inner_rows(work, begin, end, (char *)(scratch + n), scratch);
  else nf_cpu_rows(work->spec, &work->args, begin, end, scratch);
  if (scratch != few) free(scratch);
}

/* In parts of at least GRAIN elements. */
static OrtStatus *run(const Kernel *k, const OrtKernelContext *context, Work *work) {
  long long n = work->args.n > work->args.n2 ? work->args.n : work->args.n2;
  work->block = (GRAIN + n - 1) / n;
  if (work->block * 256 < work->rows) work->block = (work->rows + 255) / 256;
  long long parts = (work->rows + work->block - 1) / work->block;
  if (parts == 1) part(work, 0);
  else TRY(ORT(k->api, KernelContext_ParallelFor)(context, part, (size_t)parts, 0, work));
  if (!atomic_load(&work->failed)) return NULL;
  return nf_fail(k->api, ORT_FAIL, "normfuse.%s: no memory for a row of %lld elements", k->op->name, n);
}

OrtStatus *nf_call(const Kernel *k, OrtKernelContext *context) {
  const Spec *spec = &k->op->spec;
  int pair = spec->op == OP_QK_NORM;
  const char *first = pair ? "q" : "x";
  Tensor x, other;
  const Tensor *second = &x;
  Rows rows, more;
  const Rows *second_rows = &rows;
  Work work = {.spec = spec};
  Args *a = &work.args;
  a->eps = k->eps;
  TRY(nf_input(k, context, 0, first, &x));
  TRY(rows_of(k, &x, first, &rows));
  a->x = x.data, a->m = rows.m, a->n = rows.n;
  if (pair) {
    TRY(nf_input(k, context, 1, "k", &other));
    TRY(rows_of(k, &other, "k", &more));
    a->x2 = other.data, a->m2 = more.m, a->n2 = more.n;
    second = &other, second_rows = &more;
  } else if (spec->op != OP_NORM) {
    TRY(nf_input(k, context, 1, "residual", &other));
    TRY(like(k, &x, &other, "residual"));
    a->r = other.data;
  }
  if (k->op->cuda && !rows.trailing)
    return nf_fail(k->api, ORT_NOT_IMPLEMENTED,
                   "normfuse.%s: CUDA kernels normalise the last axes only; load the model without "
                   "the library of normfuse.ort, or on the CPU",
                   k->op->name);

  void **results[] = {spec->op == OP_NORM_ADD ? &a->s : &a->y, pair ? &a->y2 : &a->s};
  for (int i = 0; i < k->op->outputs; i++) TRY(nf_output(k, context, (size_t)i, i ? second : &x, results[i]));
  if (!a->n) a->m = 0;
  if (!a->n2) a->m2 = 0;
  work.rows = a->m + a->m2;

  const void **slots[] = {&a->x_bias, &a->w, &a->b, &a->w2, &a->b2};
  float *own[PARAMETERS] = {0};
  int has[PARAMETERS];
  parameters(spec, has);
  OrtStatus *status = NULL;
  size_t at = spec->op == OP_NORM ? 1 : 2;
  for (int i = 0; i < PARAMETERS && !status; i++)
    if (has[i])
      status = parameter(k, context, i, at++, i < 3 ? &x : second, i < 3 ? &rows : second_rows, slots[i], &own[i]);
  if (!status && work.rows) {
    if (k->op->cuda) {
      status = ORT(k->api, KernelContext_GetGPUComputeStream)(context, &a->stream);
      const char *why = status ? NULL : nf_cuda_run(spec, a);
      if (why) status = nf_fail(k->api, ORT_FAIL, "normfuse.%s: %s", k->op->name, why);
    } else {
      if (!rows.trailing) work.x = &x, work.shape = &rows;
      status = run(k, context, &work);
    }
  }
  for (int i = 0; i < PARAMETERS; i++) free(own[i]);
  return status;
}

/* Take note of a parameter that is an initializer, so that a call needs neither ask for it nor convert it. */
static OrtStatus *constant(Kernel *k, const OrtKernelInfo *info, size_t input_index, int i) {
  const OrtValue *value = NULL;
  int given = 0, type = type_of(&k->op->spec, i);
  TRY(ORT(k->api, KernelInfoGetConstantInput_tensor)(info, input_index, &given, &value));
  if (!given || !value) return NULL;
  Tensor *t = &k->fixed[i].tensor;
  TRY(shape_of(k, value, "a weight", t));
  TRY(ORT(k->api, GetTensorMutableData)((OrtValue *)value, &t->data));
  k->fixed[i].constant = 1;
  if (type == F32) return NULL;
  size_t count = 1;
  for (size_t d = 0; d < t->rank; d++) count *= (size_t)t->dims[d];
  k->fixed[i].floats = malloc((count + 1) * sizeof(float));
  if (k->fixed[i].floats) nf_cpu_load(type, t->data, k->fixed[i].floats, (long long)count);
  return NULL;
}

OrtStatus *nf_constants(Kernel *k, const OrtKernelInfo *info) {
  int has[PARAMETERS];
  parameters(&k->op->spec, has);
  size_t at = k->op->spec.op == OP_NORM ? 1 : 2;
  for (int i = 0; i < PARAMETERS; i++)
    if (has[i]) TRY(constant(k, info, at++, i));
  return NULL;
}
