// Shares out the work of the CPU kernels among torch's threads and adds up partial sums.
#pragma once

#include "cpu/layer_norm.h"

namespace fusednorm::cpu {

// The gradients of the terms, to be written where present.
struct Terms {
  Term dgate, dweight, dbias, dscale, dshift;
};

// None takes Python's lock or needs it.
void run(Forward& p);
void run(Backward& p, const Terms& terms);
void run(GatedForward& p);
void run(GatedBackward& p, const Term& dweight, const Term& dbias);
void run(ChannelsForward& p);
void run(ChannelsBackward& p, const Terms& terms);

}  // namespace fusednorm::cpu
