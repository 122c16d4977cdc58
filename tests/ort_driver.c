/* Runs every operator of the library over odd sizes, on an ONNX Runtime of a few lines, for the sanitizers: each tensor
 * is an allocation of its own. Results have to be written whole, and be the same in the place of inputs. Prints "ok".
 */
#include "api.h"
#include "ops.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

OrtStatus *RegisterCustomOps(OrtSessionOptions *, const OrtApiBase *);

struct OrtValue {
  int type;
  size_t rank;
  int64_t dims[4];
  void *data;
};

struct OrtKernelInfo {
  int lone, constants;
  int64_t axes[3];
  size_t axes_count;
  struct OrtValue *inputs;
};

struct OrtKernelContext {
  struct OrtValue *inputs, *outputs; /* an output with data lies there already */
};

static const OrtCustomOp *operators[4000];
static size_t count;
static int offset_asked;

#define CHECK(OK)                                                        \
  do {                                                                   \
    if (!(OK)) fprintf(stderr, "line %d: %s\n", __LINE__, #OK), exit(1); \
  } while (0)

static size_t elements(const struct OrtValue *v) {
  size_t n = 1;
  for (size_t d = 0; d < v->rank; d++) n *= (size_t)v->dims[d];
  return n;
}

static size_t bytes(const struct OrtValue *v) { return elements(v) * (v->type == ORT_FLOAT ? 4 : 2); }

static OrtStatus *create_status(int code, const char *message) {
  (void)code;
  char *text = malloc(strlen(message) + 1);
  return (OrtStatus *)strcpy(text, message);
}
static void release_status(OrtStatus *status) { free(status); }
static OrtStatus *create_domain(const char *name, OrtDomain **out) {
  static int domain;
  CHECK(!strcmp(name, "normfuse"));
  return *out = (OrtDomain *)&domain, NULL;
}
static OrtStatus *domain_add(OrtDomain *domain, const OrtCustomOp *op) {
  return (void)domain, operators[count++] = op, NULL;
}
static OrtStatus *add_domain(OrtSessionOptions *options, OrtDomain *domain) {
  return (void)options, (void)domain, NULL;
}
static OrtStatus *get_data(OrtValue *value, void **out) { return *out = value->data, NULL; }
static OrtStatus *get_shape(const OrtValue *value, OrtShape **out) {
  *out = malloc(sizeof *value);
  return memcpy(*out, value, sizeof *value), NULL;
}
static void release_shape(OrtShape *shape) { free(shape); }
static OrtStatus *rank(const OrtShape *shape, size_t *out) { return *out = ((const OrtValue *)shape)->rank, NULL; }
static OrtStatus *dims(const OrtShape *shape, int64_t *out, size_t n) {
  return memcpy(out, ((const OrtValue *)shape)->dims, n * sizeof *out), NULL;
}
static OrtStatus *get_float(const OrtKernelInfo *info, const char *name, float *out) {
  if (!strcmp(name, "offset")) return offset_asked++, create_status(1, "none");
  if (!strcmp(name, "scale")) return *out = 0.125f, NULL;
  if (strcmp(name, info->lone ? "epsilon" : "eps")) return create_status(1, "none");
  return *out = 1e-5f, NULL;
}
static OrtStatus *get_ints(const OrtKernelInfo *info, const char *name, int64_t *out, size_t *n) {
  CHECK(!strcmp(name, "axes") && *n >= info->axes_count);
  *n = info->axes_count;
  return memcpy(out, info->axes, *n * sizeof *out), NULL;
}
static OrtStatus *get_constant(const OrtKernelInfo *info, size_t i, int *constant, const OrtValue **out) {
  return *constant = info->constants, *out = info->constants ? info->inputs + i : NULL, NULL;
}
static OrtStatus *get_input(const OrtKernelContext *context, size_t i, const OrtValue **out) {
  return *out = context->inputs + i, NULL;
}
static OrtStatus *get_output(OrtKernelContext *context, size_t i, const int64_t *size, size_t n, OrtValue **out) {
  OrtValue *v = context->outputs + i;
  v->rank = n;
  if (n) memcpy(v->dims, size, n * sizeof *size);
  if (!v->data) v->data = memset(malloc(bytes(v)), 0xff, bytes(v));
  return *out = v, NULL;
}
static OrtStatus *parallel(const OrtKernelContext *context, void (*fn)(void *, size_t), size_t total, size_t batches,
                           void *data) {
  (void)context, (void)batches;
  while (total--) fn(data, total);
  return NULL;
}
static OrtStatus *has_entry(const OrtSessionOptions *options, const char *key, int *out) {
  return (void)options, (void)key, *out = 0, NULL;
}

static OrtFunction table[400];
static OrtApi *get_api(uint32_t version) { return version <= 18 ? table : NULL; }
static const char *get_version(void) { return "1.18.0"; }

static struct OrtValue tensor(int type, size_t n, const int64_t *size, float mean) {
  struct OrtValue v = {type, n, {0}, NULL};
  memcpy(v.dims, size, n * sizeof *size);
  v.data = malloc(bytes(&v));
  for (size_t i = 0; i < elements(&v); i++) {
    float f = mean + (float)((i * 2654435761u >> 8) % 1000) / 500 - 1;
    uint32_t u;
    memcpy(&u, &f, 4);
    if (type == ORT_FLOAT) memcpy((float *)v.data + i, &f, 4);
    else
      ((uint16_t *)v.data)[i] =
          (uint16_t)(type == ORT_BFLOAT16 ? u >> 16 : ((u >> 16 & 0x8000) | (((u >> 13) - 0x1c000) & 0x7fff)));
  }
  return v;
}

/* One call; the weights have the size of the normalised axes, and the axes that are not 1. */
static void run(const OrtCustomOp *op, const int64_t *size, size_t n, struct OrtKernelInfo info, int vary) {
  size_t inputs = op->GetInputTypeCount(op), outputs = op->GetOutputTypeCount(op);
  struct OrtValue in[6], out[2] = {{0}}, same[2] = {{0}};
  int64_t weight[4];
  for (size_t d = 0; d < n; d++) weight[d] = 1;
  for (size_t i = 0; i < info.axes_count; i++) weight[n + (size_t)info.axes[i]] = size[n + (size_t)info.axes[i]];
  if (vary) weight[n - 1] = 1; /* broadcast along the row */
  const char *name = op->GetName(op);
  int mask = !strncmp(name, "add_softmax", 11); /* a row, or one number, for all rows */
  size_t first = info.lone || mask || (strncmp(name, "rms", 3) == 0 || strncmp(name, "layer", 5) == 0) ? 1 : 2;
  for (size_t i = 0; i < inputs; i++)
    in[i] = tensor(op->GetInputType(op, i), n, i < first ? size : weight, i < first ? 0.5f : 1.5f);
  info.inputs = in;
  void *kernel;
  OrtStatus *status = op->CreateKernelV2(op, table, &info, &kernel);
  if (status) fprintf(stderr, "%s: %s\n", name, (char *)status), exit(1);
  struct OrtKernelContext context = {in, out};
  for (size_t i = 0; i < outputs; i++) out[i].type = op->GetOutputType(op, i);
  status = op->KernelComputeV2(kernel, &context);
  if (status) fprintf(stderr, "%s: %s\n", name, (char *)status), exit(1);
  for (size_t i = 0; i < outputs; i++)
    for (size_t j = 0, one = out[i].type == ORT_FLOAT ? 4 : 2; j < bytes(out + i); j += one)
      CHECK(memcmp((char *)out[i].data + j, "\xff\xff\xff\xff", one));

  int *from, *to;
  size_t places = op->GetMayInplace(&from, &to);
  memcpy(same, out, sizeof out);
  for (size_t i = 0; i < outputs; i++) same[i].data = NULL;
  for (size_t i = 0; i < places; i++)
    if (bytes(in + from[i]) == bytes(out + to[i])) same[to[i]].data = in[from[i]].data;
  context.outputs = same;
  CHECK(!op->KernelComputeV2(kernel, &context));
  for (size_t i = 0; i < outputs; i++) CHECK(!memcmp(out[i].data, same[i].data, bytes(out + i)));
  for (size_t i = 0; i < outputs; i++) {
    int own = 1;
    for (size_t j = 0; j < inputs; j++) own = own && same[i].data != in[j].data;
    if (own) free(same[i].data);
    free(out[i].data);
  }
  op->ReleaseMayInplace(from, to);
  op->KernelDestroy(kernel);
  for (size_t i = 0; i < inputs; i++) free(in[i].data);
}

#define SET(NAME, FUNCTION) table[PLACE_##NAME] = (OrtFunction)(FUNCTION)

int main(void) {
  SET(CreateStatus, create_status)
  , SET(CreateCustomOpDomain, create_domain)
  , SET(CustomOpDomain_Add, domain_add);
  SET(AddCustomOpDomain, add_domain)
  , SET(GetTensorMutableData, get_data)
  , SET(GetDimensionsCount, rank);
  SET(GetDimensions, dims)
  , SET(GetTensorTypeAndShape, get_shape)
  , SET(KernelInfoGetAttribute_float, get_float);
  SET(KernelContext_GetInput, get_input)
  , SET(KernelContext_GetOutput, get_output)
  , SET(ReleaseStatus, release_status);
  SET(ReleaseTensorTypeAndShapeInfo, release_shape)
  , SET(KernelInfoGetAttributeArray_int64, get_ints);
  SET(KernelInfoGetConstantInput_tensor, get_constant)
  , SET(KernelContext_ParallelFor, parallel)
  , SET(HasSessionConfigEntry, has_entry);
  OrtApiBase base = {get_api, get_version};
  CHECK(!RegisterCustomOps(NULL, &base));
  CHECK(count > 1000);
  static const int64_t sizes[] = {1, 7, 8, 33, 300};
  for (size_t i = 0; i < count; i++) {
    struct OrtKernelInfo info = {0, 0, {-1}, 1, NULL};
    for (size_t j = 0; j < sizeof sizes / sizeof *sizes; j++)
      for (int64_t m = 0; m < 4; m += 3) {
        int64_t size[] = {m, sizes[j]};
        info.constants = j & 1;
        run(operators[i], size, 2, info, sizes[j] == 7);
      }
    const char *name = operators[i]->GetName(operators[i]);
    if (strncmp(name, "rms", 3) && strncmp(name, "layer", 5)) continue;
    static const int64_t axes[][3] = {{-3}, {-2, -1}, {-4, -2}, {-3, -1}, {-2}};
    static const size_t lengths[] = {1, 2, 2, 2, 1};
    for (size_t j = 0; j < sizeof lengths / sizeof *lengths; j++) {
      struct OrtKernelInfo lone = {1, (int)(j & 1), {0}, lengths[j], NULL};
      memcpy(lone.axes, axes[j], sizeof axes[j]);
      int64_t size[] = {2, 9, 3, 11}, empty[] = {2, 0, 3, 11};
      run(operators[i], size, 4, lone, 0);
      run(operators[i], empty, 4, lone, 0);
    }
  }
  struct OrtKernelInfo wide = {0, 1, {-1}, 1, NULL}; /* more than one part, and rows that do not fit the stack */
  for (size_t i = 0; i < count; i += i < 4 ? 1 : 37) { /* the first four are softmaxes */
    int64_t size[] = {5, 20011}, rows[] = {1000, 130};
    run(operators[i], size, 2, wide, 0);
    run(operators[i], rows, 2, wide, 0);
  }
  CHECK(offset_asked);
  printf("%zu operators, %s: ok\n", count, nf_cpu_isa());
  return 0;
}
