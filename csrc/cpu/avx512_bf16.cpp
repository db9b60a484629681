#include "kernels.h"
#include "levels.h"

const fusednorm::cpu::Kernels fusednorm::cpu::avx512_bf16_kernels{"avx512_bf16", run_forward,
                                                                  run_backward, run_fold};
