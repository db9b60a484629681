#include "cpu_launch.h"

// Of torch's C++ only the thread pool is used, by its stable ABI.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusednorm::cpu {
namespace {

// Elements of work that are worth another thread.
constexpr int64_t grain = 16384;

// Outputs from this size on do not stay in the second cache, and are fresh memory more often than
// not, whose page faults then take most of a call: with pages of 2 MB a fourth of that, or less.
constexpr size_t large = size_t(4) << 20;

int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= grain)
    f(0, count);
  else
    torch::stable::parallel_for(0, count, grain, f);
}

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr size_t huge = 2 << 20;
  const size_t start = (reinterpret_cast<size_t>(data) + huge - 1) / huge * huge;
  const size_t end = (reinterpret_cast<size_t>(data) + bytes) / huge * huge;
  madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}

// Rows to be written that lie one after the other.
Rows output(Rows rows, int64_t count) {
  const size_t bytes = rows.data ? count * rows.stride * size_of(rows.dtype) : 0;
  if (bytes >= large) advise_huge_pages(rows.data, bytes);
  rows.beyond_cache = bytes >= large;
  return rows;
}

// Contiguous planes to be written.
Planes output(Planes planes, const Channels& p) {
  const Rows rows = output(Rows{planes.data, p.cols, planes.dtype}, p.rows);
  planes.beyond_cache = rows.beyond_cache;
  return planes;
}

void share_out(Channels& p) {
  p.units_per_image = std::max<int64_t>(1, p.positions() / unit_positions);
  p.units = p.rows / p.positions() * p.units_per_image;
}

// The partial sums of one gradient: [count * rows, N] that are added up to [rows, N or 1].
class Partials {
 public:
  // `gradient` is absent where it is not wanted. `finishes`: the kernel turns a sum to which no
  // others are added into the gradient, and needs no memory.
  Partials(const Term& gradient, int64_t partial_rows, const Problem& p, bool finishes = false) {
    if (gradient.data == nullptr) return;
    rows_ = gradient.stride == 0 ? 1 : p.rows / p.rows_per_sample;
    void* out = const_cast<void*>(gradient.data);
    fold_ = {nullptr,       p.cols, partial_rows / rows_, p.compute, out, gradient.is_number,
             gradient.dtype};
    if (fold_.count == 1 && !fold_.is_number && fold_.dtype == p.compute) {
      data_ = fold_.out;  // nothing to add up, nothing to convert
      return;
    }
    if (fold_.count == 1 && finishes) return;
    memory_.reset(malloc(partial_rows * p.cols * size_of(p.compute)));
    if (!memory_) throw std::bad_alloc();
    fold_.partials = data_ = memory_.get();
  }

  void* data() const { return data_; }

  // What the kernel writes to and, if there is no memory, finishes.
  Fold sums() const {
    Fold sums = fold_;
    sums.partials = data_;
    return sums;
  }

  void fold(const Kernels& kernels) const {
    if (fold_.partials == nullptr) return;
    constexpr int64_t width = 1024;
    const int64_t blocks = fold_.is_number ? 1 : divide_up(fold_.cols, width);
    const int64_t elements = fold_.count * (fold_.is_number ? fold_.cols : width);
    parallel_for(rows_ * blocks, divide_up(grain, elements), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t col = i % blocks * width;
        kernels.fold(fold_, i / blocks, col, std::min(col + width, fold_.cols));
      }
    });
  }

 private:
  struct Free {
    void operator()(void* memory) const { free(memory); }
  };

  Fold fold_;
  int64_t rows_ = 0;
  void* data_ = nullptr;
  std::unique_ptr<void, Free> memory_;
};

}  // namespace

void run(Forward& p) {
  p.h = output(p.h, p.rows);
  p.z = output(p.z, p.rows);
  const Kernels& kernels = cpu::kernels();
  parallel_for(p.rows, divide_up(grain, p.cols),
               [&](int64_t first, int64_t last) { kernels.forward(p, first, last); });
}

void run(Backward& p, const Terms& terms) {
  p.dx = output(p.dx, p.rows);
  p.dresidual = output(p.dresidual, p.rows);
  const int64_t samples = p.rows / p.rows_per_sample;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = std::clamp<int64_t>(p.rows * p.cols / grain, 1, threads);
  p.units_per_sample = std::min(divide_up(wanted, samples), p.rows_per_sample);
  p.units = samples * p.units_per_sample;
  p.tasks = std::min(wanted, p.units);

  const Partials partials[] = {{terms.dweight, p.tasks, p},
                               {terms.dbias, p.tasks, p},
                               {terms.dgate, p.units, p, true},
                               {terms.dscale, p.units, p, true},
                               {terms.dshift, p.units, p, true}};
  p.dweight = partials[0].data();
  p.dbias = partials[1].data();
  p.dgate = partials[2].sums();
  p.dscale = partials[3].sums();
  p.dshift = partials[4].sums();

  const Kernels& kernels = cpu::kernels();
  parallel_for(p.tasks, 1, [&](int64_t first, int64_t last) { kernels.backward(p, first, last); });
  for (const Partials& gradient : partials) gradient.fold(kernels);
}

void run(GatedForward& p) {
  p.z = output(p.z, p.rows);
  const Kernels& kernels = cpu::kernels();
  parallel_for(p.rows * p.groups(), divide_up(grain, p.group_size),
               [&](int64_t first, int64_t last) { kernels.gated_forward(p, first, last); });
}

void run(GatedBackward& p, const Term& dweight, const Term& dbias) {
  p.dx = output(p.dx, p.rows);
  p.dgate_input = output(p.dgate_input, p.rows);
  const int64_t threads = torch::stable::get_num_threads();
  p.tasks = std::min(std::clamp<int64_t>(p.rows * p.cols / grain, 1, threads), p.rows);
  const Partials partials[] = {{dweight, p.tasks, p}, {dbias, p.tasks, p}};
  p.dweight = partials[0].data();
  p.dbias = partials[1].data();
  const Kernels& kernels = cpu::kernels();
  parallel_for(p.tasks, 1,
               [&](int64_t first, int64_t last) { kernels.gated_backward(p, first, last); });
  for (const Partials& gradient : partials) gradient.fold(kernels);
}

void run(ChannelsForward& p) {
  p.z = output(p.z, p);
  share_out(p);
  const Kernels& kernels = cpu::kernels();
  parallel_for(p.units, divide_up(grain, p.cols * unit_positions),
               [&](int64_t first, int64_t last) { kernels.channels_forward(p, first, last); });
}

void run(ChannelsBackward& p, const Terms& terms) {
  p.dx = output(p.dx, p);
  share_out(p);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = std::clamp<int64_t>(p.rows * p.cols / grain, 1, threads);
  p.tasks = std::min(wanted, p.units);
  const Partials partials[] = {{terms.dweight, p.tasks, p}, {terms.dbias, p.tasks, p}};
  p.dweight = partials[0].data();
  p.dbias = partials[1].data();
  const Kernels& kernels = cpu::kernels();
  parallel_for(p.tasks, 1,
               [&](int64_t first, int64_t last) { kernels.channels_backward(p, first, last); });
  for (const Partials& gradient : partials) gradient.fold(kernels);
}

}  // namespace fusednorm::cpu
