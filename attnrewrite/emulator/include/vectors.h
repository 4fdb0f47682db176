// Scalar and vector types of the Metal Shading Language.
#pragma once
#include <stdint.h>

typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned long ulong;
typedef _Float16 half;
inline constexpr half operator""h(long double value) { return half(value); }

// A vector of three takes the room of four. In memory it is aligned to its size, which instrumented accesses check; the
// type itself is not, so that an access that is not aligned does no harm.
template <typename T, int N>
struct Vector {
  T at[N == 3 ? 4 : N];
  Vector() = default;
  Vector(T value) { for (int i = 0; i < N; ++i) at[i] = value; }
  template <typename... Values, typename = decltype(sizeof...(Values))>
  Vector(T first, T second, Values... rest) : at{first, second, T(rest)...} {}
  template <typename U>
  explicit Vector(const Vector<U, N>& other) { for (int i = 0; i < N; ++i) at[i] = T(other.at[i]); }
  T& operator[](int i) { return at[i]; }
  T operator[](int i) const { return at[i]; }
};

// The same without its alignment and padding, as packed_float3.
template <typename T, int N>
struct Packed {
  T at[N];
  Packed() = default;
  Packed(const Vector<T, N>& value) { for (int i = 0; i < N; ++i) at[i] = value.at[i]; }
  explicit Packed(T value) : Packed(Vector<T, N>(value)) {}
  operator Vector<T, N>() const {
    Vector<T, N> value;
    for (int i = 0; i < N; ++i) value.at[i] = at[i];
    return value;
  }
  T operator[](int i) const { return at[i]; }
};

#define EMULATOR_OPERATOR(op)                                                     \
  template <typename T, int N>                                                    \
  inline Vector<T, N> operator op(const Vector<T, N>& a, const Vector<T, N>& b) { \
    Vector<T, N> result;                                                          \
    for (int i = 0; i < N; ++i) result.at[i] = a.at[i] op b.at[i];                \
    return result;                                                                \
  }                                                                               \
  template <typename T, int N>                                                    \
  inline Vector<T, N> operator op(const Vector<T, N>& a, T b) {                   \
    return a op Vector<T, N>(b);                                                  \
  }                                                                               \
  template <typename T, int N>                                                    \
  inline Vector<T, N> operator op(T a, const Vector<T, N>& b) {                   \
    return Vector<T, N>(a) op b;                                                  \
  }
EMULATOR_OPERATOR(+)
EMULATOR_OPERATOR(-)
EMULATOR_OPERATOR(*)
EMULATOR_OPERATOR(/)
EMULATOR_OPERATOR(&)
EMULATOR_OPERATOR(|)
EMULATOR_OPERATOR(^)
EMULATOR_OPERATOR(<<)
EMULATOR_OPERATOR(>>)
#undef EMULATOR_OPERATOR

#define EMULATOR_VECTORS(type)       \
  typedef Vector<type, 2> type##2;   \
  typedef Vector<type, 3> type##3;   \
  typedef Vector<type, 4> type##4;   \
  typedef Packed<type, 2> packed_##type##2; \
  typedef Packed<type, 3> packed_##type##3; \
  typedef Packed<type, 4> packed_##type##4;
EMULATOR_VECTORS(float)
EMULATOR_VECTORS(half)
EMULATOR_VECTORS(char)
EMULATOR_VECTORS(uchar)
EMULATOR_VECTORS(short)
EMULATOR_VECTORS(ushort)
EMULATOR_VECTORS(int)
EMULATOR_VECTORS(uint)
EMULATOR_VECTORS(long)
EMULATOR_VECTORS(ulong)
EMULATOR_VECTORS(bool)
#undef EMULATOR_VECTORS

namespace emulator {

template <typename T>
struct Elements {
  using type = T;
  static constexpr int64_t alignment = alignof(T);
};
template <typename T, int N>
struct Elements<Vector<T, N>> {
  using type = T;
  static constexpr int64_t alignment = sizeof(Vector<T, N>);
};
template <typename T, int N>
struct Elements<Packed<T, N>> {
  using type = T;
  static constexpr int64_t alignment = alignof(T);
};
template <typename T>
using ElementOf = typename Elements<T>::type;
template <typename T>
inline constexpr int64_t alignment_of() {
  return Elements<T>::alignment;
}

}  // namespace emulator
