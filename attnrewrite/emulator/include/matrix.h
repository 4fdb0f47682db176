// Matrices of 8 x 8 that the 32 threads of a SIMD group hold together. Here the first of them holds all of it and does
// all the work; that the others took part is checked where their threadgroup ends.
#pragma once
#include "memory.h"

namespace metal {

template <typename T, int Columns, int Rows>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "Metal has simdgroup matrices of 8 x 8");
  T at[Rows][Columns];
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;

inline bool holds_matrix() {
  emulator::Group& g = emulator::group();
  ++g.fibers[g.current].simd_operations;
  return emulator::lane() == 0;
}

template <typename T, int Columns, int Rows>
inline simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> result;
  if (holds_matrix())
    for (T* at = &result.at[0][0]; at < &result.at[0][0] + Columns * Rows; ++at) *at = value;
  return result;
}

template <typename T, typename Pointer>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& matrix, Pointer source, ulong stride = 8, int = 0,
                           bool transpose = false) {
  if (!holds_matrix()) return;
  for (int row = 0; row < 8; ++row)
    for (int column = 0; column < 8; ++column)
      (transpose ? matrix.at[column][row] : matrix.at[row][column]) = source[row * stride + column];
}

template <typename T, typename Pointer>
inline void simdgroup_store(const simdgroup_matrix<T, 8, 8>& matrix, Pointer target, ulong stride = 8, int = 0,
                            bool transpose = false) {
  if (!holds_matrix()) return;
  for (int row = 0; row < 8; ++row)
    for (int column = 0; column < 8; ++column)
      target[row * stride + column] = transpose ? matrix.at[column][row] : matrix.at[row][column];
}

// d = a b + c
template <typename D, typename A, typename B, typename C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                          const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c) {
  if (!holds_matrix()) return;
  D result[8][8];
  for (int row = 0; row < 8; ++row) {
    for (int column = 0; column < 8; ++column) result[row][column] = D(c.at[row][column]);
    for (int k = 0; k < 8; ++k)
      for (int column = 0; column < 8; ++column)
        result[row][column] += D(a.at[row][k]) * D(b.at[k][column]);
  }
  memcpy(d.at, result, sizeof(result));
}

template <typename D, typename A, typename B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                               const simdgroup_matrix<B, 8, 8>& b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)));
}

}  // namespace metal
