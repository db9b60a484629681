// All that the kernels know of the machine: types, threads, memory, barriers and launches.
//
// The kernels include <device.h> and touch memory through it alone. This one is a GPU; that of
// tests/simt has the same names and is a host which runs the threads of a block one after another
// and checks what they do.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <tuple>

#define DEVICE __device__ __forceinline__
// A kernel of blocks of `threads` threads, of which `blocks` fit a processor.
#define KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// The parameter of a kernel, which stays in constant memory.
#define PARAMETER(type) const __grid_constant__ type

namespace fusednorm::cuda {

// Whether blocks of a cluster can share a row on what is compiled for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool can_split = false;
#else
constexpr bool can_split = true;
#endif

// Elements as they lie in memory.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// 16 bytes of elements.
struct alignas(16) Words {
  uint32_t at[4];
};

// Two 16-bit elements of a word, the low one first.
template <class T>
DEVICE void unpack(uint32_t word, float& low, float& high);
template <>
DEVICE void unpack<BFloat16>(uint32_t word, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}
template <>
DEVICE void unpack<Float16>(uint32_t word, float& low, float& high) {
  __half2 pair;
  memcpy(&pair, &word, sizeof word);
  const float2 values = __half22float2(pair);
  low = values.x;
  high = values.y;
}

// Rounds to nearest even.
template <class T>
DEVICE uint32_t pack(float low, float high);
template <>
DEVICE uint32_t pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
template <>
DEVICE uint32_t pack<Float16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// The compiler computes the address here, once, and not again for each access that a test guards.
template <class V>
DEVICE V* settled(V* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// To a unit of the last place.
DEVICE float reciprocal(float value) {
  asm("rcp.approx.f32 %0, %0;" : "+f"(value));
  return value;
}
DEVICE float inverse_sqrt(float value) {
  const float near = rsqrtf(value);  // to two, which one step of Newton's mends
  const float rest = __fmaf_rn(-near * value, near, 1.0f);
  return rest == rest ? __fmaf_rn(0.5f * near, rest, near) : near;  // not of 0 or infinity
}

// Threads.
DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_threads() { return blockDim.x; }
DEVICE int64_t block_index() { return blockIdx.x; }

// Blocks of one cluster: consecutive blocks, which run at the same time and read each other's
// shared memory. Without clusters every block is one.
DEVICE int cluster_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}
DEVICE int64_t cluster_index() {
#if __CUDA_ARCH__ >= 900
  uint32_t index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
#else
  return blockIdx.x;
#endif
}
DEVICE int rank_in_cluster() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// Returns the value of the thread whose number in the warp differs in the bits of `mask`. All
// threads of a warp call it together.
DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// All threads of the block, or of the cluster, have come here; what they wrote to shared memory
// before can be read after.
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  // Not the aligned form: the threads of a warp may come from loops of different lengths.
  asm volatile(
      "barrier.cluster.arrive.release;\n\t"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
#else
  __syncthreads();
#endif
}

// Global memory that no thread writes while the kernel runs.
template <class V>
DEVICE V load(const V* from) {
  return __ldg(from);
}
template <>
DEVICE Words load(const Words* from) {
  const uint4 value = __ldg(reinterpret_cast<const uint4*>(from));
  return {value.x, value.y, value.z, value.w};
}
// The same where nobody reads it again: it takes no place in the first cache.
DEVICE Words load_once(const Words* from) {
  Words value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.at[0]), "=r"(value.at[1]), "=r"(value.at[2]), "=r"(value.at[3])
               : "l"(from));
  return value;
}
// Global memory that the kernel before has written, after wait_for_previous_kernel().
DEVICE float load_partial(const float* from) { return __ldcg(from); }

template <class V>
DEVICE void store(V* to, V value) {
  *to = value;
}
template <>
DEVICE void store(Words* to, Words value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.at[0]),
               "r"(value.at[1]), "r"(value.at[2]), "r"(value.at[3])
               : "memory");
}

// The shared memory of the block from a byte on, which the launch gave it.
template <class V>
DEVICE V* shared(int byte) {
  extern __shared__ __align__(16) char memory[];
  return reinterpret_cast<V*>(memory + byte);
}
template <class V>
DEVICE V shared_load(const V* from) {
  return *from;
}
template <class V>
DEVICE void shared_store(V* to, V value) {
  *to = value;
}
// What lies at the same place in the shared memory of another block of the cluster.
DEVICE float peer_load(const float* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  const uint32_t address = uint32_t(__cvta_generic_to_shared(mine));
  float value;
  asm volatile(
      "{\n\t.reg .u32 there;\n\t"
      "mapa.shared::cluster.u32 there, %1, %2;\n\t"
      "ld.shared::cluster.f32 %0, [there];\n\t}"
      : "=f"(value)
      : "r"(address), "r"(rank)
      : "memory");
  return value;
#else
  return *mine;
#endif
}

// Copies 16 bytes from global to shared memory while the thread goes on, or zeros where they are
// not `present`, and reads nothing. The copies since the last commit_copies() are one group;
// wait_for_copies<K>() returns when all groups of the thread but the K last ones have arrived. Only
// the thread that copied sees them then.
DEVICE void copy_async(Words* to, const Words* from, bool present) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))),
      "l"(from), "r"(present ? 16 : 0)
      : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int K>
DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(K) : "memory");
}

// The next kernel of the stream, if it was launched as `dependent`, may start. It calls
// wait_for_previous_kernel() before it reads what this one writes.
DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The host's side. Functions that can fail return what is wrong, or null.
struct Launch {
  int64_t blocks;
  int threads;
  int shared_bytes = 0;
  int cluster = 1;         // blocks of a cluster
  bool dependent = false;  // may start when the kernel before allows it
};

inline const char* error_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

struct Processors {
  int count;
  int shared_bytes;    // of one processor
  bool have_clusters;  // and dependent launches
};

// Runs nowhere: its code says for what the kernels beside it were compiled.
static __global__ void code_in_use() {}

// Of the device in use.
inline const char* processors(Processors& found) {
  int device = 0, major = 0;
  cudaFuncAttributes code = {};
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&found.count, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                                   device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(code_in_use));
  // PTX for 8.0 that the driver compiled for a later device has no clusters in it and waits for no
  // kernel before.
  found.have_clusters = major >= 9 && code.ptxVersion >= 90;
  return error_of(error);
}

// What CUDA is told of a launch; it points to its own attributes.
struct Configuration {
  Configuration(const Launch& how, void* stream) {
    config.gridDim = dim3(unsigned(how.blocks));
    config.blockDim = dim3(how.threads);
    config.dynamicSmemBytes = how.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    if (how.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {unsigned(how.cluster), 1, 1};
    }
    if (how.dependent) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  Configuration(const Configuration&) = delete;

  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
};

inline cudaError_t allow_shared_memory(const void* kernel, const Launch& how) {
  if (how.shared_bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              how.shared_bytes);
}

// How many clusters of a launch the device in use runs at a time. Each thread keeps the answers.
template <class P>
const char* resident_clusters(void (*kernel)(P), const Launch& how, int& found) {
  static thread_local std::map<std::tuple<const void*, int, int, int, int>, int> known;
  const void* const code = reinterpret_cast<const void*>(kernel);
  int device = 0, count = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error_of(error);
  const auto [at, is_new] =
      known.try_emplace({code, device, how.threads, how.shared_bytes, how.cluster}, 0);
  if (is_new) {
    cudaError_t error = allow_shared_memory(code, how);
    if (error == cudaSuccess && how.cluster > 1) {
      const Configuration configuration(how, nullptr);
      error = cudaOccupancyMaxActiveClusters(&at->second, code, &configuration.config);
    } else if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at->second, code, how.threads,
                                                            how.shared_bytes);
      if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
      at->second *= count;
    }
    if (error != cudaSuccess) {
      known.erase(at);
      return error_of(error);
    }
  }
  found = at->second;
  return nullptr;
}

template <class P>
const char* launch(void (*kernel)(P), const P& parameter, const Launch& how, void* stream) {
  const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(kernel), how);
  if (error != cudaSuccess) return error_of(error);
  const Configuration configuration(how, stream);
  return error_of(cudaLaunchKernelEx(&configuration.config, kernel, parameter));
}

}  // namespace fusednorm::cuda
