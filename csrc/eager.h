// The functions of the extension that look at arguments before anything runs.
#pragma once

#include <Python.h>

namespace fusednorm {

// Ends with an empty one.
extern PyMethodDef eager_methods[];

}  // namespace fusednorm
