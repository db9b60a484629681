#include "kernels.h"
#include "levels.h"

const fusednorm::cpu::Kernels fusednorm::cpu::avx2_kernels{"avx2", run_forward, run_backward,
                                                           run_fold};
