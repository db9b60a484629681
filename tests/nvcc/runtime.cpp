// A CUDA runtime without a device behind it: it answers for the device and the code that a test
// chooses.
#include <cuda_runtime_api.h>

#include <cstdlib>

static int major_of_device = 0, ptx_of_code = 0, allowed_bytes = 48 << 10, asked = 0;

extern "C" {

void choose(int device, int code) {
  major_of_device = device;
  ptx_of_code = code;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? major_of_device : 132;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  *found = {};
  found->ptxVersion = ptx_of_code;
  return cudaSuccess;
}
int questions() { return asked; }

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) allowed_bytes = value;
  return cudaSuccess;
}
// 1000 and the blocks of a cluster: what was asked about can be read from the answer.
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*,
                                           const cudaLaunchConfig_t* config) {
  ++asked;
  if (int(config->dynamicSmemBytes) > allowed_bytes || config->numAttrs != 1 ||
      config->attrs[0].id != cudaLaunchAttributeClusterDimension)
    return cudaErrorInvalidValue;
  *clusters = 1000 + int(config->attrs[0].val.clusterDim.x);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  ++asked;
  *blocks = 3;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return ""; }

// What nvcc's code refers to, and calls when it is loaded; a launch would end the program.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {}
char __cudaInitModule(void**) { abort(); }
void __cudaGetKernel() { abort(); }
void __cudaLaunchKernel() { abort(); }
void __cudaPopCallConfiguration() { abort(); }
}
