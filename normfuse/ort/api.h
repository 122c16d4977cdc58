/* The part of ONNX Runtime's C API that the library calls, declared by hand: no header of its is needed to build.
 *
 * OrtApi is a table of functions that only ever grows at the end (ONNX Runtime asserts the places in its own source),
 * so a function is its place in the table. Places read from the headers of 1.17 to 1.24, used with 1.17 to 1.32. */
#ifndef NORMFUSE_API_H
#define NORMFUSE_API_H

#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define ORT_CALL __stdcall
#define NF_EXPORT __declspec(dllexport)
#else
#define ORT_CALL
#define NF_EXPORT __attribute__((visibility("default")))
#endif

/* 1.17 is the oldest: the first with KernelContext_ParallelFor and with shape inference for custom operators. */
enum { ORT_OLDEST = 17, ORT_INPLACE = 18 };
enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_NOT_IMPLEMENTED = 9 };
enum { ORT_FLOAT = 1, ORT_FLOAT16 = 10, ORT_BFLOAT16 = 16 };

typedef void(ORT_CALL *OrtFunction)(void); /* cast to its own type before a call */
typedef const OrtFunction OrtApi;
typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtShape OrtShape; /* OrtTensorTypeAndShapeInfo */
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtInferContext OrtInferContext; /* OrtShapeInferContext */
typedef struct OrtDomain OrtDomain;             /* OrtCustomOpDomain */
typedef struct OrtSessionOptions OrtSessionOptions;

typedef struct {
  OrtApi *(ORT_CALL *GetApi)(uint32_t version);
  const char *(ORT_CALL *GetVersionString)(void);
} OrtApiBase;

/* name, place, result, arguments */
#define ORT_FUNCTIONS(F)                                                                                               \
  F(CreateStatus, 0, OrtStatus *, (int code, const char *message))                                                     \
  F(CreateCustomOpDomain, 26, OrtStatus *, (const char *name, OrtDomain **out))                                        \
  F(CustomOpDomain_Add, 27, OrtStatus *, (OrtDomain * domain, const struct OrtCustomOp *op))                           \
  F(AddCustomOpDomain, 28, OrtStatus *, (OrtSessionOptions * options, OrtDomain * domain))                             \
  F(GetTensorMutableData, 51, OrtStatus *, (OrtValue * value, void **out))                                             \
  F(SetTensorElementType, 58, OrtStatus *, (OrtShape * info, int type))                                                \
  F(GetTensorElementType, 60, OrtStatus *, (const OrtShape *info, int *out))                                           \
  F(GetDimensionsCount, 61, OrtStatus *, (const OrtShape *info, size_t *out))                                          \
  F(GetDimensions, 62, OrtStatus *, (const OrtShape *info, int64_t *out, size_t count))                                \
  F(GetSymbolicDimensions, 63, OrtStatus *, (const OrtShape *info, const char **out, size_t count))                    \
  F(GetTensorTypeAndShape, 65, OrtStatus *, (const OrtValue *value, OrtShape **out))                                   \
  F(KernelInfoGetAttribute_float, 85, OrtStatus *, (const OrtKernelInfo *info, const char *name, float *out))          \
  F(KernelContext_GetInput, 90, OrtStatus *, (const OrtKernelContext *context, size_t i, const OrtValue **out))        \
  F(KernelContext_GetOutput, 91, OrtStatus *,                                                                          \
    (OrtKernelContext * context, size_t i, const int64_t *dims, size_t count, OrtValue **out))                         \
  F(ReleaseStatus, 93, void, (OrtStatus * status))                                                                     \
  F(ReleaseTensorTypeAndShapeInfo, 99, void, (OrtShape * info))                                                        \
  F(KernelInfoGetAttributeArray_int64, 163, OrtStatus *,                                                               \
    (const OrtKernelInfo *info, const char *name, int64_t *out, size_t *count))                                        \
  F(KernelContext_GetGPUComputeStream, 193, OrtStatus *, (const OrtKernelContext *context, void **out))                \
  F(HasSessionConfigEntry, 237, OrtStatus *, (const OrtSessionOptions *options, const char *key, int *out))            \
  F(GetSessionConfigEntry, 238, OrtStatus *,                                                                           \
    (const OrtSessionOptions *options, const char *key, char *out, size_t *size))                                      \
  F(KernelInfoGetConstantInput_tensor, 249, OrtStatus *,                                                               \
    (const OrtKernelInfo *info, size_t i, int *constant, const OrtValue **out))                                        \
  F(ShapeInferContext_GetInputTypeShape, 268, OrtStatus *, (const OrtInferContext *context, size_t i, OrtShape **out)) \
  F(ShapeInferContext_SetOutputTypeShape, 270, OrtStatus *,                                                            \
    (const OrtInferContext *context, size_t i, const OrtShape *info))                                                  \
  F(KernelContext_ParallelFor, 274, OrtStatus *,                                                                       \
    (const OrtKernelContext *context, void (*fn)(void *, size_t), size_t total, size_t batches, void *data))

#define ORT_DECLARE(NAME, PLACE, RESULT, ARGUMENTS) \
  enum { PLACE_##NAME = PLACE };                    \
  typedef RESULT(ORT_CALL *Type_##NAME) ARGUMENTS;
struct OrtCustomOp;
ORT_FUNCTIONS(ORT_DECLARE)

/* ORT(api, Name)(arguments...) */
#define ORT(API, NAME) ((Type_##NAME)(API)[PLACE_##NAME])

/* OrtCustomOp up to version 18 of the API; ONNX Runtime reads as far as `version` says. */
typedef struct OrtCustomOp {
  uint32_t version;
  void *(ORT_CALL *CreateKernel)(const struct OrtCustomOp *, OrtApi *, const OrtKernelInfo *);
  const char *(ORT_CALL *GetName)(const struct OrtCustomOp *);
  const char *(ORT_CALL *GetExecutionProviderType)(const struct OrtCustomOp *);
  int(ORT_CALL *GetInputType)(const struct OrtCustomOp *, size_t);
  size_t(ORT_CALL *GetInputTypeCount)(const struct OrtCustomOp *);
  int(ORT_CALL *GetOutputType)(const struct OrtCustomOp *, size_t);
  size_t(ORT_CALL *GetOutputTypeCount)(const struct OrtCustomOp *);
  void(ORT_CALL *KernelCompute)(void *, OrtKernelContext *);
  void(ORT_CALL *KernelDestroy)(void *);
  int(ORT_CALL *GetInputCharacteristic)(const struct OrtCustomOp *, size_t);
  int(ORT_CALL *GetOutputCharacteristic)(const struct OrtCustomOp *, size_t);
  int(ORT_CALL *GetInputMemoryType)(const struct OrtCustomOp *, size_t);
  int(ORT_CALL *GetVariadicInputMinArity)(const struct OrtCustomOp *);
  int(ORT_CALL *GetVariadicInputHomogeneity)(const struct OrtCustomOp *);
  int(ORT_CALL *GetVariadicOutputMinArity)(const struct OrtCustomOp *);
  int(ORT_CALL *GetVariadicOutputHomogeneity)(const struct OrtCustomOp *);
  OrtStatus *(ORT_CALL *CreateKernelV2)(const struct OrtCustomOp *, OrtApi *, const OrtKernelInfo *, void **);
  OrtStatus *(ORT_CALL *KernelComputeV2)(void *, OrtKernelContext *);
  OrtStatus *(ORT_CALL *InferOutputShapeFn)(const struct OrtCustomOp *, OrtInferContext *);
  int(ORT_CALL *GetStartVersion)(const struct OrtCustomOp *);
  int(ORT_CALL *GetEndVersion)(const struct OrtCustomOp *);
  size_t(ORT_CALL *GetMayInplace)(int **, int **);
  void(ORT_CALL *ReleaseMayInplace)(int *, int *);
  size_t(ORT_CALL *GetAliasMap)(int **, int **);
  void(ORT_CALL *ReleaseAliasMap)(int *, int *);
} OrtCustomOp;

#endif
