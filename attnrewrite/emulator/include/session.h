// What the emulated device (device.cpp) and the kernels it runs share: memory, and what is counted of its use.
//
// C++ without its standard library on purpose: compiling then takes a second, and needs no libc++.
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace emulator {

constexpr int kMaxParameters = 31;
constexpr int kMaxArrays = 32;
constexpr int kMaxFindings = 256;
constexpr int kSentenceBytes = 400;

// Who touched one element last. Epochs count barriers over the whole session, so that nothing needs clearing: what lies
// before the start of a launch or of a threadgroup did not happen in it. A reader of kSeveral stands for many threads.
struct Cell {
  uint32_t write_epoch, read_epoch, first_read_epoch;
  uint16_t writer, reader;
  uint16_t write_simd_epoch, read_simd_epoch;
};
constexpr uint16_t kSeveral = 0xffff;

// An allocation of the device. Its address is what a tensor's data pointer holds, as on a Mac it is an MTLBuffer's: so
// the host can neither read through it nor add to it.
struct alignas(64) Buffer {
  char* data;
  size_t bytes;      // of the allocation
  size_t extent;     // of the tensor that lies in it now
  uint8_t* written;  // one for each byte: whether it holds a value
  Cell* cells;
  size_t num_cells;
};

// Bytes moved between a kernel and one of its buffers. `per_group` counts what each threadgroup touches once however
// often it comes back to it, `distinct` the same for the whole grid.
struct Traffic {
  int64_t requested, per_group, distinct;
};

struct Parameter {
  char name[64];
  int64_t extent;
  Traffic reads, writes;
};

struct Launch {
  char kernel[192];
  int64_t groups, threads, barriers, shared_bytes, shared_reads, shared_writes;
  int32_t num_parameters;
  int32_t unused;
  Parameter parameters[kMaxParameters];
};

// order: 0: the threads of a group take turns from the first and from the last; 1: always from the last; otherwise the
// seed of a random order. The groups of a grid run from the last for odd ones.
struct Session {
  int32_t exists;
  int32_t recording;
  uint32_t order;
  int32_t num_findings;
  int64_t num_launches, capacity;
  Launch* launches;
  char findings[kMaxFindings][kSentenceBytes];
  uint32_t epoch, launch_epoch, group_epoch;
  void* group;
};

}  // namespace emulator

extern "C" emulator::Session attnrewrite_emulator_session;
extern "C" void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message);
