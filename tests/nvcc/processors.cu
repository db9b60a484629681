// What csrc/cuda/gpu/device.h says of the device in use.
#include "cuda/gpu/device.h"

extern "C" bool have_clusters() {
  fusednorm::cuda::Processors found;
  return fusednorm::cuda::processors(found) == nullptr && found.have_clusters;
}

static __global__ void any_kernel(int) {}

// Clusters of `cluster` blocks that run at a time, or -1.
extern "C" int resident(int cluster, int shared_bytes) {
  fusednorm::cuda::Launch how{cluster, 128, shared_bytes, cluster};
  int found = 0;
  return fusednorm::cuda::resident_clusters(any_kernel, how, found) == nullptr ? found : -1;
}
