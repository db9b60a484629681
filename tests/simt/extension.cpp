// The functions of csrc/cuda_ops.cpp in a module of their own, with a host in place of the GPU.
#include <device.h>

#include "cuda/layer_norm.h"
#include "cuda_ops.h"

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "simt",
    nullptr,
    -1,
    fusednorm::cuda_methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

PyMODINIT_FUNC PyInit_simt() { return PyModule_Create(&module); }

// The shared memory that the last launch asked for.
extern "C" int simt_shared_bytes() { return fusednorm::cuda::simt::running.shared_bytes; }

// How many clusters a backward of bfloat16 has, and how large they are; how many run at a time.
extern "C" int simt_clusters(int64_t rows, int64_t cols, bool wants_sums, int* cluster,
                             int* resident) {
  using namespace fusednorm::cuda;
  Backward p;
  p.rows = rows;
  p.cols = cols;
  p.h.dtype = fusednorm::DType::bf16;
  Shares shares;
  if (share_out(p, wants_sums, shares)) return -1;
  *cluster = shares.cluster;
  *resident = simt::resident_clusters(
      {shares.cluster, shares.threads, shares.shared_bytes, shares.cluster});
  return int(shares.clusters);
}
