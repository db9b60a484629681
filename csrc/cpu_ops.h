// The functions of the extension that run the CPU kernels.
#pragma once

#include <Python.h>

namespace fusednorm {

// Ends with an empty one.
extern PyMethodDef cpu_methods[];

}  // namespace fusednorm
