// A CUDA runtime without a device behind it: it answers for the device and the code that a test
// chooses.
#include <cuda_runtime_api.h>

#include <cstdlib>

static int major_of_device = 0, ptx_of_code = 0;

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
