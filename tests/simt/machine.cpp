// Runs launches: each thread is a fiber, which goes on until it waits for others. The blocks of a
// cluster live at the same time, the clusters one after another.
#undef _FORTIFY_SOURCE  // its longjmp takes a jump from stack to stack for an error
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

#include "device.h"

namespace fusednorm::cuda::simt {

const Place* here;
Launch running;

namespace {

constexpr int warp_size = 32, max_threads = 1024, max_cluster = 8;
constexpr int max_shared = 227 << 10;  // of one block
constexpr int stack_bytes = 64 << 10, guard_bytes = 4 << 10;

// Passes at barriers and never starts again: what was noted in an earlier launch lies before all
// that happens in this one.
using Time = uint32_t;

constexpr uint16_t several = 0xffff;     // readers
constexpr uint16_t on_its_way = 0x8000;  // what the writer copies has not arrived

// What happened to two bytes of shared memory, the smallest element.
struct Cell {
  Time written, read;  // in the time of the block
  Time read_by_peers;  // in the time of the cluster
  uint16_t writer, reader;
};

struct Block {
  Time time;           // of the last barrier that all its threads have passed
  Time read_by_peers;  // the time of the cluster when another block last read its memory
  int at_barrier, ended;
  int at_shuffle[max_threads / warp_size];
};

struct Copy {
  void* to;
  const void* from;
  int group;
};

struct Thread : Place {
  const char* waits_at;  // null while it can go on
  bool started, ended, waited_for_previous;
  float value;  // given to a shuffle, then got from it
  int mask;
  int groups;  // of copies, committed
  std::vector<Copy> copies;
  jmp_buf start, context;
};

constexpr char at_shuffle[] = "shuffle_xor", at_block[] = "sync_block",
               at_cluster[] = "sync_cluster";

Processors device_in_use = {3, 228 << 10, true};
std::vector<int> processor_groups = {3};  // a cluster runs within one

Time now = 0, cluster_start, cluster_time;
int at_cluster_barrier;
Block blocks[max_cluster];
alignas(16) char memory[max_cluster][max_shared];
Cell cells[max_cluster][max_shared / 2];

Thread threads[max_cluster * max_threads];
int fibers = 0;              // threads that have a stack
std::vector<Thread*> ready;  // the last one goes on first, so that a warp stays in the cache
const std::function<void()>* body;

jmp_buf host;
enum Reason { fiber_made = 1, nobody_is_ready, fault_found };
std::string message;

inline int threads_of_cluster() { return running.threads * running.cluster; }
inline Thread& current() { return *static_cast<Thread*>(const_cast<Place*>(here)); }
inline Block& own_block() { return blocks[here->rank]; }

template <class... Parts>
const char* say(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  message = text.str();
  return message.c_str();
}

template <class... Parts>
[[noreturn]] void fault(const Parts&... parts) {
  say("block ", here->block, ", thread ", here->thread, ": ", parts...);
  _longjmp(host, fault_found);
}

// Fibers.

[[noreturn]] inline void go_on() {
  if (ready.empty()) _longjmp(host, nobody_is_ready);
  Thread& next = *ready.back();
  ready.pop_back();
  here = &next;
  if (next.started) _longjmp(next.context, 1);
  next.started = true;
  _longjmp(next.start, 1);
}

inline void wait(const char* at) {
  current().waits_at = at;
  if (_setjmp(current().context) == 0) go_on();
}

// Lets threads go on: first the one that runs, then the others in order.
void release(Thread* first, int count) {
  for (Thread* thread = first + count; thread-- > first;) {
    thread->waits_at = nullptr;
    if (thread != here) ready.push_back(thread);
  }
}

// A fault leaves the stack as it is: the next launch comes back to the start.
void fiber() {
  if (_setjmp(current().start) == 0) _longjmp(host, fiber_made);
  (*body)();
  current().ended = true;
  if (++own_block().ended == running.threads && own_block().read_by_peers == cluster_time)
    fault("the block ends, and another one has read its shared memory since the last sync_cluster");
  go_on();
}

void make_fibers(int count) {
  for (; fibers < count; ++fibers) {
    char* stack =
        static_cast<char*>(mmap(nullptr, guard_bytes + stack_bytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stack == MAP_FAILED || mprotect(stack, guard_bytes, PROT_NONE) != 0) {
      perror("no memory for the stack of a thread");
      abort();
    }
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack + guard_bytes;
    // Tops of stacks at one place of their pages would share a few lines of the cache.
    context.uc_stack.ss_size = stack_bytes - fibers % 16 * 256;
    makecontext(&context, fiber, 0);
    here = &threads[fibers];
    if (_setjmp(host) == 0) setcontext(&context);
  }
}

// Returns whether no thread waits, or says which one waits for which.
bool nobody_waits() {
  for (Thread* thread = threads; thread < threads + threads_of_cluster(); ++thread) {
    const char* at = thread->waits_at;
    if (at == nullptr) continue;
    const int scope = at == at_shuffle ? warp_size
                      : at == at_block ? running.threads
                                       : threads_of_cluster();
    const Thread* first = threads + (thread - threads) / scope * scope;
    const auto is_there = [at](const Thread& other) { return other.waits_at == at; };
    const Thread* missing = std::find_if_not(first, first + scope, is_there);
    say("block ", thread->block, ", thread ", thread->thread, ": waits at ", at, " with ",
        std::count_if(first, first + scope, is_there), " of ", scope, " threads; thread ",
        missing->thread, " of block ", missing->block, missing->ended ? " has ended" : " waits at ",
        missing->ended ? "" : missing->waits_at);
    return false;
  }
  return true;
}

bool run_cluster(int64_t first_block) {
  cluster_start = cluster_time = ++now;
  at_cluster_barrier = 0;
  for (int rank = 0; rank < running.cluster; ++rank) {
    blocks[rank] = {};
    blocks[rank].time = now;
    memset(memory[rank], 0xff, running.shared_bytes);  // NaN in every type
  }
  ready.clear();
  for (int i = threads_of_cluster(); i-- > 0;) {
    Thread& thread = threads[i];
    thread.thread = i % running.threads;
    thread.rank = i / running.threads;
    thread.block = first_block + thread.rank;
    thread.waits_at = nullptr;
    thread.started = thread.ended = false;
    thread.waited_for_previous = !running.dependent;
    thread.copies.clear();
    ready.push_back(&thread);
  }
  const int reason = _setjmp(host);
  if (reason == 0) go_on();
  return reason == nobody_is_ready && nobody_waits();
}

}  // namespace

float shuffle_xor(float value, int mask) {
  if (mask < 0 || mask >= warp_size) fault("shuffle_xor: expected a mask below 32, got ", mask);
  Thread& self = current();
  self.value = value;
  self.mask = mask;
  int& arrived = own_block().at_shuffle[self.thread / warp_size];
  if (++arrived < warp_size) {
    wait(at_shuffle);
  } else {
    arrived = 0;
    Thread* warp = &self - self.thread % warp_size;
    float got[warp_size];
    for (int lane = 0; lane < warp_size; ++lane) got[lane] = warp[lane ^ warp[lane].mask].value;
    for (int lane = 0; lane < warp_size; ++lane) warp[lane].value = got[lane];
    release(warp, warp_size);
  }
  return current().value;
}

void sync_block() {
  if (++own_block().at_barrier < running.threads) return wait(at_block);
  own_block().at_barrier = 0;
  own_block().time = ++now;
  release(threads + here->rank * running.threads, running.threads);
}

void sync_cluster() {
  if (++at_cluster_barrier < threads_of_cluster()) return wait(at_cluster);
  at_cluster_barrier = 0;
  cluster_time = ++now;
  for (Block& block : blocks) block.time = now;
  release(threads, threads_of_cluster());
}

// Global memory.

namespace {

class Region : public Buffer {
 public:
  explicit Region(const Buffer& buffer) : Buffer(buffer) {
    if (rows > 1 && stride_bytes < row_bytes) {  // rows that overlap are one
      row_bytes += (rows - 1) * stride_bytes;
      rows = 1;
    }
    if (rows <= 1) stride_bytes = row_bytes;
    begin = reinterpret_cast<uintptr_t>(data);
    end = rows > 0 ? begin + (rows - 1) * stride_bytes + row_bytes : begin;
    row_begin = row_end = begin;
    if (written) writers.resize(rows * row_bytes / 2);
  }

  bool has(uintptr_t at, int bytes) {
    if (at >= row_begin && at + bytes <= row_end) return true;
    if (at < begin || at >= end) return false;
    row = (at - begin) / stride_bytes;
    row_begin = begin + row * stride_bytes;
    row_end = row_begin + row_bytes;
    return at + bytes <= row_end;
  }

  uintptr_t distance(uintptr_t at) const {
    return at < begin ? begin - at : at > end ? at - end : 0;
  }

  uintptr_t begin, end;
  int64_t row = 0;  // that was used last
  uintptr_t row_begin, row_end;
  std::vector<uint32_t> writers;  // of each two bytes: 1 + the number of the thread in the grid
};

std::vector<Region> regions, regions_before;  // of this launch, and of the one before

inline void check_alignment(const char* what, uintptr_t at, int bytes) {
  if (at % bytes)
    fault(what, " of ", bytes, " bytes: expected a multiple of ", bytes, " as address, got ",
          at % bytes, " more");
}

[[noreturn]] void fault_outside(const char* what, uintptr_t at, int bytes) {
  for (Region& region : regions)
    if (region.has(at, bytes))
      fault(what, " of ", region.name, ", which the kernel may only ",
            region.written ? "write" : "read");
  const auto nearer = [at](const Region& a, const Region& b) {
    return a.distance(at) < b.distance(at);
  };
  const auto nearest = std::min_element(regions.begin(), regions.end(), nearer);
  if (nearest == regions.end() || nearest->distance(at) > 1 << 20)
    fault(what, " of ", bytes, " bytes at ", reinterpret_cast<void*>(at), ", far from all buffers");
  const int64_t offset = at - nearest->begin;
  const int64_t row = offset < 0 || nearest->row_bytes == 0 ? 0 : offset / nearest->stride_bytes;
  fault(what, " of ", bytes, " bytes at byte ", offset - row * nearest->stride_bytes, " of row ",
        row, " of ", nearest->name, ", which has ", nearest->rows, " rows of ", nearest->row_bytes,
        " bytes");
}

inline Region& region_of(const char* what, const void* pointer, int bytes, bool written) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
  check_alignment(what, at, bytes);
  for (Region& region : regions)
    if (region.written == written && region.has(at, bytes)) return region;
  fault_outside(what, at, bytes);
}

}  // namespace

void check_load(const char* what, const void* from, int bytes) {
  region_of(what, from, bytes, false);
  if (!running.dependent) return;
  for (Region& region : regions_before)
    if (region.written && region.has(reinterpret_cast<uintptr_t>(from), bytes))
      fault(what, " of ", region.name, ", which the kernel before writes: expected load_partial");
}

void check_partial(const void* from, int bytes) {
  region_of("load_partial", from, bytes, false);
  if (!current().waited_for_previous)
    fault("load_partial before wait_for_previous_kernel in a dependent kernel");
}

void wait_for_previous_kernel() { current().waited_for_previous = true; }

void check_store(const void* to, int bytes) {
  Region& region = region_of("store", to, bytes, true);
  const int64_t byte = reinterpret_cast<uintptr_t>(to) - region.row_begin;
  const uint32_t self = uint32_t(here->block * running.threads + here->thread + 1);
  uint32_t* const first = &region.writers[(region.row * region.row_bytes + byte) / 2];
  for (uint32_t* writer = first; writer < first + bytes / 2; ++writer) {
    if (*writer != 0 && *writer != self)
      fault("store to byte ", byte, " of row ", region.row, " of ", region.name,
            ", to which thread ", (*writer - 1) % running.threads, " of block ",
            (*writer - 1) / running.threads, " has stored");
    *writer = self;
  }
}

// Shared memory.

namespace {

inline int64_t offset_of(const void* place) {
  return static_cast<const char*>(place) - memory[here->rank];
}

// The cells of a place in the own block's shared memory.
inline Cell* cells_of(const char* what, const void* place, int bytes) {
  const int64_t byte = offset_of(place);
  if (byte < 0 || byte + bytes > running.shared_bytes)
    fault(what, " of ", bytes, " bytes at byte ", byte, " of shared memory, which has ",
          running.shared_bytes);
  check_alignment(what, byte, bytes);
  return cells[here->rank] + byte / 2;
}

template <class... Parts>
[[noreturn]] void fault_at(const char* what, const Cell* cell, const Parts&... parts) {
  constexpr int cells_of_block = max_shared / 2;
  const int index = int(cell - cells[0]);
  fault(what, " of byte ", index % cells_of_block * 2, " of the shared memory of block ",
        here->block - here->rank + index / cells_of_block, ", ", parts...);
}

inline void check_arrived(const char* what, const Cell* cell) {
  if (cell->written >= cluster_start && cell->writer & on_its_way)
    fault_at(what, cell, "where a copy_async of thread ", cell->writer & ~on_its_way,
             " has not arrived");
}

inline void check_written(const char* what, const Cell* cell) {
  check_arrived(what, cell);
  if (cell->written < cluster_start) fault_at(what, cell, "which nothing has written");
}

inline void note_write(const char* what, Cell* first, int bytes, uint16_t state) {
  const int self = here->thread;
  const Time time = own_block().time;
  for (Cell* cell = first; cell < first + bytes / 2; ++cell) {
    check_arrived(what, cell);
    if (cell->written == time && cell->writer != self)
      fault_at(what, cell, "to which thread ", cell->writer, " has written since the last barrier");
    if (cell->read == time && cell->reader == several)
      fault_at(what, cell, "which several threads have read since the last barrier");
    if (cell->read == time && cell->reader != self)
      fault_at(what, cell, "which thread ", cell->reader, " has read since the last barrier");
    if (cell->read_by_peers == cluster_time)
      fault_at(what, cell, "which another block has read since the last sync_cluster");
    cell->written = time;
    cell->writer = uint16_t(self | state);
  }
}

}  // namespace

char* shared_memory() { return memory[here->rank]; }

void check_shared_load(const char* what, const void* from, int bytes) {
  Cell* const first = cells_of(what, from, bytes);
  const uint16_t self = uint16_t(here->thread);
  const Time time = own_block().time;
  for (Cell* cell = first; cell < first + bytes / 2; ++cell) {
    check_written(what, cell);
    if (cell->written == time && cell->writer != self)
      fault_at(what, cell, "to which thread ", cell->writer, " has written since the last barrier");
    cell->reader = cell->read != time || cell->reader == self ? self : several;
    cell->read = time;
  }
}

void check_shared_store(const void* to, int bytes) {
  note_write("shared_store", cells_of("shared_store", to, bytes), bytes, 0);
}

const void* peer(const void* mine, int bytes, int rank) {
  constexpr char what[] = "peer_load";
  if (rank < 0 || rank >= running.cluster)
    fault(what, ": expected a rank below ", running.cluster, ", got ", rank);
  if (rank == here->rank) {
    check_shared_load(what, mine, bytes);
    return mine;
  }
  Cell* const first = cells[rank] + (cells_of(what, mine, bytes) - cells[here->rank]);
  if (blocks[rank].ended == running.threads)
    fault(what, " from block ", here->block - here->rank + rank, ", which has ended");
  blocks[rank].read_by_peers = cluster_time;
  for (Cell* cell = first; cell < first + bytes / 2; ++cell) {
    check_written(what, cell);
    if (cell->written >= cluster_time)
      fault_at(what, cell, "to which thread ", cell->writer,
               " has written since the last sync_cluster");
    cell->read_by_peers = cluster_time;
  }
  return memory[rank] + offset_of(mine);
}

void copy_async(void* to, const void* from, bool present) {
  static const Words zeros = {};
  constexpr int bytes = sizeof(Words);
  if (present)
    check_load("copy_async", from, bytes);
  else
    from = &zeros;
  note_write("copy_async", cells_of("copy_async", to, bytes), bytes, on_its_way);
  current().copies.push_back({to, from, current().groups});
}

void commit_copies() { ++current().groups; }

void wait_for_copies(int groups) {
  Thread& self = current();
  auto copy = self.copies.begin();
  for (; copy != self.copies.end() && copy->group < self.groups - groups; ++copy) {
    memcpy(copy->to, copy->from, sizeof(Words));
    Cell* const first = cells[self.rank] + offset_of(copy->to) / 2;
    for (Cell* cell = first; cell < first + sizeof(Words) / 2; ++cell) {
      cell->written = own_block().time;
      cell->writer = uint16_t(self.thread);
    }
  }
  self.copies.erase(self.copies.begin(), copy);
}

// Launches.

Processors device() { return device_in_use; }

int resident_clusters(const Launch& how) {
  const int by_registers = 65536 / 128 / how.threads;  // what the backward may have
  const int by_memory = device_in_use.shared_bytes / (how.shared_bytes + 1024);
  const int blocks = std::max(1, std::min(by_registers, by_memory));
  int clusters = 0;
  for (const int processors : processor_groups) clusters += processors * blocks / how.cluster;
  return std::max(1, clusters);  // one runs on the smallest device, too
}

const char* run(const std::vector<Buffer>& buffers, const Launch& how,
                const std::function<void()>& thread) {
  if (how.threads < warp_size || how.threads > max_threads || how.threads % warp_size)
    return say("launch: expected threads to be a multiple of 32 up to 1024, got ", how.threads);
  if (how.cluster < 1 || how.cluster > max_cluster)
    return say("launch: expected a cluster of 1 to 8 blocks, got ", how.cluster);
  if (how.blocks < 1 || how.blocks > INT32_MAX || how.blocks % how.cluster)
    return say("launch: expected whole clusters of ", how.cluster, ", got ", how.blocks, " blocks");
  const int most = device_in_use.shared_bytes - 1024;
  if (how.shared_bytes < 0 || how.shared_bytes > most)
    return say("launch: expected at most ", most, " bytes of shared memory, got ",
               how.shared_bytes);
  if (!device_in_use.have_clusters && (how.cluster > 1 || how.dependent))
    return say("launch: expected a plain launch on a device without clusters");
  running = how;
  body = &thread;
  regions_before = std::move(regions);
  regions.clear();
  for (const Buffer& buffer : buffers) regions.emplace_back(buffer);
  make_fibers(threads_of_cluster());
  for (int64_t block = how.blocks - how.cluster; block >= 0; block -= how.cluster)
    if (!run_cluster(block)) return message.c_str();
  return nullptr;
}

// Chooses the device that the kernels find: 9.0 has 228 KB and clusters, 8.0 has 164 KB, 8.6 and
// 8.9 have 100 KB, and so has 12.0 with clusters.
extern "C" void simt_device(int count, int shared_kilobytes, bool have_clusters) {
  device_in_use = {count, shared_kilobytes << 10, have_clusters};
  processor_groups = {count};
}

// Puts the processors of the device into groups of 16 and of 18, as those of 9.0 are.
extern "C" void simt_groups(int of_16, int of_18) {
  device_in_use.count = of_16 * 16 + of_18 * 18;
  processor_groups.assign(of_16, 16);
  processor_groups.insert(processor_groups.end(), of_18, 18);
}

}  // namespace fusednorm::cuda::simt
