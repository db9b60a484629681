// What csrc/cuda/gpu/device.h says of the device in use.
#include "cuda/gpu/device.h"

extern "C" bool have_clusters() {
  fusednorm::cuda::Processors found;
  return fusednorm::cuda::processors(found) == nullptr && found.have_clusters;
}
