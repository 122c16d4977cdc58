/* The operators on CUDA tensors: kernels compiled ahead of time (ptx.h), launched through the driver on ORT's stream.

   The driver is loaded when the first operator runs, so that this library loads where there is none; its few functions
   are declared here, so that no CUDA toolkit is needed. Where rows are not multiples of 16 bytes, or a tensor does not
   start at one, a kernel that takes them element by element does the work. */
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#ifndef NORMFUSE_CUDA
#define NORMFUSE_CUDA
#endif
#include "ops.h"
#include "ptx.h"

#ifdef _WIN32
#include <windows.h>
#define DRIVER "nvcuda.dll"
#define LOCAL __declspec(thread)
static SRWLOCK mutex = SRWLOCK_INIT;
#define lock() AcquireSRWLockExclusive(&mutex)
#define unlock() ReleaseSRWLockExclusive(&mutex)
#define open_library(name) ((void *)LoadLibraryA(name))
#define find_symbol(library, name) ((void *)GetProcAddress((HMODULE)(library), name))
#else
#include <dlfcn.h>
#include <pthread.h>
#define DRIVER "libcuda.so.1"
#define LOCAL _Thread_local
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
#define lock() pthread_mutex_lock(&mutex)
#define unlock() pthread_mutex_unlock(&mutex)
#define open_library(name) dlopen(name, RTLD_NOW)
#define find_symbol(library, name) dlsym(library, name)
#endif

/* -- the driver ---------------------------------------------------------------------------------------------------- */

enum { CUDA_SUCCESS = 0, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 };

#define FUNCTIONS(F)                                                                                                   \
  F(cuInit, (unsigned flags))                                                                                          \
  F(cuCtxGetCurrent, (void **context))                                                                                 \
  F(cuCtxGetDevice, (int *device))                                                                                     \
  F(cuDeviceGetAttribute, (int *value, int attribute, int device))                                                     \
  F(cuModuleLoadDataEx, (void **module, const void *text, unsigned options, int *names, void **values))                \
  F(cuModuleGetFunction, (void **function, void *module, const char *name))                                            \
  F(cuLaunchKernel, (void *function, unsigned x, unsigned y, unsigned z, unsigned threads_x, unsigned threads_y,       \
                     unsigned threads_z, unsigned shared, void *stream, void **arguments, void **extra))               \
  F(cuGetErrorString, (int status, const char **text))

#define DECLARE(name, arguments) int(*name) arguments;
static struct {
  FUNCTIONS(DECLARE)
} cuda;

static LOCAL char message[256];

static const char *say(const char *what, const char *why) {
  snprintf(message, sizeof message, "%s%s%s", what, why[0] ? ": " : "", why);
  return message;
}

/* NULL if a call succeeded, else what it was and the driver's words. */
static const char *check(int status, const char *what) {
  const char *why = NULL;
  if (status == CUDA_SUCCESS)
    return NULL;
  if (cuda.cuGetErrorString(status, &why) != CUDA_SUCCESS || why == NULL)
    why = "an error that the driver does not know";
  return say(what, why);
}

static const char *load_driver(void) {
  static int loaded;
  void *library = loaded ? NULL : open_library(DRIVER);
  if (loaded)
    return NULL;
  if (library == NULL)
    return say("the CUDA driver cannot be loaded", DRIVER);
  /* through memory: ISO C has no conversion of an object pointer to one to a function */
#define FIND(name, arguments)                                                                                          \
  if ((*(void **)&cuda.name = find_symbol(library, #name)) == NULL)                                                    \
    return say("the CUDA driver is too old, it lacks", #name);
  FUNCTIONS(FIND)
  const char *why = check(cuda.cuInit(0), "the CUDA driver does not start");
  loaded = why == NULL;
  return why;
}

/* -- kernels, loaded when they are first launched ------------------------------------------------------------------- */

typedef struct Context {
  void *context;
  int architecture;
  void *functions[MOST_KERNELS];
  struct Context *next;
} Context;

static Context *contexts;

/* The context of this thread, which ONNX Runtime has made current. */
static const char *find_context(Context **found) {
  void *current = NULL;
  int device, major, minor;
  const char *why = check(cuda.cuCtxGetCurrent(&current), "no CUDA context");
  if (why != NULL)
    return why;
  if (current == NULL)
    return say("no CUDA context is current in this thread", "");
  for (*found = contexts; *found != NULL; *found = (*found)->next)
    if ((*found)->context == current)
      return NULL;
  if ((why = check(cuda.cuCtxGetDevice(&device), "no CUDA device")) != NULL ||
      (why = check(cuda.cuDeviceGetAttribute(&major, CAPABILITY_MAJOR, device), "no compute capability")) != NULL ||
      (why = check(cuda.cuDeviceGetAttribute(&minor, CAPABILITY_MINOR, device), "no compute capability")) != NULL)
    return why;
  int architecture = nf_ptx_architecture(10 * major + minor);
  if (architecture < 0)
    return say("the GPU is older than compute capability 8.0", "run the model without the library of normfuse.ort");
  Context *made = calloc(1, sizeof *made);
  if (made == NULL)
    return say("out of memory", "");
  *made = (Context){.context = current, .architecture = architecture, .next = contexts};
  *found = contexts = made;
  return NULL;
}

static const char *load_kernel(const Context *in, int number, void **function) {
  void *module = NULL, *found = NULL;
  char *text = nf_ptx_text(in->architecture, number);
  if (text == NULL)
    return say("out of memory", "");
  const char *why = check(cuda.cuModuleLoadDataEx(&module, text, 0, NULL, NULL), "a kernel cannot be loaded");
  free(text);
  if (why == NULL)
    why = check(cuda.cuModuleGetFunction(&found, module, nf_ptx_form(number)->entry), "a kernel is not found");
  if (why == NULL)
    *function = found;
  return why;
}

static const char *find_kernel(int number, void **function, const Kernel **kernel) {
  Context *in = NULL;
  const char *why;
  lock();
  if ((why = load_driver()) == NULL && (why = find_context(&in)) == NULL) {
    if (in->functions[number] == NULL)
      why = load_kernel(in, number, &in->functions[number]);
    *function = in->functions[number];
    *kernel = nf_ptx_kernel(in->architecture, number);
  }
  unlock();
  return why;
}

/* -- operators ----------------------------------------------------------------------------------------------------- */

enum { MOST_COLUMNS = 1 << 24, MOST_ROWS = INT_MAX - (1 << 16) };

/* The types as the kernels have them: to round float32 to float32 is to do nothing. */
static Types types_of(const Spec *spec) {
  return (Types){spec->x, spec->first && !(spec->x == F32 && spec->result == F32), spec->result};
}

static int multiple_of_16(const void *p) {
  return (uintptr_t)p % 16 == 0;
}

/* The number of an operator among the kernels. */
static int number_of(const Spec *spec) {
  return spec->op == OP_QK_NORM ? OP_NORM : spec->unrounded ? ADD_NORM_UNROUNDED : spec->op;
}

/* The kernel of an operator. */
static int choose(int op, const Spec *spec, const Args *a) {
  Types types = types_of(spec);
  int aligned = a->n % 8 == 0 && multiple_of_16(a->x) && multiple_of_16(a->r) && multiple_of_16(a->y) &&
                multiple_of_16(a->s) && multiple_of_16(a->w) && multiple_of_16(a->b) && multiple_of_16(a->w2) &&
                multiple_of_16(a->b2);
  return nf_ptx_find(op, spec->layer, &types, a->n, aligned);
}

static int is_tile(int number) {
  return number != NO_KERNEL && nf_ptx_form(number)->entry[0] == 't';
}

static int programs(const Kernel *kernel, long long m) {
  return (int)((m + kernel->rows - 1) / kernel->rows);
}

/* Launch a kernel on x and, where m2 > 0, on x2. */
static const char *launch(int number, const Args *a) {
  void *function = NULL, *scratch = NULL;
  const Kernel *kernel = NULL;
  const char *why = number == NO_KERNEL ? say("no kernel for these types", "") : NULL;
  if (why != NULL || (why = find_kernel(number, &function, &kernel)) != NULL)
    return why;
  int m = (int)a->m, n = (int)a->n, m2 = (int)a->m2, n2 = (int)a->n2, tiles = programs(kernel, m);
  Args of = *a;
  void *arguments[] = {&of.x, &of.r, &of.y, &of.s, &of.w,  &of.b,  &of.w2,   &of.b2,   &of.x2,
                       &of.y2, &m,   &n,    &m2,   &n2, &tiles, &of.eps, &scratch, &scratch};
  unsigned grid = (unsigned)tiles + (unsigned)programs(kernel, m2), threads = 32 * (unsigned)kernel->warps;
  int status = cuda.cuLaunchKernel(function, grid, 1, 1, threads, 1, 1, (unsigned)kernel->shared, a->stream, arguments,
                                   NULL);
  return check(status, "a kernel cannot be launched");
}

/* An operator that has one kernel, on rows that there may not be. */
static const char *single(int op, const Spec *spec, const Args *a) {
  if (a->m == 0 || a->n == 0)
    return NULL;
  if (a->n > MOST_COLUMNS)
    return say("rows of more than 2^24 elements", "");
  if (a->m > MOST_ROWS)
    return say("more than 2^31 rows", "");
  return launch(choose(op, spec, a), a);
}

/* The kernels of an OP_ADD_NORM have the bias of x where others have the second weight. */
static const char *add_norm(const Spec *spec, const Args *a) {
  Args of = *a;
  of.w2 = a->x_bias;
  return single(number_of(spec), spec, &of);
}

/* One launch for q and k where the same kernel suits both. */
static const char *pair(const Spec *spec, const Args *a) {
  Args q = *a, k = {.stream = a->stream, .x = a->x2, .y = a->y2, .w = a->w2, .b = a->b2, .m = a->m2, .n = a->n2,
                    .eps = a->eps};
  q.w2 = q.b2 = q.x2 = q.y2 = NULL;
  q.m2 = q.n2 = 0;
  if (a->m > 0 && a->n > 0 && a->m2 > 0 && a->n2 > 0 && a->m <= MOST_ROWS && a->m2 <= MOST_ROWS - a->m) {
    int number = choose(OP_NORM, spec, &q);
    if (is_tile(number) && number == choose(OP_NORM, spec, &k))
      return launch(number, a);
  }
  const char *why = single(OP_NORM, spec, &q);
  return why != NULL ? why : single(OP_NORM, spec, &k);
}

static const char *norm_add(const Spec *spec, const Args *a) {
  Args of = *a;
  of.y = a->s;
  of.s = NULL;
  return single(OP_NORM_ADD, spec, &of);
}

/* Two launches where a row does not fit on chip. */
static const char *sandwich(const Spec *spec, const Args *a) {
  Args first = *a, second = *a;
  if (choose(OP_NORM_ADD_NORM, spec, a) != NO_KERNEL)
    return single(OP_NORM_ADD_NORM, spec, a);
  second.x = a->s;
  second.w = a->w2;
  second.b = a->b2;
  second.r = second.s = NULL;
  first.w2 = first.b2 = second.w2 = second.b2 = NULL;
  const char *why = norm_add(spec, &first);
  return why != NULL ? why : single(OP_NORM, spec, &second);
}

int nf_cuda_has(const Spec *spec) {
  Types types = types_of(spec);
  return spec->compute == F32 && nf_ptx_find(number_of(spec), spec->layer, &types, 1, 1) != NO_KERNEL;
}

const char *nf_cuda_run(const Spec *spec, const Args *args) {
  if (!nf_cuda_has(spec))
    return say("no CUDA kernel for these types", "");
  switch (spec->op) {
  case OP_QK_NORM: return pair(spec, args);
  case OP_NORM_ADD_NORM: return sandwich(spec, args);
  case OP_NORM_ADD: return norm_add(spec, args);
  case OP_ADD_NORM: return add_norm(spec, args);
  default: return single(OP_NORM, spec, args);
  }
}
