// Runs a GPU grid on one CPU thread: every thread of a threadgroup is a fiber that yields where it must wait.
//
// A threadgroup ends when all its fibers have returned. Waiting fibers go on when the whole threadgroup has arrived at a
// barrier, or a SIMD group (32 neighbours) at a shuffle. When nobody can go on, threads took different branches around
// a barrier: on a GPU that hangs or is undefined, here it is an error. Fibers are resumed in alternating order, so that
// a missing barrier shows as a wrong number, and shared memory starts as NaN in every threadgroup.
//
// C++ without its standard library on purpose: compiling then takes a second, and needs no libc++.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

namespace emulator {

constexpr int kSimdWidth = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kSharedBytes = 256 * 1024;

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  ucontext_t context;
  State state;
};

struct Index3 {
  uint32_t x, y, z;
};

using Body = void (*)(void* arguments, Index3 block, Index3 thread);

struct Group {
  Fiber fibers[kMaxThreads];
  uint64_t exchanged[kMaxThreads];
  char* stacks;
  ucontext_t scheduler;
  int current, size;
  Body body;
  void* arguments;
  Index3 block, threads;
};

inline Group& group() {
  static Group* instance = nullptr;
  if (instance == nullptr) {
    instance = static_cast<Group*>(calloc(1, sizeof(Group)));
    instance->stacks = static_cast<char*>(malloc(kStackBytes * kMaxThreads));
  }
  return *instance;
}

inline char* shared_memory() {
  alignas(64) static char memory[kSharedBytes];
  return memory;
}

inline void yield(State state) {
  Group& g = group();
  Fiber& self = g.fibers[g.current];
  self.state = state;
  swapcontext(&self.context, &g.scheduler);
}

inline void barrier() { yield(State::kAtBarrier); }

// The value that lane `lane` of this SIMD group passes to the same shuffle.
template <typename T>
inline T shuffle(T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffled value has at most 8 bytes");
  Group& g = group();
  const int self = g.current;
  memcpy(&g.exchanged[self], &value, sizeof(T));
  yield(State::kAtShuffle);  // all have written
  const int source = self / kSimdWidth * kSimdWidth + (lane & (kSimdWidth - 1));
  memcpy(&value, &g.exchanged[source < g.size ? source : self], sizeof(T));
  yield(State::kAtShuffle);  // all have read
  return value;
}

inline int lane() { return group().current % kSimdWidth; }

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
      if (g.fibers[i].state == State::kAtShuffle) {
        g.fibers[i].state = State::kReady;
        ++released;
      }
      at_barrier += g.fibers[i].state == State::kAtBarrier;
    }
  }
  if (released == 0 && at_barrier == g.size) {
    for (int i = 0; i < g.size; ++i) g.fibers[i].state = State::kReady;
    released = g.size;
  }
  return released;
}

// Runs one threadgroup; false when its threads diverged around a barrier.
inline bool run_group(Group& g) {
  memset(shared_memory(), 0xff, kSharedBytes);
  for (int i = 0; i < g.size; ++i) {
    Fiber& fiber = g.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = g.stacks + kStackBytes * i;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &g.scheduler;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.state = State::kReady;
  }
  for (bool forward = true;; forward = !forward) {
    int done = 0;
    for (int step = 0; step < g.size; ++step) {
      const int i = forward ? step : g.size - 1 - step;
      if (g.fibers[i].state == State::kReady) {
        g.current = i;
        swapcontext(&g.scheduler, &g.fibers[i].context);
      }
      done += g.fibers[i].state == State::kDone;
    }
    if (done == g.size) return true;
    if (release(g) == 0) return false;
  }
}

inline bool run_grid(Body body, void* arguments, Index3 blocks, Index3 threads) {
  Group& g = group();
  g.body = body;
  g.arguments = arguments;
  g.threads = threads;
  g.size = threads.x * threads.y * threads.z;
  if (g.size > kMaxThreads) return false;
  for (uint32_t z = 0; z < blocks.z; ++z)
    for (uint32_t y = 0; y < blocks.y; ++y)
      for (uint32_t x = 0; x < blocks.x; ++x) {
        g.block = {x, y, z};
        if (!run_group(g)) return false;
      }
  return true;
}

// The calling convention of a function in a TVM runtime library.
struct Any {
  int32_t type_index;
  uint32_t padding;
  union {
    int64_t integer;
    void* pointer;
  };
};

// A kernel's buffer argument: converts to whatever pointer type the parameter has.
struct Pointer {
  void* address;
  template <typename T>
  operator T*() const {
    return static_cast<T*>(address);
  }
};

}  // namespace emulator

extern "C" void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message);
