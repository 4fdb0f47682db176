// How TVM's host code calls a kernel: the function behind each `__tvm_ffi_NAME`.
#pragma once
#include "memory.h"

namespace emulator {

// The calling convention of a function in a TVM runtime library.
struct Any {
  int32_t type_index;
  uint32_t padding;
  union {
    int64_t integer;
    void* pointer;
  };
};

struct Kernel {
  const char* name;
  Body body;
  int num_buffers;
  const char* const* names;
  const int32_t* element_bytes;
  int64_t shared_bytes;
  int32_t device_cell, shared_cell;  // see Memory::cell
};

#ifndef EMULATOR_INSTRUMENTED

// A kernel's buffer argument: converts to whatever pointer type the parameter has.
struct Argument {
  char* data;
  template <typename T>
  operator T*() const {
    return reinterpret_cast<T*>(data);
  }
};
inline Argument argument(const Any* arguments, int index) {
  return {static_cast<Buffer*>(arguments[index].pointer)->data};
}

inline void begin_launch(const Kernel&, const Any*, Index3, Index3) {}
inline void end_launch() {}

#else

struct Argument {
  int index;
  template <typename T>
  operator Pointer<T>() const {
    return {&running().device[index], 0};
  }
};
inline Argument argument(const Any*, int index) { return {index}; }

inline Launch& append_launch() {
  Session& session = attnrewrite_emulator_session;
  if (session.num_launches == session.capacity) {
    session.capacity = session.capacity ? 2 * session.capacity : 64;
    session.launches = static_cast<Launch*>(realloc(session.launches, session.capacity * sizeof(Launch)));
  }
  Launch& launch = session.launches[session.num_launches++];
  memset(&launch, 0, sizeof(launch));
  return launch;
}

inline Memory bind(Buffer& buffer, Parameter& traffic, const char* name, int32_t element, int32_t cell) {
  snprintf(traffic.name, sizeof(traffic.name), "%s", name);
  traffic.extent = buffer.extent;
  const size_t cells = buffer.bytes / cell + 1;
  if (buffer.num_cells < cells) {
    free(buffer.cells);
    buffer.cells = static_cast<Cell*>(calloc(cells, sizeof(Cell)));
    buffer.num_cells = cells;
  }
  if (buffer.written == nullptr) {  // allocated before anybody recorded
    buffer.written = static_cast<uint8_t*>(malloc(buffer.bytes + 1));
    memset(buffer.written, 1, buffer.bytes + 1);
  }
  return {name, buffer.data, buffer.written, buffer.cells, (int64_t)buffer.extent, element, cell, 0, &traffic};
}

inline void begin_launch(const Kernel& kernel, const Any* arguments, Index3 blocks, Index3 threads) {
  Running& r = running();
  Launch& launch = append_launch();
  r.launch = &launch;
  r.shared_cell = kernel.shared_cell;
  snprintf(launch.kernel, sizeof(launch.kernel), "%s", kernel.name);
  launch.groups = (int64_t)blocks.x * blocks.y * blocks.z;
  launch.threads = threads.x * threads.y * threads.z;
  launch.shared_bytes = kernel.shared_bytes;
  launch.num_parameters = kernel.num_buffers;
  for (int i = 0; i < kernel.num_buffers; ++i) {
    Buffer& buffer = *static_cast<Buffer*>(arguments[i].pointer);
    r.device[i] = bind(buffer, launch.parameters[i], kernel.names[i], kernel.element_bytes[i], kernel.device_cell);
  }
  memset(r.arrays, 0, sizeof(r.arrays));
}

inline void end_launch() {
  Launch& launch = *running().launch;
  launch.barriers = launch.groups ? group().barriers / launch.groups : 0;
}

#endif

// Runs the kernel over its grid; the function's result for TVM.
inline int launch(const Kernel& kernel, const Any* arguments, Index3 blocks, Index3 threads, Any* result) {
  result->type_index = 0;
  result->integer = 0;
  begin_launch(kernel, arguments, blocks, threads);
  const char* error = kernel.shared_bytes > (int64_t)kSharedBytes
                          ? "a threadgroup takes more than 48 KB of memory"
                          : run_grid(kernel.body, (void*)arguments, blocks, threads);
  end_launch();
  if (error == nullptr) return 0;
  char sentence[512];
  snprintf(sentence, sizeof(sentence), "kernel %s: %s", kernel.name, error);
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", sentence);
  return -1;
}

}  // namespace emulator
