// A CUDA driver without a device: it loads what it is given, notes every launch with its arguments
// by value, runs nothing, and refuses what a GPU of compute capability 9.0 would refuse.
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { SUCCESS, INVALID_VALUE, INVALID_IMAGE = 200, INVALID_CONTEXT, NOT_FOUND = 500 };
enum { MOST_PARAMETERS = 48, MOST_FUNCTIONS = 4096, KEPT = 64 };
enum { MOST_SHARED = 232448, SHARED_UNASKED = 49152, MOST_THREADS = 1024 };

typedef int CUresult;

typedef struct {
  unsigned id, padding, value[16];
} Attribute;

typedef struct {
  unsigned grid[3], block[3], shared;
  void* stream;
  const Attribute* attributes;
  unsigned attribute_count;
} Config;

typedef struct {
  char name[128];
  int parameters;
  uint16_t sizes[MOST_PARAMETERS];
  int shared;  // dynamic shared memory that was asked for
} Function;

typedef struct {
  const Function* function;
  unsigned grid[3], block[3], shared;
  unsigned attributes;  // a number for all of them
  void* stream;
  uint64_t words[MOST_PARAMETERS];
} Launch;

// What tests read; launch number i is in fake_kept[i % KEPT].
uint64_t fake_launches = 0, fake_loads = 0;
Launch fake_kept[KEPT];
int fake_refusal = 0;  // what every launch is answered with, if it is not 0

static Function functions[MOST_FUNCTIONS];
static _Thread_local void* current = NULL;  // a thread has no context until it is given one

// The parameters of a kernel as its machine code describes them: section .nv.info.<name>.
static int read_parameters(const uint8_t* image, Function* function) {
  uint64_t sections;
  uint16_t count, names;
  if (memcmp(image, "\177ELF\2", 5) != 0) return 0;
  memcpy(&sections, image + 40, 8);
  memcpy(&count, image + 60, 2);
  memcpy(&names, image + 62, 2);
  const uint8_t* const table = image + sections;
  uint64_t strings;
  memcpy(&strings, table + 64 * names + 24, 8);
  for (int i = 0; i < count; ++i) {
    uint32_t name;
    uint64_t offset, size;
    memcpy(&name, table + 64 * i, 4);
    memcpy(&offset, table + 64 * i + 24, 8);
    memcpy(&size, table + 64 * i + 32, 8);
    const char* const section = (const char*)image + strings + name;
    if (strncmp(section, ".nv.info.", 9) != 0) continue;
    snprintf(function->name, sizeof function->name, "%s", section + 9);
    // Four bytes, format, attribute and a value; format 4 has that many bytes behind them.
    const uint8_t *at = image + offset, *const end = at + size;
    while (at < end) {
      uint16_t value;
      memcpy(&value, at + 2, 2);
      if (at[0] == 4 && at[1] == 0x17) {
        uint16_t ordinal;
        uint32_t properties;
        memcpy(&ordinal, at + 8, 2);
        memcpy(&properties, at + 12, 4);
        if (ordinal >= MOST_PARAMETERS) return 0;
        function->sizes[ordinal] = properties >> 18;
        if (ordinal >= function->parameters) function->parameters = ordinal + 1;
      }
      at += at[0] == 4 ? 4 + value : 4;
    }
    return 1;
  }
  return 0;
}

CUresult cuModuleLoadData(void** module, const void* image) {
  if (fake_loads == MOST_FUNCTIONS) return INVALID_VALUE;
  Function* const function = &functions[fake_loads];
  if (!read_parameters(image, function)) return INVALID_IMAGE;
  ++fake_loads;
  *module = function;
  return SUCCESS;
}

CUresult cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = module;
  return strcmp(((Function*)module)->name, name) == 0 ? SUCCESS : NOT_FOUND;
}

CUresult cuModuleUnload(void* module) { return SUCCESS; }

CUresult cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == 0 ? MOST_THREADS : attribute == 4 ? 32 : 0;  // threads; registers
  return SUCCESS;
}

CUresult cuFuncSetAttribute(void* function, int attribute, int value) {
  // Dynamic shared memory; newer devices have more attributes.
  if (attribute != 8 || value > MOST_SHARED) return INVALID_VALUE;
  ((Function*)function)->shared = value;
  return SUCCESS;
}

CUresult cuFuncSetCacheConfig(void* function, int value) { return SUCCESS; }

CUresult cuLaunchKernelEx(const Config* config, void* f, void** parameters, void** extra) {
  const Function* const function = f;
  if (fake_refusal != 0) return fake_refusal;
  if (current == NULL) return INVALID_CONTEXT;
  uint64_t threads = 1;
  for (int i = 0; i < 3; ++i) {
    threads *= config->block[i];
    if (config->grid[i] == 0 || config->grid[i] > (i == 0 ? 2147483647u : 65535u))
      return INVALID_VALUE;
  }
  if (threads == 0 || threads > MOST_THREADS) return INVALID_VALUE;
  const unsigned shared = function->shared > SHARED_UNASKED ? function->shared : SHARED_UNASKED;
  if (config->shared > shared) return INVALID_VALUE;

  Launch* const launch = &fake_kept[fake_launches++ % KEPT];
  memset(launch, 0, sizeof *launch);
  launch->function = function;
  memcpy(launch->grid, config->grid, sizeof launch->grid);
  memcpy(launch->block, config->block, sizeof launch->block);
  launch->shared = config->shared;
  for (unsigned i = 0; i < config->attribute_count; ++i) {
    const Attribute* const given = &config->attributes[i];
    const unsigned words[] = {given->id, given->value[0], given->value[1], given->value[2]};
    for (int j = 0; j < 4; ++j) launch->attributes = 31 * launch->attributes + words[j] + 1;
  }
  launch->stream = config->stream;
  for (int i = 0; i < function->parameters; ++i)
    memcpy(&launch->words[i], parameters[i], function->sizes[i]);
  return SUCCESS;
}

CUresult cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                        unsigned by, unsigned bz, unsigned shared, void* stream, void** parameters,
                        void** extra) {
  const Config config = {{gx, gy, gz}, {bx, by, bz}, shared, stream, NULL, 0};
  return cuLaunchKernelEx(&config, function, parameters, extra);
}

CUresult cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 8:  // shared memory of a block
      *value = SHARED_UNASKED;
      break;
    case 97:  // that it may ask for
      *value = MOST_SHARED;
      break;
    case 10:  // threads of a warp
      *value = 32;
      break;
    case 12:  // registers of a block
      *value = 65536;
      break;
    case 16:  // processors
      *value = 132;
      break;
    case 75:  // compute capability
      *value = 9;
      break;
    case 76: *value = 0; break;
    default:  // clock rates
      *value = 1000000;
  }
  return SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == INVALID_VALUE ? "invalid argument" : "an error of the fake driver";
  return SUCCESS;
}

// A device's address serves as a host's.
CUresult cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) {
  *(uint64_t*)data = pointer;
  return SUCCESS;
}

CUresult cuInit(unsigned flags) { return SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
CUresult cuDeviceGet(int* device, int ordinal) { return *device = ordinal, SUCCESS; }
CUresult cuCtxGetCurrent(void** context) { return *context = current, SUCCESS; }
CUresult cuCtxGetDevice(int* device) { return *device = 0, SUCCESS; }
CUresult cuCtxSetCurrent(void* context) { return current = context, SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(void** context, int device) {
  return *context = functions, SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }
CUresult cuStreamIsCapturing(void* stream, int* status) { return *status = 0, SUCCESS; }

// Triton's launcher looks these up when it loads, and calls them for what no kernel here has.
CUresult cuCtxGetLimit(size_t* value, int limit) { return *value = 1 << 20, SUCCESS; }
CUresult cuCtxSetLimit(int limit, size_t value) { return SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* clusters, void* f, void* config) { return NOT_FOUND; }
CUresult cuTensorMapEncodeTiled(void) { return NOT_FOUND; }
CUresult cuTensorMapEncodeIm2col(void) { return NOT_FOUND; }
