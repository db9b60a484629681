// The functions of the extension that put the CPU kernels below torch's operators.
#pragma once

#include <Python.h>

namespace fusednorm {

// Ends with an empty one.
extern PyMethodDef operator_methods[];

}  // namespace fusednorm
