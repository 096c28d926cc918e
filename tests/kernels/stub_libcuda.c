// Stands for libcuda: remembers what it is asked for, as far as the tests look at it. Structures as CUDA's documentation has them.

#include <pthread.h>
#include <stdint.h>
#include <string.h>

typedef struct {
  uint32_t id;
  char padding[4];
  union {
    char bytes[64];
    int32_t programmatic_stream_serialization_allowed;
  } value;
} Attribute;

typedef struct {
  uint32_t grid[3], block[3], shared_bytes;
  void* stream;
  Attribute* attributes;
  uint32_t attribute_count;
} Config;

typedef struct {
  uint32_t grid[3], block[3], shared_bytes, attribute_count, attribute_id, attribute_value;
  uint64_t stream, function, context;
  uint8_t arguments[96];
} Launch;

enum { MOST = 4096, CONTEXT = 0xc0, FUNCTION = 0xf00 };
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Launch launches[MOST];
static int launched, names, allowed[2], sizes[16], offsets[16], parameters;
static char name_of[64][256], failing[64], loaded[64];
static int failure;
static __thread uint64_t contexts[8];
static __thread int depth;

// What the tests say and ask.
void stub_reset(void) { contexts[0] = depth = launched = names = parameters = failure = allowed[0] = allowed[1] = 0; failing[0] = 0; }
void stub_forget_parameters(void) { parameters = 0; }
void stub_parameter(int offset, int size) { offsets[parameters] = offset; sizes[parameters++] = size; }
void stub_fail(const char* function, int status) { strncpy(failing, function, 63); failure = status; }
int stub_launches(void) { return launched; }
const Launch* stub_launch(int i) { return &launches[i]; }
const char* stub_name(uint64_t function) { return name_of[function - FUNCTION]; }
const char* stub_loaded(void) { return loaded; }
int stub_allowed(int i) { return allowed[i]; }

static int status_of(const char* function) { return strcmp(failing, function) ? 0 : failure; }

int cuInit(unsigned flags) { (void)flags; return status_of("cuInit"); }
int cuGetErrorName(int status, const char** name) { *name = status == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_OTHER"; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)(uintptr_t)(CONTEXT + device); return 0; }
int cuCtxPushCurrent_v2(void* context) { contexts[++depth] = (uintptr_t)context; return 0; }
int cuCtxPopCurrent_v2(void** context) { *context = (void*)(uintptr_t)contexts[depth--]; return 0; }
int cuCtxGetCurrent(void** context) { *context = (void*)(uintptr_t)contexts[depth]; return 0; }
int cuCtxSetCurrent(void* context) { contexts[depth] = (uintptr_t)context; return 0; }

int cuModuleLoadData(void** module, const void* image) {
  strncpy(loaded, image, 63);
  *module = (void*)(uintptr_t)contexts[depth];
  return status_of("cuModuleLoadData");
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  (void)module;
  strncpy(name_of[names], name, 255);
  *function = (void*)(uintptr_t)(FUNCTION + names++);
  return status_of("cuModuleGetFunction");
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  (void)function;
  allowed[0] = attribute;
  allowed[1] = value;
  return 0;
}

int cuLaunchKernelEx(const Config* config, void* function, void** arguments, void** extra) {
  if (extra || launched == MOST) return 1;
  const int status = status_of("cuLaunchKernelEx");
  if (status) return status;
  pthread_mutex_lock(&lock);
  Launch* launch = &launches[launched++];
  memset(launch, 0, sizeof *launch);
  memcpy(launch->grid, config->grid, 12);
  memcpy(launch->block, config->block, 12);
  launch->shared_bytes = config->shared_bytes;
  launch->stream = (uintptr_t)config->stream;
  launch->function = (uintptr_t)function;
  launch->context = contexts[depth];
  launch->attribute_count = config->attribute_count;
  if (config->attribute_count) {
    launch->attribute_id = config->attributes[0].id;
    launch->attribute_value = config->attributes[0].value.programmatic_stream_serialization_allowed;
  }
  for (int i = 0; i < parameters; i++) memcpy(launch->arguments + offsets[i], arguments[i], sizes[i]);
  pthread_mutex_unlock(&lock);
  return 0;
}
