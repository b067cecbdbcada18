/* The part of libcuda that Triton's launcher calls, for testing launches without a GPU: it runs nothing, and writes
   one line to standard output for each kernel that is loaded or launched, unless QUIET is set. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
} LaunchConfig;

static int quiet(void) {
  static int known = -1;
  if (known < 0) known = getenv("QUIET") != NULL;
  return known;
}
int cuLaunchKernelEx(const LaunchConfig *c, void *function, void **parameters, void **extra) {
  if (quiet()) return 0;
  printf("launch %u %u %u %u %llu\n", c->grid_x, c->grid_y, c->grid_z, c->block_x, *(unsigned long long *)parameters[0]);
  fflush(stdout);
  return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = (void *)3;
  if (quiet()) return 0;
  printf("load %s\n", name);
  fflush(stdout);
  return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 97 ? 232448 : 1024; /* 97: shared memory of a program, opt-in, here that of an H200 */
  return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 100 : 0; /* 0: threads, 3: local bytes, 4: registers */
  return 0;
}
int cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) {
  *(unsigned long long *)data = pointer;
  return 0;
}
int cuGetErrorString(int result, const char **text) {
  *text = "an error of the fake libcuda";
  return 0;
}
int cuModuleLoadData(void **module, const void *image) {
  *module = (void *)2;
  return 0;
}
int cuCtxGetCurrent(void **context) {
  *context = (void *)1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return cuCtxGetCurrent(context); }
int cuDeviceGet(int *device, int ordinal) {
  *device = 0;
  return 0;
}
int cuDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}
int cuOccupancyMaxActiveClusters(int *number, void *function, void *config) {
  *number = 1;
  return 0;
}
int cuCtxGetLimit(size_t *value, int limit) {
  *value = 0;
  return 0;
}
int cuCtxGetDevice(int *device) { return cuDeviceGet(device, 0); }
int cuStreamIsCapturing(void *stream, int *status) {
  *status = 0;
  return 0;
}
int cuModuleUnload(void *module) { return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuPointerGetAttributes(unsigned number, int *attributes, void **data, unsigned long long pointer) { return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
