// The CUDA device functions of lowering/kernels/tensor_core.py for the emulator: what their PTX instructions do.
//
// Fragments are those of the PTX ISA, section "Warp-level matrix instructions"
// (https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions), written down here as
// functions from a lane and an element's number to a row and a column. 32 lanes take part; what does not is divergence.
#pragma once
#include "memory.h"

namespace emulator {

template <typename U, typename T>
inline U* retype(T* pointer) { return (U*)pointer; }
#ifdef EMULATOR_INSTRUMENTED
template <typename U, typename T>
inline Pointer<U> retype(const Pointer<T>& pointer) { return Pointer<U>(pointer); }
#endif

// Two 16-bit elements in a register; the first is the lower half.
struct Pair {
  uint16_t at[2];
};

struct Float16 {
  static float decode(uint16_t bits) {
    half value;
    memcpy(&value, &bits, sizeof(value));
    return value;
  }
  static uint16_t encode(float value) {
    const half rounded = half(value);
    uint16_t bits;
    memcpy(&bits, &rounded, sizeof(bits));
    return bits;
  }
};

struct Bfloat16 {
  static float decode(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof(value));
    return value;
  }
  // To the nearest, ties to even.
  static uint16_t encode(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    if (value != value) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
};

template <typename Format>
inline uint pack(float low, float high) {
  return uint(Format::encode(low)) | uint(Format::encode(high)) << 16;
}

// The product of two elements is exact in float32, unless it is one of bfloat16 below the normal numbers.
template <typename Format>
inline uint multiply(uint a, uint b) {
  return pack<Format>(Format::decode(a) * Format::decode(b), Format::decode(a >> 16) * Format::decode(b >> 16));
}

// The words of A (4 registers, 16 x 16) and B (2 registers, 16 x 8) that one lane holds.
struct Operands {
  Pair a[4], b[2];
};

// c += a b, of m16n8k16.row.col with float32 sums: a[row][k], b[k][column], c[row][column].
template <typename Format>
inline void multiply_16x8x16(float* c, const uint* a, const uint* b) {
  Operands own;
  memcpy(own.a, a, sizeof(own.a));
  memcpy(own.b, b, sizeof(own.b));
  const Slot* lanes = begin_exchange(own);
  float left[16][16], right[16][8];
  for (int lane = 0; lane < kSimdWidth; ++lane) {
    const Operands other = exchanged<Operands>(lanes, lane);
    const int group_id = lane / 4, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = group_id + (i / 2 % 2) * 8, k = in_group * 2 + i % 2 + (i / 4) * 8;
      left[row][k] = Format::decode(other.a[i / 2].at[i % 2]);
    }
    for (int i = 0; i < 4; ++i)
      right[in_group * 2 + i % 2 + (i / 2) * 8][group_id] = Format::decode(other.b[i / 2].at[i % 2]);
  }
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + (i / 2) * 8, column = lane() % 4 * 2 + i % 2;
    float total = c[i];
    for (int k = 0; k < 16; ++k) total += left[row][k] * right[k][column];
    c[i] = total;
  }
  end_exchange();
}

// ldmatrix.m8n8: lane 8 m + r points to row r of matrix m; register m gets elements 2 t and 2 t + 1 of row g of it,
// where the lane is 4 g + t, or with `transposed` those of column g.
template <int Count, typename Source>
inline void load_matrices(uint* target, Source row, bool transposed) {
  struct Row {
    uint16_t at[8];
  } own = {};
  if (lane() < Count * 8) {
    const int4 words = retype<int4>(row)[0];
    memcpy(&own, &words, sizeof(own));
  }
  const Slot* lanes = begin_exchange(own);
  const int g = lane() / 4, t = lane() % 4;
  for (int m = 0; m < Count; ++m) {
    Pair pair;
    for (int i = 0; i < 2; ++i)
      pair.at[i] = transposed ? exchanged<Row>(lanes, 8 * m + 2 * t + i).at[g] : exchanged<Row>(lanes, 8 * m + g).at[2 * t + i];
    memcpy(&target[m], &pair, sizeof(pair));
  }
  end_exchange();
}

// Asynchronous copies arrive as late as they may, when they are waited for. Until then their target holds NaN, so that
// a copy begun too early and a wait left out both show.
struct Copy {
  void (*arrive)(const Copy&);
  alignas(8) char target[16], source[16];
  bool present;
};
struct CopyQueue {
  static constexpr int kMost = 1024;
  Copy copies[kMost];
  int groups[kMost];  // the number of the group that each belongs to
  int count, committed;
  uint32_t threadgroup;  // the epoch at which it began
};

inline CopyQueue& copy_queue() {
  static CopyQueue* queues = static_cast<CopyQueue*>(calloc(kMaxThreads, sizeof(CopyQueue)));
  CopyQueue& queue = queues[group().current];
  if (queue.threadgroup != attnrewrite_emulator_session.group_epoch) {
    queue.count = queue.committed = 0;
    queue.threadgroup = attnrewrite_emulator_session.group_epoch;
  }
  return queue;
}

template <typename Word, typename Target, typename Source>
inline void copy_async(Target target, Source source, bool present) {
  using To = decltype(retype<Word>(target));
  using From = decltype(retype<Word>(source));
  To to = retype<Word>(target);
  From from = retype<Word>(source);
  Word poison;
  memset(&poison, 0xff, sizeof(poison));
  to[0] = poison;
  CopyQueue& queue = copy_queue();
  if (queue.count == CopyQueue::kMost) abort();
  Copy& copy = queue.copies[queue.count];
  queue.groups[queue.count++] = queue.committed;
  static_assert(sizeof(To) <= sizeof(copy.target) && sizeof(From) <= sizeof(copy.source), "a pointer has 16 bytes");
  memcpy(copy.target, &to, sizeof(to));
  memcpy(copy.source, &from, sizeof(from));
  copy.present = present;
  copy.arrive = [](const Copy& copy) {
    Word value;
    memset(&value, 0, sizeof(value));
    if (copy.present) value = (*(From*)copy.source)[0];
    (*(To*)copy.target)[0] = value;
  };
}

// Lets all groups arrive but the last `pending` ones.
inline void copy_wait(int pending) {
  CopyQueue& queue = copy_queue();
  int kept = 0;
  for (int i = 0; i < queue.count; ++i) {
    if (queue.groups[i] < queue.committed - pending) {
      queue.copies[i].arrive(queue.copies[i]);
    } else {
      queue.copies[kept] = queue.copies[i];
      queue.groups[kept++] = queue.groups[i];
    }
  }
  queue.count = kept;
}

// Lane t of a quad gets word t of each of its four lanes, in their order.
inline void transpose_quad(uint* words) {
  struct Words {
    uint at[4];
  } own;
  memcpy(&own, words, sizeof(own));
  const Slot* lanes = begin_exchange(own);
  const int first = lane() / 4 * 4;
  for (int i = 0; i < 4; ++i) words[i] = exchanged<Words>(lanes, first + i).at[lane() % 4];
  end_exchange();
}

}  // namespace emulator

inline void attnrewrite_mma_float16(float* c, const uint* a, const uint* b) {
  emulator::multiply_16x8x16<emulator::Float16>(c, a, b);
}
inline void attnrewrite_mma_bfloat16(float* c, const uint* a, const uint* b) {
  emulator::multiply_16x8x16<emulator::Bfloat16>(c, a, b);
}
template <typename Source>
inline void attnrewrite_load_matrices_2(uint* target, Source row) { emulator::load_matrices<2>(target, row, false); }
template <typename Source>
inline void attnrewrite_load_matrices_4(uint* target, Source row) { emulator::load_matrices<4>(target, row, false); }
template <typename Source>
inline void attnrewrite_load_matrices_2_transposed(uint* target, Source row) {
  emulator::load_matrices<2>(target, row, true);
}
template <typename Source>
inline void attnrewrite_load_matrices_4_transposed(uint* target, Source row) {
  emulator::load_matrices<4>(target, row, true);
}
template <typename Target, typename Source>
inline void attnrewrite_copy_async_16(Target target, Source source, bool present) {
  emulator::copy_async<int4>(target, source, present);
}
template <typename Target, typename Source>
inline void attnrewrite_copy_async_8(Target target, Source source, bool present) {
  emulator::copy_async<int2>(target, source, present);
}
template <typename Target, typename Source>
inline void attnrewrite_copy_async_4(Target target, Source source, bool present) {
  emulator::copy_async<int>(target, source, present);
}
inline void attnrewrite_copy_commit() { ++emulator::copy_queue().committed; }
inline void attnrewrite_copy_wait_0() { emulator::copy_wait(0); }
inline void attnrewrite_copy_wait_1() { emulator::copy_wait(1); }
inline void attnrewrite_copy_wait_2() { emulator::copy_wait(2); }
inline uint attnrewrite_pack_float16(float low, float high) { return emulator::pack<emulator::Float16>(low, high); }
inline uint attnrewrite_pack_bfloat16(float low, float high) { return emulator::pack<emulator::Bfloat16>(low, high); }
inline uint attnrewrite_multiply_float16(uint a, uint b) { return emulator::multiply<emulator::Float16>(a, b); }
inline uint attnrewrite_multiply_bfloat16(uint a, uint b) { return emulator::multiply<emulator::Bfloat16>(a, b); }
inline float attnrewrite_low_float16(uint word) { return emulator::Float16::decode(word); }
inline float attnrewrite_high_float16(uint word) { return emulator::Float16::decode(word >> 16); }
inline float attnrewrite_low_bfloat16(uint word) { return emulator::Bfloat16::decode(word); }
inline float attnrewrite_high_bfloat16(uint word) { return emulator::Bfloat16::decode(word >> 16); }
inline uint attnrewrite_firsts(uint a, uint b) { return (a & 0xffff) | b << 16; }
inline uint attnrewrite_seconds(uint a, uint b) { return a >> 16 | (b & 0xffff0000); }
inline float attnrewrite_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float attnrewrite_exp2(float x) { return __builtin_exp2f(x); }
inline float attnrewrite_reciprocal(float x) { return 1.0f / x; }
inline void attnrewrite_transpose_quad(uint* words) { emulator::transpose_quad(words); }
template <typename Memory>
inline void attnrewrite_keep(Memory) {}
