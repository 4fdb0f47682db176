// Runs a GPU grid on one CPU thread: every thread of a threadgroup is a fiber that yields where it must wait.
//
// A threadgroup ends when all its fibers have returned. Waiting fibers go on when the whole threadgroup has arrived at a
// barrier, or a SIMD group (32 neighbours) at a shuffle. When nobody can go on, threads took different branches around
// a barrier: on a GPU that hangs or is undefined, here it is an error. The order in which fibers take turns changes from
// turn to turn, so that a missing barrier shows as a wrong number, and shared memory starts as NaN in every threadgroup.
#pragma once
#include <ucontext.h>

#include "session.h"

namespace emulator {

constexpr int kSimdWidth = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kSharedBytes = 48 * 1024;  // CUDA's; that kernels for Metal take no more than 32 K is checked before

enum class State { kReady, kAtBarrier, kAtShuffle, kAtSimdBarrier, kDone };

struct Fiber {
  ucontext_t context;
  State state;
  uint32_t simd_operations;
};

struct Index3 {
  uint32_t x, y, z;
};

// What one lane shows to its SIMD group.
struct Slot {
  uint64_t words[4];
};

using Body = void (*)(void* arguments, Index3 block, Index3 thread);

struct Group {
  alignas(64) char shared[kSharedBytes];
  Cell shared_cells[kSharedBytes];
  Fiber fibers[kMaxThreads];
  Slot exchanged[kMaxThreads];
  uint16_t simd_epochs[kMaxThreads / kSimdWidth];
  int turns[kMaxThreads];
  char* stacks;
  ucontext_t scheduler;
  int current, size;
  int64_t barriers;
  uint32_t random;
  uint32_t device_epoch;  // of the last barrier that orders device memory as well
  bool orders_device;     // so far, the barrier that threads are arriving at
  Body body;
  void* arguments;
  Index3 block, threads;
};

inline Group& group() {
  void*& instance = attnrewrite_emulator_session.group;
  if (instance == nullptr) {
    posix_memalign(&instance, alignof(Group), sizeof(Group));
    memset(instance, 0, sizeof(Group));
    static_cast<Group*>(instance)->stacks = static_cast<char*>(malloc(kStackBytes * kMaxThreads));
  }
  return *static_cast<Group*>(instance);
}

inline void yield(State state) {
  Group& g = group();
  Fiber& self = g.fibers[g.current];
  self.state = state;
  swapcontext(&self.context, &g.scheduler);
}

inline void barrier(bool orders_device) {
  group().orders_device &= orders_device;
  yield(State::kAtBarrier);
}
inline void simd_barrier() { yield(State::kAtSimdBarrier); }

inline int lane() { return group().current % kSimdWidth; }

// Shows `value` to the SIMD group; returns what its lanes showed, until `end_exchange`.
template <typename T>
inline const Slot* begin_exchange(T value) {
  static_assert(sizeof(T) <= sizeof(Slot), "an exchanged value has at most 32 bytes");
  Group& g = group();
  memcpy(&g.exchanged[g.current], &value, sizeof(T));
  yield(State::kAtShuffle);  // all have written
  return &g.exchanged[g.current / kSimdWidth * kSimdWidth];
}
inline void end_exchange() { yield(State::kAtShuffle); }  // all have read

inline int simd_size() {
  Group& g = group();
  const int rest = g.size - g.current / kSimdWidth * kSimdWidth;
  return rest < kSimdWidth ? rest : kSimdWidth;
}

template <typename T>
inline T exchanged(const Slot* values, int lane) {
  T value;
  memcpy(&value, &values[lane], sizeof(T));
  return value;
}

// The value that lane `source` of this SIMD group passes to the same shuffle; its own where there is no such lane.
template <typename T>
inline T shuffle(T value, int source) {
  const Slot* values = begin_exchange(value);
  const T result = exchanged<T>(values, source >= 0 && source < simd_size() ? source : lane());
  end_exchange();
  return result;
}

// All values of the SIMD group, combined in the order of its lanes.
template <typename T, typename Combine>
inline T reduce(T value, Combine combine) {
  const Slot* values = begin_exchange(value);
  T result = exchanged<T>(values, 0);
  for (int i = 1; i < simd_size(); ++i) result = combine(result, exchanged<T>(values, i));
  end_exchange();
  return result;
}

inline void fiber_main() {
  Group& g = group();
  const uint32_t index = g.current;
  const uint32_t plane = g.threads.x * g.threads.y;
  g.body(g.arguments, g.block, {index % g.threads.x, index / g.threads.x % g.threads.y, index / plane});
  g.fibers[g.current].state = State::kDone;
}

// Lets waiting fibers go on where everybody concerned has arrived. Returns how many may run now.
inline int release(Group& g) {
  int released = 0, at_barrier = 0;
  for (int first = 0; first < g.size; first += kSimdWidth) {
    const int end = first + kSimdWidth < g.size ? first + kSimdWidth : g.size;
    for (int i = first; i < end; ++i) {
      const State state = g.fibers[i].state;
      at_barrier += state == State::kAtBarrier;
      if (state != State::kAtShuffle && state != State::kAtSimdBarrier) continue;
      g.simd_epochs[first / kSimdWidth] += state == State::kAtSimdBarrier;
      g.fibers[i].state = State::kReady;
      ++released;
    }
  }
  if (released == 0 && at_barrier == g.size) {
    for (int i = 0; i < g.size; ++i) g.fibers[i].state = State::kReady;
    memset(g.simd_epochs, 0, sizeof(g.simd_epochs));
    ++attnrewrite_emulator_session.epoch;
    if (g.orders_device) g.device_epoch = attnrewrite_emulator_session.epoch;
    g.orders_device = true;
    ++g.barriers;
    released = g.size;
  }
  return released;
}

// The order of the next turn, by Session::order.
inline void take_turns(Group& g, bool forward) {
  const uint32_t order = attnrewrite_emulator_session.order;
  const bool reversed = order == 1 || (order == 0 && !forward);
  for (int i = 0; i < g.size; ++i) g.turns[i] = reversed ? g.size - 1 - i : i;
  if (order < 2) return;
  for (int i = g.size - 1; i > 0; --i) {
    g.random = g.random * 1664525u + 1013904223u;
    const int other = (g.random >> 8) % (i + 1), swapped = g.turns[i];
    g.turns[i] = g.turns[other];
    g.turns[other] = swapped;
  }
}

// SIMD-group operations need all 32 threads, the same number of times.
inline bool simdgroups_agree(const Group& g) {
  for (int i = 0; i < g.size; ++i) {
    const uint32_t count = g.fibers[i].simd_operations;
    if (count != g.fibers[i / kSimdWidth * kSimdWidth].simd_operations || (count && g.size % kSimdWidth)) return false;
  }
  return true;
}

// Runs one threadgroup; returns what went wrong, or null.
inline const char* run_group(Group& g) {
  memset(g.shared, 0xff, kSharedBytes);
  memset(g.simd_epochs, 0, sizeof(g.simd_epochs));
  attnrewrite_emulator_session.group_epoch = ++attnrewrite_emulator_session.epoch;
  g.device_epoch = attnrewrite_emulator_session.epoch;
  g.orders_device = true;
  for (int i = 0; i < g.size; ++i) {
    Fiber& fiber = g.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = g.stacks + kStackBytes * i;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &g.scheduler;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.state = State::kReady;
    fiber.simd_operations = 0;
  }
  for (bool forward = true;; forward = !forward) {
    int done = 0;
    take_turns(g, forward);
    for (int turn = 0; turn < g.size; ++turn) {
      const int i = g.turns[turn];
      if (g.fibers[i].state == State::kReady) {
        g.current = i;
        swapcontext(&g.scheduler, &g.fibers[i].context);
      }
      done += g.fibers[i].state == State::kDone;
    }
    if (done == g.size) break;
    if (release(g) == 0) return "threads diverge around a barrier";
  }
  return simdgroups_agree(g) ? nullptr : "only part of a SIMD group takes part in a matrix operation";
}

inline const char* run_grid(Body body, void* arguments, Index3 blocks, Index3 threads) {
  Group& g = group();
  g.body = body;
  g.arguments = arguments;
  g.threads = threads;
  g.size = threads.x * threads.y * threads.z;
  if (g.size > kMaxThreads) return "a threadgroup has more than 1024 threads";
  g.barriers = 0;
  g.random = attnrewrite_emulator_session.order;
  const int64_t count = (int64_t)blocks.x * blocks.y * blocks.z;
  attnrewrite_emulator_session.launch_epoch = ++attnrewrite_emulator_session.epoch;
  for (int64_t step = 0; step < count; ++step) {
    const int64_t i = attnrewrite_emulator_session.order % 2 ? count - 1 - step : step;
    g.block = {uint32_t(i % blocks.x), uint32_t(i / blocks.x % blocks.y), uint32_t(i / blocks.x / blocks.y)};
    if (const char* error = run_group(g)) return error;
  }
  return nullptr;
}

}  // namespace emulator
