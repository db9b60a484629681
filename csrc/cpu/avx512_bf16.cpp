#include "channels.h"
#include "gated.h"
#include "levels.h"

const fusednorm::cpu::Kernels fusednorm::cpu::avx512_bf16_kernels{
    "avx512_bf16",     run_forward,        run_backward,         run_fold,
    run_gated_forward, run_gated_backward, run_channels_forward, run_channels_backward};
