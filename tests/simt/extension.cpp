// The functions of csrc/cuda_ops.cpp in a module of their own, with a host in place of the GPU.
#include <device.h>

#include "cuda_ops.h"

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "simt",
    nullptr,
    -1,
    fusednorm::cuda_methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

PyMODINIT_FUNC PyInit_simt() { return PyModule_Create(&module); }

// The shared memory that the last launch asked for.
extern "C" int simt_shared_bytes() { return fusednorm::cuda::simt::running.shared_bytes; }
