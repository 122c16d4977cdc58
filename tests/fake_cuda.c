/* A CUDA driver without a GPU: it shows what it is asked for to whoever set the hooks, and fails where it is told to. */
#include <stddef.h>
#include <string.h>

int fake_capability = 90, fake_context = 1, fake_status = 0;
const char *fake_failing = "";
int (*fake_load)(const char *text);
int (*fake_function)(int module, const char *name);
int (*fake_launch)(int function, const unsigned *shape, void *stream, void **arguments);

static int result(const char *function) {
  return strcmp(function, fake_failing) == 0 ? fake_status : 0;
}

int cuInit(unsigned flags) {
#ifdef BROKEN
  flags = 1;
#endif
  return flags != 0 ? 1 : result("cuInit");
}

int cuCtxGetCurrent(void **context) {
  *context = (void *)(size_t)fake_context;
  return result("cuCtxGetCurrent");
}

int cuCtxGetDevice(int *device) {
  *device = 3;
  return result("cuCtxGetDevice");
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? fake_capability / 10 : fake_capability % 10;
  return device != 3 || attribute < 75 || attribute > 76 ? 1 : result("cuDeviceGetAttribute");
}

int cuModuleLoadDataEx(void **module, const void *text, unsigned options, int *names, void **values) {
  (void)names, (void)values;
  *module = (void *)(size_t)fake_load(text);
  return options != 0 ? 1 : result("cuModuleLoadDataEx");
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = (void *)(size_t)fake_function((int)(size_t)module, name);
  return result("cuModuleGetFunction");
}

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads_x, unsigned threads_y,
                   unsigned threads_z, unsigned shared, void *stream, void **arguments, void **extra) {
  const unsigned shape[] = {x, y, z, threads_x, threads_y, threads_z, shared};
  int status = extra != NULL ? 1 : result("cuLaunchKernel");
  return status != 0 ? status : fake_launch((int)(size_t)function, shape, stream, arguments);
}

#ifndef OLD
int cuGetErrorString(int status, const char **text) {
  *text = "the words of the driver";
  return status == 999 ? 1 : 0;
}
#endif
