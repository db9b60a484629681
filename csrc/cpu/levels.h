// The builds of kernels.h and gated.h, one for each instruction set.
#pragma once

#include "layer_norm.h"

namespace fusednorm::cpu {

extern const Kernels portable_kernels;  // what every processor of the architecture has
#if defined(FUSEDNORM_X86)
extern const Kernels avx2_kernels;         // with FMA and F16C
extern const Kernels avx512_kernels;       // F, BW, DQ and VL
extern const Kernels avx512_bf16_kernels;  // and BF16
#endif

}  // namespace fusednorm::cpu
