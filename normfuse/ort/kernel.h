/* An operator, and a kernel: the operator with the attributes of one node. */
#ifndef NORMFUSE_KERNEL_H
#define NORMFUSE_KERNEL_H

#include "api.h"
#include "ops.h"

enum { MAX_RANK = 32, NAME = 80, PARAMETERS = 5 };
enum { GRAIN = 1 << 15 }; /* elements of a part, so that a few rows do not pay for waking other threads */

typedef struct {
  OrtCustomOp op; /* first: ONNX Runtime hands it back */
  Spec spec;
  int cuda, inputs, outputs;
  int input[6], output[2]; /* element types */
  char name[NAME];
} Operator;

typedef struct {
  void *data;
  size_t rank;
  int64_t dims[MAX_RANK];
} Tensor;

typedef struct {
  const Operator *op;
  OrtApi *api;
  float eps, scale;
  int64_t axes[MAX_RANK];
  size_t axes_count; /* 0: all of them */
  struct {           /* a weight or bias that is the same in every run, with its elements as floats if they are not */
    int constant;
    Tensor tensor;
    float *floats;
  } fixed[PARAMETERS];
} Kernel;

#define TRY(CALL)              \
  do {                         \
    OrtStatus *tried = (CALL); \
    if (tried) return tried;   \
  } while (0)

/* A status with a message, formatted. */
OrtStatus *nf_fail(OrtApi *api, int code, const char *format, ...);

/* Take note of the parameters that are initializers. */
OrtStatus *nf_constants(Kernel *kernel, const OrtKernelInfo *info);

/* The i-th input, and the memory of the i-th result. */
OrtStatus *nf_input(const Kernel *kernel, const OrtKernelContext *context, size_t i, const char *argument, Tensor *out);
OrtStatus *nf_output(const Kernel *kernel, OrtKernelContext *context, size_t i, const Tensor *like, void **out);

/* One run of a softmax: softmax.c. */
OrtStatus *nf_softmax(const Kernel *kernel, OrtKernelContext *context);

/* One run of a kernel: shapes checked, results made, the work done. */
OrtStatus *nf_call(const Kernel *kernel, OrtKernelContext *context);

#endif
