#include "kernels.h"
#include "levels.h"

const fusednorm::cpu::Kernels fusednorm::cpu::portable_kernels{"portable", run_forward,
                                                               run_backward, run_fold};
