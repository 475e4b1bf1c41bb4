// The part of CUDA that csrc/cuda uses, on the CPU: the kernels themselves run, block by block, their threads as
// fibers. An E2CM_EMULATED build finds this file in the place of the toolkit's <cuda_runtime.h>.
//
// A fiber runs until a barrier of its block or its warp. Threads and blocks run in the order of
// emulation::state().order: forwards, backwards or shuffled; results that depend on it have a race. Shared memory is an
// allocation of its own, so that AddressSanitizer sees accesses beyond it, and starts as NaNs. A deadlock (a barrier
// that some threads of a block never reach) is reported, and ends the program.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
inline const char* cudaGetErrorString(cudaError_t error) {
  return error ? "invalid configuration argument" : "no error";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 3, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  return std::memset(memory, value, bytes), cudaSuccess;
}

namespace e2cm::emulation {

enum class Order { forwards, backwards, shuffled };

struct Fiber {
  ucontext_t context;  // to start
  jmp_buf position;    // to resume: faster than swapcontext, which makes a system call each time
  bool started = false;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  dim3 thread;
  unsigned number = 0;
  unsigned waits_for = 0;  // 0: nothing, 1: its warp, 2: its block
  bool done = false;
};

// The values that the lanes of a warp exchange. Two sets of slots, used alternately: a lane may be one exchange ahead.
struct Warp {
  uint32_t slots[2][32][4];
  unsigned lanes = 0, arrived = 0;
};

struct State {
  Order order = Order::forwards;
  unsigned seed = 1;
  long long launches = 0, bytes_of_shared_memory = 0;
  dim3 grid, block, block_at;
  Fiber* current = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned> exchanges;  // so far, per thread
  unsigned arrived = 0, alive = 0;
  jmp_buf scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  std::unique_ptr<char[]> shared;
  const std::function<void()>* body = nullptr;
};

inline State& state() {
  static thread_local State only;
  return only;
}

inline char* shared_memory() { return state().shared.get(); }

constexpr size_t kStack = size_t{1} << 17;

inline void to_scheduler(bool ended) {
  State& s = state();
  Fiber* const self = s.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ended ? nullptr : &self->fake_stack, s.scheduler_stack, s.scheduler_stack_size);
#endif
  if (!_setjmp(self->position)) _longjmp(s.scheduler, 1);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
  static_cast<void>(ended);
}

inline void release_if_complete(unsigned number) {
  State& s = state();
  Warp& warp = s.warps[number / 32];
  if (warp.arrived > 0 && warp.arrived == warp.lanes) {
    warp.arrived = 0;
    const unsigned first = number / 32 * 32;
    for (unsigned i = first; i < std::min<unsigned>(first + 32, static_cast<unsigned>(s.fibers.size())); ++i)
      if (s.fibers[i].waits_for == 1) s.fibers[i].waits_for = 0;
  }
  if (s.arrived > 0 && s.arrived == s.alive) {
    s.arrived = 0;
    for (Fiber& fiber : s.fibers)
      if (fiber.waits_for == 2) fiber.waits_for = 0;
  }
}

inline void wait_for(unsigned what) {
  State& s = state();
  s.current->waits_for = what;
  ++(what == 1 ? s.warps[s.current->number / 32].arrived : s.arrived);
  release_if_complete(s.current->number);
  if (s.current->waits_for) to_scheduler(false);
}

inline void entry() {
  State& s = state();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &s.scheduler_stack, &s.scheduler_stack_size);
#endif
  (*s.body)();
  Fiber& self = *state().current;
  self.done = true;
  --state().alive;
  --state().warps[self.number / 32].lanes;
  release_if_complete(self.number);
  to_scheduler(true);
}

// Runs a fiber until it waits or ends.
inline void run_fiber(Fiber& fiber) {
  State& s = state();
  s.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&s.scheduler_fake_stack, fiber.stack.get(), kStack);
#endif
  if (!_setjmp(s.scheduler)) {
    if (fiber.started) _longjmp(fiber.position, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(state().scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline std::vector<unsigned> in_order(unsigned count, unsigned salt) {
  std::vector<unsigned> all(count);
  std::iota(all.begin(), all.end(), 0u);
  if (state().order == Order::backwards) std::reverse(all.begin(), all.end());
  if (state().order == Order::shuffled) std::shuffle(all.begin(), all.end(), std::mt19937(state().seed + salt));
  return all;
}

inline void run_block(const dim3& at) {
  State& s = state();
  s.block_at = at;
  s.shared.reset(new char[s.bytes_of_shared_memory]);
  std::memset(s.shared.get(), 0xff, s.bytes_of_shared_memory);
  const unsigned threads = s.block.x * s.block.y * s.block.z;
  if (s.fibers.size() != threads) s.fibers = std::vector<Fiber>(threads);
  s.warps.assign((threads + 31) / 32, Warp());
  s.exchanges.assign(threads, 0);
  s.arrived = 0, s.alive = threads;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = s.fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    fiber.number = i, fiber.waits_for = 0, fiber.done = fiber.started = false;
    fiber.thread = dim3(i % s.block.x, i / s.block.x % s.block.y, i / s.block.x / s.block.y);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
    ++s.warps[i / 32].lanes;
  }
  const std::vector<unsigned> order = in_order(threads, at.x * 31 + at.y * 17 + at.z);
  while (s.alive > 0) {
    bool any = false;
    for (const unsigned i : order) {
      Fiber& fiber = s.fibers[i];
      if (fiber.done || fiber.waits_for) continue;
      any = true;
      run_fiber(fiber);
    }
    if (!any) {
      std::fprintf(stderr, "emulation: deadlock: some threads of block (%u, %u, %u) wait for others forever\n", at.x,
                   at.y, at.z);
      std::abort();
    }
  }
}

// Refuses the launch configurations that CUDA refuses.
inline cudaError_t run(const dim3& grid, const dim3& block, size_t shared, const std::function<void()>& body) {
  State& s = state();
  const unsigned threads = block.x * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || !threads || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535 ||
      threads > 1024 || block.z > 64 || shared > 48 * 1024)
    return cudaErrorInvalidConfiguration;
  s.grid = grid, s.block = block;
  s.bytes_of_shared_memory = static_cast<long long>(shared);
  s.body = &body;
  ++s.launches;
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (const unsigned i : in_order(blocks, 7)) run_block(dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y));
  return cudaSuccess;
}

// Writes the lane's slot, waits for the warp, and reads the slot of lane `from`.
template <class Value>
Value exchange(Value value, unsigned from) {
  static_assert(sizeof(Value) <= 16);
  State& s = state();
  const unsigned self = s.current->number, turn = s.exchanges[self]++ % 2;
  Warp& warp = s.warps[self / 32];
  std::memcpy(warp.slots[turn][self % 32], &value, sizeof value);
  wait_for(1);
  Value other;
  std::memcpy(&other, s.warps[self / 32].slots[turn][from % 32], sizeof other);
  return other;
}

inline unsigned lane() { return state().current->number % 32; }

// mma.m16n8k8, with the lanes' layout that csrc/cuda/gemm.cu describes. The order of the additions is not the GPU's.
inline void mma_m16n8k8(float (&sums)[4], const float (&a)[4], const float (&b)[2]) {
  struct Numbers {
    float values[4];
  };
  State& s = state();
  const unsigned self = s.current->number, group = lane() / 4, member = lane() % 4;
  const unsigned turn = s.exchanges[self] % 2;
  exchange(Numbers{{a[0], a[1], a[2], a[3]}}, lane());
  float rows[2][8], classes[2][8];
  for (unsigned t = 0; t < 4; ++t) {
    Numbers of_lane;
    std::memcpy(&of_lane, s.warps[self / 32].slots[turn][4 * group + t], sizeof of_lane);
    for (unsigned i = 0; i < 4; ++i) rows[i % 2][t + i / 2 * 4] = of_lane.values[i];
  }
  exchange(Numbers{{b[0], b[1], 0, 0}}, lane());
  for (unsigned n = 0; n < 2; ++n) {
    for (unsigned t = 0; t < 4; ++t) {
      Numbers of_lane;
      std::memcpy(&of_lane, s.warps[self / 32].slots[1 - turn][4 * (2 * member + n) + t], sizeof of_lane);
      for (unsigned i = 0; i < 2; ++i) classes[n][t + i * 4] = of_lane.values[i];
    }
  }
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned k = 0; k < 8; ++k) sums[i] += rows[i / 2][k] * classes[i % 2][k];
}

}  // namespace e2cm::emulation

#define threadIdx (e2cm::emulation::state().current->thread)
#define blockIdx (e2cm::emulation::state().block_at)
#define blockDim (e2cm::emulation::state().block)
#define gridDim (e2cm::emulation::state().grid)

inline void __syncthreads() { e2cm::emulation::wait_for(2); }
inline void __syncwarp() { e2cm::emulation::wait_for(1); }
inline void __threadfence() {}

template <class Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
  return e2cm::emulation::exchange(value, e2cm::emulation::lane() ^ static_cast<unsigned>(mask));
}
template <class Value>
Value __shfl_sync(unsigned, Value value, int from) {
  return e2cm::emulation::exchange(value, static_cast<unsigned>(from));
}
template <class Value>
Value __shfl_up_sync(unsigned, Value value, unsigned delta) {
  const unsigned lane = e2cm::emulation::lane();
  return e2cm::emulation::exchange(value, lane < delta ? lane : lane - delta);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned all = 0;
  const unsigned lane = e2cm::emulation::lane();
  // One exchange, after which the slots of all lanes can be read.
  e2cm::emulation::State& s = e2cm::emulation::state();
  const unsigned self = s.current->number, turn = s.exchanges[self] % 2;
  e2cm::emulation::exchange<uint32_t>(predicate != 0, lane);
  for (unsigned i = 0; i < 32; ++i) all |= (s.warps[self / 32].slots[turn][i][0] & 1u) << i;
  return all;
}
inline int __ffs(unsigned value) { return __builtin_ffs(static_cast<int>(value)); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address += value;
  return before;
}
