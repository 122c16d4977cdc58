/* RegisterCustomOps: the operators of domain "normfuse" under every name that `normfuse rewrite` gives a function.
 *
 * ONNX Runtime prefers a registered operator to a model's own function of the same name, so an operator computes what
 * the function's body means, for everything that the function takes. */
#include "kernel.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
  OrtApi *api;
  OrtDomain *all;
  Operator *operators;
  size_t count;
} library;

/* A session option: the names of the operators to register, with spaces between them, or all that have a CUDA kernel,
 * whose names would be longer than a session option may be; all of them without it. */
#define OPERATORS "normfuse.operators"
#define WITH_CUDA "cuda"

static const int ELEMENT[] = {ORT_FLOAT, ORT_FLOAT16, ORT_BFLOAT16};

/* -- what ONNX Runtime asks of an operator ---------------------------------------------------------------------------
 */

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
  for (int i = 0; i < PARAMETERS; i++) free(k->fixed[i].floats);
  free(k);
}

static OrtStatus *ORT_CALL op_create(const OrtCustomOp *op, OrtApi *api, const OrtKernelInfo *info, void **out) {
  Kernel *k = *out = calloc(1, sizeof *k);
  if (!k) return nf_fail(api, ORT_FAIL, "normfuse.%s: no memory", SELF->name);
  k->op = SELF, k->api = api, k->axes_count = 1, k->axes[0] = -1;
  if (SELF->spec.op == OP_SOFTMAX) { /* it has no other attributes */
    k->scale = 1;
    OrtStatus *status = SELF->spec.scaled ? ORT(api, KernelInfoGetAttribute_float)(info, "scale", &k->scale) : NULL;
    if (status) op_destroy(k), *out = NULL;
    return status;
  }
  /* a lone norm has `epsilon` and `axes`, a fused operator `eps` */
  OrtStatus *status = ORT(api, KernelInfoGetAttribute_float)(info, "epsilon", &k->eps);
  if (status) {
    ORT(api, ReleaseStatus)(status);
    status = ORT(api, KernelInfoGetAttribute_float)(info, "eps", &k->eps);
    float offset;
    OrtStatus *other = ORT(api, KernelInfoGetAttribute_float)(info, "offset", &offset);
    if (other) ORT(api, ReleaseStatus)(other);
    else if (!status)
      status = nf_fail(api, ORT_NOT_IMPLEMENTED,
                       "normfuse.%s: with an attribute `offset` this is the operator of an exported "
                       "torch program, which has no kernel here; load the model without the library of normfuse.ort",
                       SELF->name);
  } else {
    k->axes_count = MAX_RANK;
    status = ORT(api, KernelInfoGetAttributeArray_int64)(info, "axes", k->axes, &k->axes_count);
  }
  if (!status && !SELF->cuda) status = nf_constants(k, info);
  if (status) op_destroy(k), *out = NULL;
  return status;
}

static OrtStatus *ORT_CALL op_compute(void *kernel, OrtKernelContext *context) {
  const Kernel *k = kernel;
  return k->op->spec.op == OP_SOFTMAX ? nf_softmax(k, context) : nf_call(k, context);
}

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

/* The shape of a softmax is that of x, where the mask can be seen not to widen it: by numbers, for a size that has the
 * same name in both may yet be 1 in one of them, and ONNX Runtime would have put the result into the place of x. */
static OrtStatus *ORT_CALL op_infer_softmax(const OrtCustomOp *op, OrtInferContext *context) {
  OrtApi *api = library.api;
  OrtShape *info;
  size_t ranks[2] = {0};
  int64_t dims[2][MAX_RANK];
  const char *names[MAX_RANK];
  for (int i = SELF->inputs - 1; i >= 0; i--) {
    TRY(ORT(api, ShapeInferContext_GetInputTypeShape)(context, (size_t)i, &info));
    TRY(ORT(api, GetDimensionsCount)(info, &ranks[i]));
    if (!ranks[i] || ranks[i] > MAX_RANK) return NULL; /* see op_infer */
    TRY(ORT(api, GetDimensions)(info, dims[i], ranks[i]));
    TRY(ORT(api, GetSymbolicDimensions)(info, names, ranks[i])); /* last, those of x */
  }
  int type; /* of the kernels under one name this is asked of one */
  TRY(ORT(api, GetTensorElementType)(info, &type));
  if (ranks[1] > ranks[0]) return NULL;
  for (size_t d = ranks[0], m = ranks[1]; d-- > 0;) {
    if (dims[0][d] < 0 && !names[d][0]) return NULL;
    if (!m || dims[1][--m] == 1) continue;
    if (dims[0][d] < 0 || dims[0][d] != dims[1][m]) return NULL;
  }
  TRY(ORT(api, SetTensorElementType)(info, type));
  return ORT(api, ShapeInferContext_SetOutputTypeShape)(context, 0, info);
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

/* -- the table ------------------------------------------------------------------------------------------------------
 */

static const char *const SHORT[] = {"f32", "f16", "bf16"};

static void add(const Spec *spec, const char *name) {
  int softmax = spec->op == OP_SOFTMAX, two = softmax ? spec->has_mask : spec->op != OP_NORM;
  for (int cuda = 0; cuda <= (!softmax && nf_cuda_has(spec)); cuda++) {
    Operator *o = &library.operators[library.count++];
    *o = (Operator){.spec = *spec, .cuda = cuda};
    snprintf(o->name, sizeof o->name, "%s", name);
    o->input[o->inputs++] = ELEMENT[spec->x];
    int stream = spec->op == OP_NORM_ADD || spec->op == OP_NORM_ADD_NORM;
    if (two) o->input[o->inputs++] = ELEMENT[softmax ? F32 : stream ? spec->result : spec->x];
    if (spec->has_x_bias) o->input[o->inputs++] = ELEMENT[spec->x];
    int parameters = spec->has_w1 + spec->has_b1 + spec->has_w2 + spec->has_b2;
    while (parameters--) o->input[o->inputs++] = ELEMENT[nf_affine(spec)];
    o->outputs = 1 + (two && !softmax && spec->op != OP_NORM_ADD);
    o->output[0] = ELEMENT[spec->result];
    o->output[1] = ELEMENT[spec->op == OP_ADD_NORM ? spec->x : spec->result];
    o->op = (OrtCustomOp){
        .GetName = op_name,
        .GetExecutionProviderType = op_provider,
        .GetInputType = op_input,
        .GetInputTypeCount = op_inputs,
        .GetOutputType = op_output,
        .GetOutputTypeCount = op_outputs,
        .KernelDestroy = op_destroy,
        .GetInputCharacteristic = op_required,
        .GetOutputCharacteristic = op_required,
        .GetInputMemoryType = op_memory,
        .GetVariadicInputMinArity = op_one,
        .GetVariadicInputHomogeneity = op_one,
        .GetVariadicOutputMinArity = op_one,
        .GetVariadicOutputHomogeneity = op_one,
        .CreateKernelV2 = op_create,
        .KernelComputeV2 = op_compute,
        .InferOutputShapeFn = softmax ? op_infer_softmax : op_infer,
        .GetMayInplace = cuda                                 ? NULL
                         : softmax || spec->op == OP_NORM     ? op_in_place_x
                         : spec->op == OP_NORM_ADD            ? op_in_place_r
                                                              : op_in_place_both,
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
    Spec spec = {OP_NORM, layer, inner, stash, inner != stash, inner, weight, bias, 0, 0, 0, 0, 0, 0, 0};
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
  static const char *const names[][2] = {{"rms_norm", "layer_norm"},
                                         {"add_rms_norm", "add_layer_norm"},
                                         {"norm_add", "norm_add_layer_norm"},
                                         {"norm_add_norm", "norm_add_norm_layer_norm"},
                                         {"qk_norm", "qk_norm_layer_norm"}};
  int plain = x == F32 && compute == F32 && result == F32;
  for (int op = OP_NORM; op <= OP_QK_NORM; op++) {
    if (op == OP_NORM_ADD_NORM && result != x) continue; /* its two norms are alike, and the second reads the sum */
    for (int layer = 0; layer < 2; layer++)
      for (int roles = 0; roles < (op < OP_NORM_ADD_NORM ? 4 : 16); roles++) {
        Spec spec = {op, layer, x, compute, cast[0] == 'f', result, !(roles & 1), (roles >> 1 & 1) == layer ? 0 : 1,
                     0,  0,     0, 0, 0, 0, 0};
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
        if (op == OP_NORM && compute == x && result == x && (layer || !spec.has_b1))
          continue; /* a function of add_lone */
        for (int more = 0; more <= (op == OP_ADD_NORM); more++) {
          char full[NAME] = "";
          if (more) append(full, "bias");
          append(full, name);
          spec.has_x_bias = more, spec.unrounded = 0;
          add(&spec, full);
          if (op != OP_ADD_NORM || compute == x) continue;
          spec.unrounded = 1;
          append(full, "unrounded");
          add(&spec, full);
        }
      }
  }
}

/* See normfuse/frontends/onnx_softmax.py. Those of float16 have a kernel of float32 too, under the same name: where what
 * stands beside one is computed in float32, ONNX Runtime runs it so as well, and needs no casts. */
static void add_softmax(int mask, int scaled, int half) {
  char name[NAME] = "";
  append(name, mask ? "add_softmax" : "softmax");
  if (scaled) append(name, "scaled");
  if (half) append(name, "of_f16");
  for (int type = half ? F16 : F32; type >= F32; type--) {
    Spec spec = {.op = OP_SOFTMAX, .x = type, .result = type, .has_mask = mask, .scaled = scaled, .half = half};
    add(&spec, name);
  }
}

static int build(void) {
  static const int precision[] = {24, 11, 8};
  library.operators = calloc(2 * 3000, sizeof *library.operators);
  if (!library.operators) return 0;
  for (int mask = 0; mask < 2; mask++) add_softmax(mask, 0, 0), add_softmax(mask, 0, 1), add_softmax(mask, 1, 1);
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

/* Whether it has its kernel on CUDA. */
NF_EXPORT int nf_on_cuda(size_t i) { return library.operators[i].cuda; }

NF_EXPORT const char *nf_isa(void) { return nf_cpu_isa(); }

/* Whether a name is one of the words of a text. */
static int listed(const char *text, const char *name) {
  size_t length = strlen(name);
  for (const char *at = text; (at = strstr(at, name)); at += length)
    if ((at == text || at[-1] == ' ') && (at[length] == ' ' || !at[length])) return 1;
  return 0;
}

/* Whether the operator of that name has a CUDA kernel: it is there twice, the CPU's first. */
static int has_cuda(size_t i) {
  const Operator *own = library.operators + i;
  return own->cuda || (i + 1 < library.count && own[1].cuda && !strcmp(own->name, own[1].name));
}

/* A domain of the operators named in `words`, of all where it is NULL. It has to outlive every session, and stays. */
static OrtStatus *make_domain(OrtApi *api, const char *words, OrtDomain **out) {
  TRY(ORT(api, CreateCustomOpDomain)("normfuse", out));
  int cuda = words && !strcmp(words, WITH_CUDA);
  for (size_t i = 0; i < library.count; i++)
    if (!words || (cuda ? has_cuda(i) : listed(words, library.operators[i].name)))
      TRY(ORT(api, CustomOpDomain_Add)(*out, &library.operators[i].op));
  return NULL;
}

static OrtStatus *attach(OrtSessionOptions *options, OrtApi *api, uint32_t version) {
  if (!library.operators && !build())
    return nf_fail(api, ORT_FAIL, "NormFuse: no memory for the table of its operators");
  for (size_t i = 0; i < library.count; i++) library.operators[i].op.version = version;
  library.api = api;
  int some = 0;
  TRY(ORT(api, HasSessionConfigEntry)(options, OPERATORS, &some));
  OrtDomain *domain = library.all;
  if (some) {
    size_t size = 0;
    TRY(ORT(api, GetSessionConfigEntry)(options, OPERATORS, NULL, &size));
    char *words = calloc(1, size + 1);
    if (!words) return nf_fail(api, ORT_FAIL, "NormFuse: no memory for the names of a model's operators");
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
      return nf_fail(any, ORT_NOT_IMPLEMENTED,
                     "NormFuse's operators need ONNX Runtime 1.%d or newer, and this is %s: update it, "
                     "or load the model without them",
                     ORT_OLDEST, base->GetVersionString());
    fprintf(stderr,
            "NormFuse: this ONNX Runtime has another C API than 1.%d to 1.32, and no error can be reported to it; its "
            "operators are not registered\n",
            ORT_OLDEST);
    return NULL;
  }
  while (atomic_flag_test_and_set(&busy)) {
  }
  OrtStatus *status = attach(options, api, version);
  atomic_flag_clear(&busy);
  return status;
}
