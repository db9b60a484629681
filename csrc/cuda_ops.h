// The functions of the extension that launch the CUDA kernels.
#pragma once

#include <Python.h>

namespace fusednorm {

// Ends with an empty one.
extern PyMethodDef cuda_methods[];

}  // namespace fusednorm
