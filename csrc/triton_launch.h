// Starts kernels that Triton has compiled, as its own launcher would, without Python on the way.
//
// A plan is what the launchers of fusednorm/triton_kernels did for one layout of the arguments:
// their kernels in order, each with its grid and its arguments. Nothing here knows a tile, a grid
// or an argument of a kernel: a call whose layout is that of a plan repeats it with its own
// pointers, and one that has none is done, and handed over, by Python.
#pragma once

#include <Python.h>

namespace fusednorm {

// Ends with an empty one.
extern PyMethodDef triton_methods[];

}  // namespace fusednorm
