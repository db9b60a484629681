// fusednorm::layer_norm_fwd and _bwd without Python between a graph and a kernel.
#pragma once

#include <Python.h>

namespace fusednorm {

// Ends with an empty one.
extern PyMethodDef own_operator_methods[];

}  // namespace fusednorm
