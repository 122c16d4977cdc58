/* One run of a softmax over the last axis, of scale * x or of scale * x + mask, where each may have sizes of 1 that the other
 * has not. */
#include "kernel.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { SHORT_ROW = 4096, BEHIND = 16 }; /* what of a row fits on the stack of any thread, and the room behind it */

static const int BYTES[] = {4, 2, 2};

typedef struct {
  const char *data;
  int type;
  float by;
  int64_t stride[MAX_RANK]; /* in elements, 0 where its size is 1 and that of the result is not */
} Operand;

typedef struct {
  int half, type;
  Operand x, mask; /* x has whole rows, a mask of whole rows is float */
  char *y; /* of `type` */
  Tensor shape; /* of the result */
  int64_t n, rows, block;
  atomic_int failed;
} Work;

static const void *row(const Work *work, const Operand *of, const int64_t *at) {
  int64_t offset = 0;
  for (size_t d = 0; d + 1 < work->shape.rank; d++) offset += at[d] * of->stride[d];
  return of->data ? of->data + offset * BYTES[of->type] : NULL;
}

static void part(void *data, size_t i) {
  Work *work = data;
  float few[SHORT_ROW + BEHIND], *scratch = few;
  int64_t begin = (int64_t)i * work->block, end = begin + work->block, at[MAX_RANK], rest = begin;
  if (end > work->rows) end = work->rows;
  if (work->n > SHORT_ROW) scratch = malloc((size_t)(work->n + BEHIND) * sizeof *scratch);
  if (!scratch) {
    atomic_store(&work->failed, 1);
    return;
  }
  size_t leading = work->shape.rank - 1;
  for (size_t d = leading; d-- > 0; rest /= work->shape.dims[d]) at[d] = rest % work->shape.dims[d];
  for (; begin < end; begin++) {
    const void *mask = row(work, &work->mask, at);
    float number = 0; /* one for the whole row */
    if (mask && !work->mask.stride[leading]) {
      nf_cpu_load(work->mask.type, mask, &number, 1);
      number *= work->mask.by, mask = NULL;
    }
    nf_cpu_softmax(work->x.type, row(work, &work->x, at), work->x.by, mask, number, work->half, work->type,
                   work->y + begin * work->n * BYTES[work->type], work->n, scratch);
    for (size_t d = leading; d-- > 0; at[d] = 0)
      if (++at[d] < work->shape.dims[d]) break;
  }
  if (scratch != few) free(scratch);
}

/* The strides of an operand in the result. */
static void place(const Tensor *t, int type, float by, const Tensor *result, Operand *out) {
  int64_t stride = 1;
  size_t missing = result->rank - t->rank;
  out->data = t->data, out->type = type, out->by = by;
  memset(out->stride, 0, sizeof out->stride);
  for (size_t d = t->rank; d-- > 0; stride *= t->dims[d])
    if (t->dims[d] != 1) out->stride[missing + d] = stride;
}

/* The size that two sizes of a dimension give together, -1 where they do not fit. */
static int64_t together(int64_t a, int64_t b) { return a == b || b == 1 ? a : a == 1 ? b : -1; }

OrtStatus *nf_softmax(const Kernel *k, OrtKernelContext *context) {
  Work work = {.half = k->op->spec.half, .type = k->op->spec.x};
  Tensor x, mask = {.rank = 0};
  TRY(nf_input(k, context, 0, "x", &x));
  if (k->op->inputs > 1) TRY(nf_input(k, context, 1, "mask", &mask));
  Tensor *shape = &work.shape;
  shape->rank = x.rank > mask.rank ? x.rank : mask.rank;
  if (!shape->rank) return nf_fail(k->api, ORT_INVALID_ARGUMENT, "normfuse.%s: x has no dimension", k->op->name);
  work.rows = 1;
  for (size_t d = shape->rank; d-- > 0;) {
    size_t behind = shape->rank - d; /* counted from the last, which is 1 */
    int64_t a = behind > x.rank ? 1 : x.dims[x.rank - behind], b = behind > mask.rank ? 1 : mask.dims[mask.rank - behind];
    int64_t size = shape->dims[d] = together(a, b);
    if (size < 0)
      return nf_fail(k->api, ORT_INVALID_ARGUMENT, "normfuse.%s: dimension %zu from the last is %lld in x, %lld in the mask",
                     k->op->name, behind, (long long)a, (long long)b);
    if (behind > 1) work.rows *= size;
    else work.n = size;
  }
  void *y;
  TRY(nf_output(k, context, 0, shape, &y));
  if (!work.rows || !work.n) return NULL;
  work.y = y;
  /* a sum is the same in either order: the first has whole rows, where one of them has */
  int swapped = x.rank ? x.dims[x.rank - 1] != work.n : work.n != 1;
  Operand *own = swapped ? &work.mask : &work.x, *other = swapped ? &work.x : &work.mask;
  place(&x, work.type, k->scale, shape, own);
  if (k->op->inputs > 1) place(&mask, F32, 1, shape, other);
  work.block = (GRAIN + work.n - 1) / work.n;
  int64_t parts = (work.rows + work.block - 1) / work.block;
  if (parts == 1) part(&work, 0);
  else TRY(ORT(k->api, KernelContext_ParallelFor)(context, part, (size_t)parts, 0, &work));
  if (!atomic_load(&work.failed)) return NULL;
  return nf_fail(k->api, ORT_FAIL, "normfuse.%s: no memory for a row of %lld elements", k->op->name, (long long)work.n);
}
