// Shares out the work of the CPU kernels among torch's threads and adds up partial sums.
#pragma once

#include "cpu/layer_norm.h"

namespace fusednorm::cpu {

// The gradients of the terms, to be written where present.
struct Terms {
  Term dgate, dweight, dbias, dscale, dshift;
};

// Neither takes Python's lock nor needs it.
void run(Forward& p);
void run(Backward& p, const Terms& terms);

}  // namespace fusednorm::cpu
