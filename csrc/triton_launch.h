// Starts kernels that Triton has compiled, as its own launcher would, without Python on the way.
//
// A plan is what the launchers of fusednorm/triton_kernels did for one layout of the arguments:
// their kernels in order, each with its grid and its arguments. Nothing here knows a tile, a grid
// or an argument of a kernel: a call whose layout is that of a plan repeats it with its own
// pointers, and one that has none is done, and handed over, by Python.
#pragma once

#include <Python.h>

#include "boxed.h"
#include "calls.h"
#include "gated_calls.h"

namespace fusednorm {

// Repeats a call of the dispatcher's on the device of `like`, without Python; returns false where
// Python has to serve it.
bool repeat(ForwardCall<boxed::Layout>& call, AtenTensorHandle like);
bool repeat(BackwardCall<Backward, boxed::Layout>& call, AtenTensorHandle like);
bool repeat(GatedForwardCall<boxed::Layout>& call, AtenTensorHandle like);
bool repeat(GatedBackwardCall<GatedBackward, boxed::Layout>& call, AtenTensorHandle like);

// Ends with an empty one.
extern PyMethodDef triton_methods[];

}  // namespace fusednorm
