// Pointers into device and threadgroup memory: bare ones, or (EMULATOR_INSTRUMENTED) ones that count and check.
//
// An instrumented access reports what a GPU would not forgive and then does no harm: a read gives the value that is
// there or zero, a write outside is dropped. One sentence for each kernel, buffer and kind of fault.
#pragma once
#include <stdarg.h>

#include "fibers.h"
#include "vectors.h"

namespace emulator {

#ifndef EMULATOR_INSTRUMENTED

template <typename T>
using DevicePointer = T*;
template <typename T>
using GroupPointer = T*;

template <typename T>
inline T* threadgroup_array(int, int64_t offset, int64_t, const char*) {
  return reinterpret_cast<T*>(group().shared + offset);
}

// What an expression of this type yields when it is read.
template <typename T>
using Value = T;

#else

enum Fault : uint32_t {
  kReadOutside = 1, kWriteOutside = 2, kUnaligned = 4, kUnwritten = 8, kReadRace = 16, kWriteRace = 32,
  kReadForeign = 64, kWriteForeign = 128,
};

// A buffer of the running kernel, in device memory (`traffic` is set) or in threadgroup memory.
struct Memory {
  const char* name;
  char* data;
  uint8_t* written;
  Cell* cells;
  int64_t extent;   // bytes
  int32_t element;  // bytes, as declared
  int32_t cell;     // bytes of one cell: of the smallest element that the kernel accesses in this address space
  uint32_t faults;
  Parameter* traffic;
};

struct Running {
  Launch* launch;
  int32_t shared_cell;
  Memory device[kMaxParameters];
  Memory arrays[kMaxArrays];
};

inline Running& running() {
  static Running instance;
  return instance;
}

inline Index3 position(uint32_t thread) {
  const Index3 n = group().threads;
  return {thread % n.x, thread / n.x % n.y, thread / n.x / n.y};
}

// "kernel K reads a[3] in thread (0, 0, 0) of threadgroup (0, 0, 0), DETAIL"
__attribute__((noinline, format(printf, 5, 6))) inline void report(Memory& memory, Fault fault, int64_t offset,
                                                                   const char* verb, const char* detail, ...) {
  Session& session = attnrewrite_emulator_session;
  if (memory.faults & fault) return;
  memory.faults |= fault;
  char sentence[kSentenceBytes];
  const Index3 b = group().block, t = position(group().current);
  int length = snprintf(sentence, sizeof(sentence), "kernel %s %s %s[", running().launch->kernel, verb, memory.name);
  const int prefix = length;
  length += snprintf(sentence + length, sizeof(sentence) - length, "%ld] in thread (%u, %u, %u) of threadgroup "
                     "(%u, %u, %u), ", (long)(offset / memory.element), t.x, t.y, t.z, b.x, b.y, b.z);
  va_list values;
  va_start(values, detail);
  if (length < kSentenceBytes) vsnprintf(sentence + length, sizeof(sentence) - length, detail, values);
  va_end(values);
  const int detail_bytes = strcspn(detail, "%");
  for (int i = 0; i < session.num_findings; ++i) {
    const char* known = session.findings[i];
    if (strncmp(known, sentence, prefix) == 0 && strstr(known, "), ") &&
        strncmp(strstr(known + prefix, "), ") + 3, detail, detail_bytes) == 0) return;
  }
  if (session.num_findings < kMaxFindings) memcpy(session.findings[session.num_findings++], sentence, kSentenceBytes);
}

// Whether the element's last access by `other` may come before or after this thread's: nothing orders the two.
inline bool unordered(uint32_t epoch, uint16_t other, uint16_t simd_epoch) {
  const Group& g = group();
  if (epoch != attnrewrite_emulator_session.epoch || other == g.current) return false;
  const bool same_simdgroup = other != kSeveral && other / kSimdWidth == g.current / kSimdWidth;
  return !same_simdgroup || simd_epoch == g.simd_epochs[g.current / kSimdWidth];
}

inline void report_race(Memory& memory, Fault fault, int64_t offset, const char* verb, uint16_t other,
                        const char* did) {
  if (other == kSeveral) {
    report(memory, fault, offset, verb, "with no barrier%s since other threads %s it",
           memory.traffic ? " that orders device memory" : "", did);
  } else {
    const Index3 t = position(other);
    report(memory, fault, offset, verb, "with no barrier since thread (%u, %u, %u) %s it", t.x, t.y, t.z, did);
  }
}

// Whether barriers since then, if any, were of threadgroup memory alone: they do not order what device memory holds.
inline bool out_of_order(const Memory& memory, uint32_t epoch, uint16_t other) {
  return memory.traffic && epoch >= group().device_epoch && other != group().current;
}

// Of another threadgroup of this launch: no barrier orders threadgroups.
inline bool foreign(const Memory& memory, uint32_t epoch) {
  return memory.traffic && epoch >= attnrewrite_emulator_session.launch_epoch &&
         epoch < attnrewrite_emulator_session.group_epoch;
}

inline void note_read(Memory& memory, int64_t offset) {
  const Session& session = attnrewrite_emulator_session;
  Group& g = group();
  Cell& cell = memory.cells[offset / memory.cell];
  const uint16_t simd_epoch = g.simd_epochs[g.current / kSimdWidth];
  if (unordered(cell.write_epoch, cell.writer, cell.write_simd_epoch))
    report_race(memory, kReadRace, offset, "reads", cell.writer, "wrote");
  else if (out_of_order(memory, cell.write_epoch, cell.writer))
    report(memory, kReadRace, offset, "reads", "with no barrier that orders device memory since another thread wrote it");
  else if (foreign(memory, cell.write_epoch))
    report(memory, kReadForeign, offset, "reads", "which another threadgroup wrote in the same launch");
  if (memory.traffic ? !memory.written[offset] : cell.write_epoch < session.group_epoch)
    report(memory, kUnwritten, offset, "reads", "which nothing has written");
  if (memory.traffic) {
    Traffic& reads = memory.traffic->reads;
    reads.requested += memory.cell;
    reads.per_group += cell.read_epoch < session.group_epoch ? memory.cell : 0;
    reads.distinct += cell.first_read_epoch < session.launch_epoch ? memory.cell : 0;
  }
  const bool with_others = unordered(cell.read_epoch, cell.reader, cell.read_simd_epoch) ||
                           (cell.read_epoch < session.epoch && out_of_order(memory, cell.read_epoch, cell.reader));
  cell.reader = with_others ? kSeveral : g.current;
  cell.read_epoch = session.epoch;
  cell.read_simd_epoch = simd_epoch;
  if (cell.first_read_epoch < session.launch_epoch) cell.first_read_epoch = session.epoch;
}

// changes: whether the write changes the value. Threads that store the same value do not disturb each other.
inline void note_write(Memory& memory, int64_t offset, bool changes) {
  const Session& session = attnrewrite_emulator_session;
  Group& g = group();
  Cell& cell = memory.cells[offset / memory.cell];
  const bool first = cell.write_epoch < (memory.traffic ? session.launch_epoch : session.group_epoch);
  if (memory.traffic) {
    Traffic& writes = memory.traffic->writes;
    writes.requested += memory.cell;
    writes.per_group += cell.write_epoch < session.group_epoch ? memory.cell : 0;
    writes.distinct += first ? memory.cell : 0;
    memset(memory.written + offset, 1, memory.cell);
  }
  if (!changes && !first) return;
  if (changes) {
    if (unordered(cell.write_epoch, cell.writer, cell.write_simd_epoch))
      report_race(memory, kWriteRace, offset, "writes", cell.writer, "wrote");
    else if (unordered(cell.read_epoch, cell.reader, cell.read_simd_epoch))
      report_race(memory, kWriteRace, offset, "writes", cell.reader, "read");
    else if (out_of_order(memory, cell.write_epoch, cell.writer))
      report(memory, kWriteRace, offset, "writes", "with no barrier that orders device memory since another thread wrote it");
    else if (out_of_order(memory, cell.read_epoch, cell.reader))
      report(memory, kWriteRace, offset, "writes", "with no barrier that orders device memory since another thread read it");
    else if (foreign(memory, cell.write_epoch) || foreign(memory, cell.first_read_epoch))
      report(memory, kWriteForeign, offset, "writes", "which another threadgroup uses in the same launch");
  }
  cell.write_epoch = session.epoch;
  cell.writer = g.current;
  cell.write_simd_epoch = g.simd_epochs[g.current / kSimdWidth];
}

// Bounds and alignment of an access of so many bytes.
inline bool valid(Memory& memory, int64_t offset, int64_t bytes, int64_t alignment, bool writes) {
  const char* verb = writes ? "writes" : "reads";
  if (offset < 0 || offset + bytes > memory.extent) {
    report(memory, writes ? kWriteOutside : kReadOutside, offset, verb, "outside its %ld elements",
           (long)(memory.extent / memory.element));
    return false;
  }
  if (offset % alignment)
    report(memory, kUnaligned, offset, verb, "where a vector of %ld bytes is not aligned", (long)bytes);
  return true;
}

template <typename T>
inline T read(Memory& memory, int64_t offset) {
  if (!valid(memory, offset, sizeof(T), alignment_of<T>(), false)) return T(0);
  for (int64_t i = 0; i < (int64_t)sizeof(T); i += memory.cell) note_read(memory, offset + i);
  if (!memory.traffic) running().launch->shared_reads += sizeof(T);
  T value;
  memcpy(&value, memory.data + offset, sizeof(T));
  return value;
}

template <typename T>
inline void write(Memory& memory, int64_t offset, const T& value) {
  if (!valid(memory, offset, sizeof(T), alignment_of<T>(), true)) return;
  const char* bytes = reinterpret_cast<const char*>(&value);
  for (int64_t i = 0; i < (int64_t)sizeof(T); i += memory.cell)
    note_write(memory, offset + i, memcmp(memory.data + offset + i, bytes + i, memory.cell) != 0);
  if (!memory.traffic) running().launch->shared_writes += sizeof(T);
  memcpy(memory.data + offset, bytes, sizeof(T));
}

template <typename T>
struct Pointer;

// An element in memory: reads and writes where it is converted and assigned.
template <typename T>
struct Reference {
  Memory* memory;
  int64_t offset;
  operator T() const { return read<T>(*memory, offset); }
  template <typename U, int N>
  explicit operator Vector<U, N>() const { return Vector<U, N>(T(*this)); }
  const Reference& operator=(const T& value) const {
    write<T>(*memory, offset, value);
    return *this;
  }
  const Reference& operator=(const Reference& other) const { return *this = T(other); }
  Pointer<T> operator&() const { return {memory, offset}; }
  // An element of a vector in memory.
  Reference<ElementOf<T>> operator[](int64_t i) const { return {memory, offset + i * (int64_t)sizeof(ElementOf<T>)}; }
};

template <typename T>
struct Pointer {
  Memory* memory;
  int64_t offset;
  Pointer(Memory* memory, int64_t offset) : memory(memory), offset(offset) {}
  template <typename U>
  explicit Pointer(const Pointer<U>& other) : memory(other.memory), offset(other.offset) {}
  Reference<T> operator*() const { return {memory, offset}; }
  Reference<T> operator[](int64_t i) const { return *(*this + i); }
  Pointer operator+(int64_t i) const { return {memory, offset + i * (int64_t)sizeof(T)}; }
};

template <typename T>
using DevicePointer = Pointer<T>;
template <typename T>
using GroupPointer = Pointer<T>;

template <typename T>
inline Pointer<T> threadgroup_array(int index, int64_t offset, int64_t count, const char* name) {
  Memory& memory = running().arrays[index];
  if (memory.name == nullptr) {
    Group& g = group();
    memory = {name, g.shared + offset, nullptr, g.shared_cells + offset, count * (int64_t)sizeof(T),
              (int32_t)sizeof(ElementOf<T>), running().shared_cell, 0, nullptr};
  }
  return {&memory, 0};
}

template <typename T>
struct ValueOf {
  using type = T;
};
template <typename T>
struct ValueOf<Reference<T>> {
  using type = T;
};
template <typename T>
using Value = typename ValueOf<T>::type;

// Spelled out, because the built-in operators do not know which of a reference's conversions is meant.
#define EMULATOR_OPERATOR(op)                                                                \
  template <typename T, typename U>                                                          \
  inline auto operator op(const Reference<T>& a, const U& b) { return T(a) op Value<U>(b); } \
  template <typename T, typename U>                                                          \
  inline auto operator op(const U& a, const Reference<T>& b) { return a op T(b); }           \
  template <typename T, typename U>                                                          \
  inline auto operator op(const Reference<T>& a, const Reference<U>& b) { return T(a) op U(b); }
EMULATOR_OPERATOR(+)
EMULATOR_OPERATOR(-)
EMULATOR_OPERATOR(*)
EMULATOR_OPERATOR(/)
EMULATOR_OPERATOR(%)
EMULATOR_OPERATOR(&)
EMULATOR_OPERATOR(|)
EMULATOR_OPERATOR(^)
EMULATOR_OPERATOR(<<)
EMULATOR_OPERATOR(>>)
EMULATOR_OPERATOR(<)
EMULATOR_OPERATOR(>)
EMULATOR_OPERATOR(<=)
EMULATOR_OPERATOR(>=)
EMULATOR_OPERATOR(==)
EMULATOR_OPERATOR(!=)
#undef EMULATOR_OPERATOR

#endif

}  // namespace emulator
