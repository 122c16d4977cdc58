/* RegisterCustomOps: the operators of domain "normfuse" under every name that `normfuse rewrite` gives a function.
 *
 * ONNX Runtime prefers a registered operator to a model's own function of the same name, so an operator computes what the
 * function's body means, for everything that the function takes. */
#include "api.h"
#include "ops.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_RANK = 32, TILE = 16, GRAIN = 1 << 15, NAME = 72 };

typedef struct {
  OrtCustomOp op; /* first: ONNX Runtime hands it back */
  Spec spec;
  int cuda, inputs, outputs;
  int input[6], output[2]; /* element types */
  char name[NAME];
} Operator;

static struct {
  OrtApi *api;
  OrtDomain *all;
  Operator *operators;
  size_t count;
} library;

/* A session option: the names of the operators to register, with spaces between them; all of them without it. */
#define OPERATORS "normfuse.operators"

static const int ELEMENT[] = {ORT_FLOAT, ORT_FLOAT16, ORT_BFLOAT16};
static const int BYTES[] = {4, 2, 2};

static OrtStatus *fail(OrtApi *api, int code, const char *format, ...) {
  char message[400];
  va_list values;
  va_start(values, format);
  vsnprintf(message, sizeof message, format, values);
  va_end(values);
  return ORT(api, CreateStatus)(code, message);
}

#define TRY(CALL)                \
  do {                           \
    OrtStatus *tried = (CALL);   \
    if (tried) return tried;     \
  } while (0)

/* -- a kernel: an operator with the attributes of one node ---------------------------------------------------------- */

typedef struct {
  void *data;
  size_t rank;
  int64_t dims[MAX_RANK];
} Tensor;

typedef struct {
  const Operator *op;
  OrtApi *api;
  float eps;
  int64_t axes[MAX_RANK];
  size_t axes_count; /* 0: all of them */
  struct {           /* a weight or bias that is the same in every run, with its elements as floats if they are not */
    int constant;
    Tensor tensor;
    float *floats;
  } fixed[4];
} Kernel;

/* The parameters that an operator has, in the order of its inputs: weight1, bias1, weight2, bias2. */
static void parameters(const Spec *spec, int has[4]) {
  int two = spec->op >= OP_NORM_ADD_NORM;
  has[0] = spec->has_w1, has[1] = spec->has_b1, has[2] = two && spec->has_w2, has[3] = two && spec->has_b2;
}

static OrtStatus *shape_of(const Kernel *k, const OrtValue *value, const char *argument, Tensor *out) {
  OrtShape *shape = NULL;
  TRY(ORT(k->api, GetTensorTypeAndShape)(value, &shape));
  OrtStatus *status = ORT(k->api, GetDimensionsCount)(shape, &out->rank);
  if (!status && out->rank > MAX_RANK)
    status = fail(k->api, ORT_NOT_IMPLEMENTED, "normfuse.%s: %s has %zu dimensions, expected at most %d", k->op->name,
                  argument, out->rank, MAX_RANK);
  if (!status) status = ORT(k->api, GetDimensions)(shape, out->dims, out->rank);
  ORT(k->api, ReleaseTensorTypeAndShapeInfo)(shape);
  return status;
}

static OrtStatus *input(const Kernel *k, const OrtKernelContext *context, size_t i, const char *argument, Tensor *out) {
  const OrtValue *value = NULL;
  TRY(ORT(k->api, KernelContext_GetInput)(context, i, &value));
  if (!value) return fail(k->api, ORT_INVALID_ARGUMENT, "normfuse.%s: %s is missing", k->op->name, argument);
  TRY(shape_of(k, value, argument, out));
  return ORT(k->api, GetTensorMutableData)((OrtValue *)value, &out->data);
}

static OrtStatus *output(const Kernel *k, OrtKernelContext *context, size_t i, const Tensor *like, void **out) {
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
  return fail(k->api, ORT_INVALID_ARGUMENT, "normfuse.%s: %s has shape %s, expected that of x, %s", k->op->name, argument,
              text(t, have, sizeof have), text(x, want, sizeof want));
}

/* The rows of a tensor: `m` of length `n`; element j of a row lies `offset[j]` behind its first, or j where it is NULL. */
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
      return fail(k->api, ORT_INVALID_ARGUMENT, "normfuse.%s: %s has %zu dimensions, expected one with axis %lld",
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

/* The i-th weight or bias, `input_index` among the inputs, as n floats in the order of a row (on CUDA in their own type):
 * where they lie, or in memory that becomes the caller's by `own`. */
static OrtStatus *parameter(const Kernel *k, const OrtKernelContext *context, int i, size_t input_index, const Tensor *x,
                            const Rows *rows, const void **out, float **own) {
  static const char *const names[][4] = {{"weight", "bias"}, {"weight1", "bias1", "weight2", "bias2"}};
  const char *argument = names[k->op->spec.op >= OP_NORM_ADD_NORM][i];
  int type = nf_affine(&k->op->spec), cuda = k->op->cuda;
  Tensor given;
  const Tensor *t = &k->fixed[i].tensor;
  if (!k->fixed[i].constant) {
    TRY(input(k, context, input_index, argument, &given));
    t = &given;
  }
  int64_t stride = 1, strides[MAX_RANK] = {0};
  for (size_t d = t->rank, a = x->rank; d-- > 0; stride *= t->dims[d]) {
    int along = a > 0 && rows->reduced[--a] && t->dims[d] == x->dims[a];
    if (!along && (t->dims[d] != 1 || t->rank > x->rank)) {
      char have[160], want[160];
      return fail(k->api, ORT_INVALID_ARGUMENT,
                  "normfuse.%s: %s has shape %s, expected the %lld elements of a normalised row of x, %s", k->op->name,
                  argument, text(t, have, sizeof have), rows->n, text(x, want, sizeof want));
    }
    if (along) strides[a] = stride;
  }
  int whole = stride == rows->n;
  *out = k->fixed[i].floats ? k->fixed[i].floats : t->data;
  if (whole && (type == F32 || cuda || k->fixed[i].floats)) return NULL;
  if (cuda)
    return fail(k->api, ORT_NOT_IMPLEMENTED, "normfuse.%s: %s has %lld elements, expected the %lld of a row on CUDA",
                k->op->name, argument, (long long)stride, rows->n);
  float *floats = *own = malloc((size_t)(rows->n + 1) * sizeof *floats);
  if (!floats) return fail(k->api, ORT_FAIL, "normfuse.%s: no memory for %s", k->op->name, argument);
  *out = floats;
  if (whole) return nf_cpu_load(type, t->data, floats, rows->n), NULL;
  Rows along = *rows;
  memcpy(along.stride, strides, sizeof strides);
  int64_t at[MAX_RANK] = {0}, offset = 0;
  for (long long j = 0; j < rows->n; j++, offset = next(x, &along, 1, at, offset))
    nf_cpu_load(type, (char *)t->data + offset * BYTES[type], floats + j, 1);
  return NULL;
}

/* -- the work of a call, in parts that any thread may take ---------------------------------------------------------- */

typedef struct {
  const Spec *spec;
  Args args;
  long long rows, block; /* all rows, and rows a part */
  const Tensor *x;       /* with `shape`: rows that do not lie in one piece, tiles of TILE of them */
  const Rows *shape;
  atomic_int failed;
} Work;

/* Rows [begin, end) of a norm over inner axes: gathered, computed, scattered. */
static void inner_rows(const Work *work, long long begin, long long end, char *room, float *scratch) {
  const Rows *shape = work->shape;
  int in = BYTES[work->spec->x], out = BYTES[work->spec->result];
  long long n = shape->n;
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
    int64_t inner[MAX_RANK] = {0}, offset = 0;
    for (long long j = 0; j < n; j++, offset = next(work->x, shape, 1, inner, offset))
      for (int t = 0; t < count; t++)
        memcpy(from + (t * n + j) * in, (const char *)work->args.x + (first[t] + offset) * in, (size_t)in);
    Args args = work->args;
    args.x = from, args.y = to, args.m = count;
    nf_cpu_rows(work->spec, &args, 0, count, scratch);
    memset(inner, 0, sizeof inner);
    offset = 0;
    for (long long j = 0; j < n; j++, offset = next(work->x, shape, 1, inner, offset))
      for (int t = 0; t < count; t++)
        memcpy((char *)work->args.y + (first[t] + offset) * out, to + (t * n + j) * out, (size_t)out);
    begin += count;
  }
}

static void part(void *data, size_t i) {
  Work *work = data;
  long long begin = (long long)i * work->block, end = begin + work->block < work->rows ? begin + work->block : work->rows;
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

/* Parts of at least GRAIN elements, so that a few rows do not pay for waking other threads. */
static OrtStatus *run(const Kernel *k, const OrtKernelContext *context, Work *work) {
  long long n = work->args.n > work->args.n2 ? work->args.n : work->args.n2;
  work->block = (GRAIN + n - 1) / n;
  if (work->block * 256 < work->rows) work->block = (work->rows + 255) / 256;
  long long parts = (work->rows + work->block - 1) / work->block;
  if (parts == 1) part(work, 0);
  else TRY(ORT(k->api, KernelContext_ParallelFor)(context, part, (size_t)parts, 0, work));
  if (!atomic_load(&work->failed)) return NULL;
  return fail(k->api, ORT_FAIL, "normfuse.%s: no memory for a row of %lld elements", k->op->name, n);
}

static OrtStatus *compute(const Kernel *k, OrtKernelContext *context) {
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
  TRY(input(k, context, 0, first, &x));
  TRY(rows_of(k, &x, first, &rows));
  a->x = x.data, a->m = rows.m, a->n = rows.n;
  if (pair) {
    TRY(input(k, context, 1, "k", &other));
    TRY(rows_of(k, &other, "k", &more));
    a->x2 = other.data, a->m2 = more.m, a->n2 = more.n;
    second = &other, second_rows = &more;
  } else if (spec->op != OP_NORM) {
    TRY(input(k, context, 1, "residual", &other));
    TRY(like(k, &x, &other, "residual"));
    a->r = other.data;
  }
  if (k->op->cuda && !rows.trailing)
    return fail(k->api, ORT_NOT_IMPLEMENTED, "normfuse.%s: CUDA kernels normalise the last axes only; load the model without "
                "the library of normfuse.ort, or on the CPU", k->op->name);

  void **results[] = {spec->op == OP_NORM_ADD ? &a->s : &a->y, pair ? &a->y2 : &a->s};
  for (int i = 0; i < k->op->outputs; i++) TRY(output(k, context, (size_t)i, i ? second : &x, results[i]));
  if (!a->n) a->m = 0;
  if (!a->n2) a->m2 = 0;
  work.rows = a->m + a->m2;

  const void **slots[] = {&a->w, &a->b, &a->w2, &a->b2};
  float *own[4] = {0};
  int has[4];
  parameters(spec, has);
  OrtStatus *status = NULL;
  size_t at = spec->op == OP_NORM ? 1 : 2;
  for (int i = 0; i < 4 && !status; i++)
    if (has[i]) status = parameter(k, context, i, at++, i < 2 ? &x : second, i < 2 ? &rows : second_rows, slots[i], &own[i]);
  if (!status && work.rows) {
    if (k->op->cuda) {
      status = ORT(k->api, KernelContext_GetGPUComputeStream)(context, &a->stream);
      const char *why = status ? NULL : nf_cuda_run(spec, a);
      if (why) status = fail(k->api, ORT_FAIL, "normfuse.%s: %s", k->op->name, why);
    } else {
      if (!rows.trailing) work.x = &x, work.shape = &rows;
      status = run(k, context, &work);
    }
  }
  for (int i = 0; i < 4; i++) free(own[i]);
  return status;
}

/* -- what ONNX Runtime asks of an operator --------------------------------------------------------------------------- */

#define SELF ((const Operator *)op)

static const char *ORT_CALL op_name(const OrtCustomOp *op) { return SELF->name; }
static const char *ORT_CALL op_provider(const OrtCustomOp *op) { return SELF->cuda ? "CUDAExecutionProvider" : NULL; }
static int ORT_CALL op_input(const OrtCustomOp *op, size_t i) { return SELF->input[i]; }
static size_t ORT_CALL op_inputs(const OrtCustomOp *op) { return (size_t)SELF->inputs; }
static int ORT_CALL op_output(const OrtCustomOp *op, size_t i) { return SELF->output[i]; }
static size_t ORT_CALL op_outputs(const OrtCustomOp *op) { return (size_t)SELF->outputs; }
static int ORT_CALL op_required(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int ORT_CALL op_memory(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int ORT_CALL op_one(const OrtCustomOp *op) { return (void)op, 1; }

static void ORT_CALL op_destroy(void *kernel) {
  Kernel *k = kernel;
  for (int i = 0; i < 4; i++) free(k->fixed[i].floats);
  free(k);
}

/* Take note of a parameter that is an initializer, so that a call needs neither ask for it nor convert it. */
static OrtStatus *constant(Kernel *k, const OrtKernelInfo *info, size_t input_index, int i) {
  const OrtValue *value = NULL;
  int given = 0, type = nf_affine(&k->op->spec);
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

static OrtStatus *ORT_CALL op_create(const OrtCustomOp *op, OrtApi *api, const OrtKernelInfo *info, void **out) {
  Kernel *k = calloc(1, sizeof *k);
  if (!k) return fail(api, ORT_FAIL, "normfuse.%s: no memory", SELF->name);
  k->op = SELF, k->api = api, k->axes_count = 1, k->axes[0] = -1;
  /* a lone norm has `epsilon` and `axes`, a fused operator `eps` */
  OrtStatus *status = ORT(api, KernelInfoGetAttribute_float)(info, "epsilon", &k->eps);
  if (status) {
    ORT(api, ReleaseStatus)(status);
    status = ORT(api, KernelInfoGetAttribute_float)(info, "eps", &k->eps);
    float offset;
    OrtStatus *other = ORT(api, KernelInfoGetAttribute_float)(info, "offset", &offset);
    if (other) ORT(api, ReleaseStatus)(other);
    else if (!status)
      status = fail(api, ORT_NOT_IMPLEMENTED, "normfuse.%s: with an attribute `offset` this is the operator of an exported "
                    "torch program, which has no kernel here; load the model without the library of normfuse.ort", SELF->name);
  } else {
    k->axes_count = MAX_RANK;
    status = ORT(api, KernelInfoGetAttributeArray_int64)(info, "axes", k->axes, &k->axes_count);
  }
  int has[4];
  parameters(&SELF->spec, has);
  size_t at = SELF->spec.op == OP_NORM ? 1 : 2;
  for (int i = 0; i < 4 && !status && !SELF->cuda; i++)
    if (has[i]) status = constant(k, info, at++, i);
  if (status) op_destroy(k);
  else *out = k;
  return status;
}

static OrtStatus *ORT_CALL op_compute(void *kernel, OrtKernelContext *context) { return compute(kernel, context); }

/* The shape of each result is that of x, or of k: known shapes let ONNX Runtime plan its memory. */
static OrtStatus *ORT_CALL op_infer(const OrtCustomOp *op, OrtInferContext *context) {
  OrtApi *api = library.api;
  for (int i = 0; i < SELF->outputs; i++) {
    OrtShape *info;
    size_t rank;
    int64_t dims[MAX_RANK];
    const char *names[MAX_RANK];
    TRY(ORT(api, ShapeInferContext_GetInputTypeShape)(context, i && SELF->spec.op == OP_QK_NORM, &info));
    TRY(ORT(api, GetDimensionsCount)(info, &rank));
    if (!rank || rank > MAX_RANK) return NULL; /* rank 0 also stands for an unknown shape */
    TRY(ORT(api, GetDimensions)(info, dims, rank));
    TRY(ORT(api, GetSymbolicDimensions)(info, names, rank));
    for (size_t d = 0; d < rank; d++)
      if (dims[d] < 0 && !names[d][0]) return NULL; /* a dimension without a size or a name cannot be said */
    TRY(ORT(api, SetTensorElementType)(info, SELF->output[i]));
    TRY(ORT(api, ShapeInferContext_SetOutputTypeShape)(context, (size_t)i, info));
  }
  return NULL;
}

/* Results may take the place of inputs: see `Args`. */
static size_t in_place(int **from, int **to, size_t count, int first) {
  *from = malloc(2 * sizeof **from);
  *to = malloc(2 * sizeof **to);
  if (!*from || !*to) return free(*from), free(*to), *from = *to = NULL, (size_t)0;
  for (int i = 0; i < 2; i++) (*from)[i] = first + i, (*to)[i] = i;
  return count;
}
static size_t ORT_CALL op_in_place_x(int **from, int **to) { return in_place(from, to, 1, 0); }
static size_t ORT_CALL op_in_place_r(int **from, int **to) { return in_place(from, to, 1, 1); }
static size_t ORT_CALL op_in_place_both(int **from, int **to) { return in_place(from, to, 2, 0); }
static void ORT_CALL op_release(int *from, int *to) { free(from), free(to); }

/* -- the table ------------------------------------------------------------------------------------------------------ */

static const char *const SHORT[] = {"f32", "f16", "bf16"};

static void add(const Spec *spec, const char *name) {
  for (int cuda = 0; cuda <= (nf_cuda_has(spec) != 0); cuda++) {
    Operator *o = &library.operators[library.count++];
    *o = (Operator){.spec = *spec, .cuda = cuda};
    snprintf(o->name, sizeof o->name, "%s", name);
    o->input[o->inputs++] = ELEMENT[spec->x];
    if (spec->op != OP_NORM) o->input[o->inputs++] = ELEMENT[spec->op == OP_NORM_ADD || spec->op == OP_NORM_ADD_NORM ? spec->result : spec->x];
    int parameters = spec->has_w1 + spec->has_b1 + spec->has_w2 + spec->has_b2;
    while (parameters--) o->input[o->inputs++] = ELEMENT[nf_affine(spec)];
    o->outputs = 1 + (spec->op != OP_NORM && spec->op != OP_NORM_ADD);
    o->output[0] = ELEMENT[spec->result];
    o->output[1] = ELEMENT[spec->op == OP_ADD_NORM ? spec->x : spec->result];
    o->op = (OrtCustomOp){
        .GetName = op_name, .GetExecutionProviderType = op_provider, .GetInputType = op_input,
        .GetInputTypeCount = op_inputs, .GetOutputType = op_output, .GetOutputTypeCount = op_outputs,
        .KernelDestroy = op_destroy, .GetInputCharacteristic = op_required, .GetOutputCharacteristic = op_required,
        .GetInputMemoryType = op_memory, .GetVariadicInputMinArity = op_one, .GetVariadicInputHomogeneity = op_one,
        .GetVariadicOutputMinArity = op_one, .GetVariadicOutputHomogeneity = op_one, .CreateKernelV2 = op_create,
        .KernelComputeV2 = op_compute, .InferOutputShapeFn = op_infer,
        .GetMayInplace = cuda ? NULL : spec->op == OP_NORM ? op_in_place_x : spec->op == OP_NORM_ADD ? op_in_place_r : op_in_place_both,
        .ReleaseMayInplace = cuda ? NULL : op_release,
    };
  }
}

static void append(char *name, const char *part) {
  size_t used = strlen(name);
  snprintf(name + used, NAME - used, "%s%s", used ? "_" : "", part);
}

static const char *role(int weight, int bias) { return weight ? bias ? "both" : "scale" : bias ? "bias" : "plain"; }

/* The functions of a norm alone: see normfuse/frontends/onnx_functions.py. */
static void add_lone(int layer, int inner, int stash) {
  for (int roles = 0; roles < (layer ? 4 : 2); roles++) {
    int weight = !(roles & 1), bias = layer && !(roles & 2);
    Spec spec = {OP_NORM, layer, inner, stash, inner != stash, inner, weight, bias, 0, 0};
    char name[NAME] = "";
    append(name, layer ? "layer_norm" : "rms_norm");
    if (!weight || (layer && !bias)) append(name, role(weight, bias));
    if (inner != F32 || stash != F32) append(name, SHORT[inner]);
    if (inner != stash) append(name, "in"), append(name, SHORT[stash]);
    add(&spec, name);
  }
}

/* The fused operators: see normfuse/frontends/onnx_fused.py. */
static void add_fused(int x, int compute, int result, const char *cast) {
  static const char *const names[][2] = {{"rms_norm", "layer_norm"}, {"add_rms_norm", "add_layer_norm"},
    {"norm_add", "norm_add_layer_norm"}, {"norm_add_norm", "norm_add_norm_layer_norm"}, {"qk_norm", "qk_norm_layer_norm"}};
  int plain = x == F32 && compute == F32 && result == F32;
  for (int op = OP_NORM; op <= OP_QK_NORM; op++) {
    if (op == OP_NORM_ADD_NORM && result != x) continue; /* its two norms are alike, and the second reads the sum */
    for (int layer = 0; layer < 2; layer++)
      for (int roles = 0; roles < (op < OP_NORM_ADD_NORM ? 4 : 16); roles++) {
        Spec spec = {op, layer, x, compute, cast[0] == 'f', result, !(roles & 1), (roles >> 1 & 1) == layer ? 0 : 1, 0, 0};
        int usual = spec.has_w1 && spec.has_b1 == layer;
        if (op >= OP_NORM_ADD_NORM) {
          spec.has_w2 = !(roles & 4), spec.has_b2 = (roles >> 3 & 1) == layer ? 0 : 1;
          usual = usual && spec.has_w2 && spec.has_b2 == layer;
        }
        char name[NAME] = "";
        append(name, names[op][layer]);
        if (!usual) append(name, role(spec.has_w1, spec.has_b1));
        if (!usual && op >= OP_NORM_ADD_NORM) append(name, role(spec.has_w2, spec.has_b2));
        if (!plain) {
          append(name, SHORT[x]), append(name, "in"), append(name, SHORT[compute]), append(name, cast);
          if (result != x) append(name, "to"), append(name, SHORT[result]);
        }
        if (op == OP_NORM && compute == x && result == x && (layer || !spec.has_b1)) continue; /* a function of add_lone */
        add(&spec, name);
      }
  }
}

static int build(void) {
  static const int precision[] = {24, 11, 8};
  library.operators = calloc(2 * 3000, sizeof *library.operators);
  if (!library.operators) return 0;
  for (int x = 0; x < 3; x++)
    for (int compute = 0; compute < 3; compute++) {
      if (compute != x && compute != F32) continue; /* nothing is narrowed before it is normalised */
      for (int layer = 0; layer < 2; layer++) add_lone(layer, x, compute);
      for (int result = 0; result < 3; result++) {
        int plain = x == F32 && result == F32;
        if (result == compute) add_fused(x, compute, result, "none");
        if (compute != x && (result == x || precision[result] > precision[x])) add_fused(x, compute, result, "first");
        if (result != compute) add_fused(x, compute, result, "last");
        if (compute == F32 && !plain) add_fused(x, compute, result, "mixed"); /* with numerics="fast" */
      }
    }
  return 1;
}

/* The i-th name, or NULL behind the last: for tests and for `normfuse.ort.names`. */
NF_EXPORT const char *nf_name(size_t i) {
  if (!library.operators && !build()) return NULL;
  return i < library.count ? library.operators[i].name : NULL;
}

NF_EXPORT const char *nf_isa(void) { return nf_cpu_isa(); }

/* Whether a name is one of the words of a text. */
static int listed(const char *text, const char *name) {
  size_t length = strlen(name);
  for (const char *at = text; (at = strstr(at, name)); at += length)
    if ((at == text || at[-1] == ' ') && (at[length] == ' ' || !at[length])) return 1;
  return 0;
}

/* A domain of the operators named in `words`, of all where it is NULL. It has to outlive every session, and stays. */
static OrtStatus *make_domain(OrtApi *api, const char *words, OrtDomain **out) {
  TRY(ORT(api, CreateCustomOpDomain)("normfuse", out));
  for (size_t i = 0; i < library.count; i++)
    if (!words || listed(words, library.operators[i].name)) TRY(ORT(api, CustomOpDomain_Add)(*out, &library.operators[i].op));
  return NULL;
}

static OrtStatus *attach(OrtSessionOptions *options, OrtApi *api, uint32_t version) {
  if (!library.operators && !build()) return fail(api, ORT_FAIL, "NormFuse: no memory for the table of its operators");
  for (size_t i = 0; i < library.count; i++) library.operators[i].op.version = version;
  library.api = api;
  int some = 0;
  TRY(ORT(api, HasSessionConfigEntry)(options, OPERATORS, &some));
  OrtDomain *domain = library.all;
  if (some) {
    size_t size = 0;
    TRY(ORT(api, GetSessionConfigEntry)(options, OPERATORS, NULL, &size));
    char *words = calloc(1, size + 1);
    if (!words) return fail(api, ORT_FAIL, "NormFuse: no memory for the names of a model's operators");
    OrtStatus *status = ORT(api, GetSessionConfigEntry)(options, OPERATORS, words, &size);
    if (!status) status = make_domain(api, words, &domain);
    free(words);
    if (status) return status;
  } else if (!domain) {
    TRY(make_domain(api, NULL, &domain));
    library.all = domain;
  }
  return ORT(api, AddCustomOpDomain)(options, domain);
}

/* Called by ONNX Runtime when session options load the library. */
NF_EXPORT OrtStatus *ORT_CALL RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  static atomic_flag busy = ATOMIC_FLAG_INIT;
  uint32_t version = ORT_INPLACE;
  OrtApi *api = base->GetApi(version);
  if (!api) api = base->GetApi(version = ORT_OLDEST);
  if (!api) {
    OrtApi *any = base->GetApi(1); /* an error has to be made by ONNX Runtime itself */
    if (any)
      return fail(any, ORT_NOT_IMPLEMENTED, "NormFuse's operators need ONNX Runtime 1.%d or newer, and this is %s: update it, "
                  "or load the model without them", ORT_OLDEST, base->GetVersionString());
    fprintf(stderr, "NormFuse: this ONNX Runtime has another C API than 1.%d to 1.32, and no error can be reported to it; its "
            "operators are not registered\n", ORT_OLDEST);
    return NULL;
  }
  while (atomic_flag_test_and_set(&busy)) {
  }
  OrtStatus *status = attach(options, api, version);
  atomic_flag_clear(&busy);
  return status;
}
