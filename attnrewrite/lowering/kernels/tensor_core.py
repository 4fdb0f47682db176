"""CUDA's matrix instructions as calls: named device functions around inline PTX.

A kernel calls functions by name. For CUDA their source stands in front of the kernel; the emulator of Metal kernels
defines functions of the same names in C++ (`emulator/include/tensor_core.h`), so that one and the same kernel is
executed on a CPU with every access to memory checked. The source asks for `__CUDA_ARCH__` itself: below sm_80, a step
of 16 is two of 8, and copies are not asynchronous.

Fragments of m16n8k16, for lane 4 g + t of a warp; a register holds two elements, neighbours along k (of A and B) or
along columns (of C, float32, one to a register):

    A, 16 x 16   a[0] = (g, 2t), a[1] = (g + 8, 2t), a[2] = (g, 2t + 8), a[3] = (g + 8, 2t + 8)
    B, 16 x 8    b[0] = (2t, g), b[1] = (2t + 8, g)
    C, 16 x 8    c[0], c[1] = (g, 2t), (g, 2t + 1);  c[2], c[3] = (g + 8, 2t), (g + 8, 2t + 1)

Two neighbouring tiles of C, packed, are a tile of A. ldmatrix loads A from rows that run along k with
`transposed=False`; B from rows along k (a matrix stored column by column, as keys are) with `transposed=False`, and
from rows along columns (as values are) with `transposed=True`.

Source: https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.backend.cuda.op import cuda_func_call
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from attnrewrite.lowering.kernels.gpu_builder import Expr, registers

ELEMENT_TYPES = ("float16", "bfloat16")
ELEMENT_BYTES = 2
WARP = 32

# Rows and steps of the reduction that one matrix instruction takes (m16n8k16), and its columns.
STEP = 16
COLUMNS = 8

# Of the oldest chip whose matrix instructions take the type.
OLDEST_ARCH = {"float16": 75, "bfloat16": 80}

_PREFIX = "attnrewrite_"
_OUTPUTS = '"+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])'


def _mma(dtype: str) -> str:
    # Volatile, for else a compiler may move it to where its result is used, which not all lanes may reach.
    short = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    whole = f"""
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.{short}.{short}.f32 "
      "{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
      : {_OUTPUTS} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));"""
    if dtype == "float16":
        halves = "".join(
            f"""
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{{%0, %1, %2, %3}}, {{%4, %5}}, {{%6}}, {{%0, %1, %2, %3}};"
      : {_OUTPUTS} : "r"(a[{2 * step}]), "r"(a[{2 * step + 1}]), "r"(b[{step}]));"""
            for step in range(2)
        )
        whole = f"\n#if __CUDA_ARCH__ >= 800{whole}\n#else{halves}\n#endif"
    return f"(float* c, const unsigned* a, const unsigned* b) {{{whole}\n}}"


def _load_matrices(count: int, transposed: bool) -> str:
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"=r"(target[{i}])' for i in range(count))
    option = ".trans" if transposed else ""
    return f"""(unsigned* target, const void* row) {{
  asm volatile("ldmatrix.sync.aligned.m8n8.x{count}{option}.shared.b16 {{{registers}}}, [%{count}];"
      : {outputs} : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
}}"""


def _copy_async(size: int) -> str:
    word = {16: "int4", 8: "int2", 4: "int"}[size]
    # Only copies of 16 bytes may pass by the L1 cache.
    cache = "cg" if size == 16 else "ca"
    return f"""(void* target, const void* source, bool present) {{
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.{cache}.shared.global [%0], [%1], {size}, %2;"
      :: "r"((unsigned)__cvta_generic_to_shared(target)), "l"(source), "r"(present ? {size} : 0) : "memory");
#else
  {word} value = {{}};
  if (present) value = *(const {word}*)source;
  *({word}*)target = value;
#endif
}}"""


def _since_sm80(instruction: str) -> str:
    return f'() {{\n#if __CUDA_ARCH__ >= 800\n  asm volatile("{instruction}" ::: "memory");\n#endif\n}}'


_PACK_FLOAT16 = """(float low, float high) {
  unsigned packed;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
  asm("{.reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}"
      : "=r"(packed) : "f"(low), "f"(high));
#endif
  return packed;
}"""
_PACK_BFLOAT16 = """(float low, float high) {
  unsigned packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}"""


_MULTIPLY_FLOAT16 = """(unsigned a, unsigned b) {
  unsigned product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}"""
# Of bfloat16, multiplication is an instruction of its own from sm_90 on only; a product plus -0 is the product.
_MULTIPLY_BFLOAT16 = """(unsigned a, unsigned b) {
  unsigned product;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  return product;
}"""


def _half_of(register: str) -> str:
    return f"""(unsigned word) {{
  float value;
  asm volatile("{{.reg .b16 l, h; mov.b32 {{l, h}}, %1; cvt.f32.f16 %0, {register};}}" : "=f"(value) : "r"(word));
  return value;
}}"""


def _approximate(instruction: str) -> str:
    return f"""(float x) {{
  float y;
  asm("{instruction}.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}}"""


# In two steps of the butterfly: lanes a step apart exchange the two words that belong to the other.
_TRANSPOSE_QUAD = """(unsigned* words) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const unsigned other = __shfl_xor_sync(0xffffffff, odd ? words[i] : words[i + 1], 1);
    if (odd) words[i] = other; else words[i + 1] = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned other = __shfl_xor_sync(0xffffffff, high ? words[i] : words[i + 2], 2);
    if (high) words[i] = other; else words[i + 2] = other;
  }
}"""

# name -> type of the result, parameters and body.
_FUNCTIONS: dict[str, tuple[str, str]] = {
    **{f"mma_{dtype}": ("void", _mma(dtype)) for dtype in ELEMENT_TYPES},
    **{
        f"load_matrices_{count}{'_transposed' * transposed}": ("void", _load_matrices(count, transposed))
        for count in (2, 4)
        for transposed in (False, True)
    },
    **{f"copy_async_{size}": ("void", _copy_async(size)) for size in (4, 8, 16)},
    "copy_commit": ("void", _since_sm80("cp.async.commit_group;")),
    **{f"copy_wait_{n}": ("void", _since_sm80(f"cp.async.wait_group {n};")) for n in range(3)},
    "pack_float16": ("unsigned", _PACK_FLOAT16),
    "pack_bfloat16": ("unsigned", _PACK_BFLOAT16),
    "multiply_float16": ("unsigned", _MULTIPLY_FLOAT16),
    "multiply_bfloat16": ("unsigned", _MULTIPLY_BFLOAT16),
    "low_float16": ("float", _half_of("l")),
    "high_float16": ("float", _half_of("h")),
    "low_bfloat16": ("float", "(unsigned word) { return __uint_as_float(word << 16); }"),
    "high_bfloat16": ("float", "(unsigned word) { return __uint_as_float(word & 0xffff0000u); }"),
    "firsts": ("unsigned", "(unsigned a, unsigned b) { return __byte_perm(a, b, 0x5410); }"),
    "seconds": ("unsigned", "(unsigned a, unsigned b) { return __byte_perm(a, b, 0x7632); }"),
    "fma": ("float", "(float a, float b, float c) { return fmaf(a, b, c); }"),
    "exp2": ("float", _approximate("ex2")),
    "reciprocal": ("float", _approximate("rcp")),
    "transpose_quad": ("void", _TRANSPOSE_QUAD),
    "keep": ("void", "(const void* memory) {}"),
}
_TVM_TYPES = {"void": "void", "unsigned": "uint32", "float": "float32"}


def has_tensor_cores(target: Target, dtype: str) -> bool:
    """Whether `dtype` is multiplied by matrix instructions of this CUDA chip."""
    return dtype in OLDEST_ARCH and _arch(target) >= OLDEST_ARCH[dtype]


def copies_asynchronously(target: Target) -> bool:
    """Whether this CUDA chip copies to shared memory while it computes."""
    return _arch(target) >= 80


def _arch(target: Target) -> int:
    """90 for sm_90 and sm_90a; 0 for what is not CUDA."""
    return int("".join(filter(str.isdigit, str(target.attrs["arch"])))) if target.kind.name == "cuda" else 0


def exponential(target: Target) -> Callable[[Expr], Expr]:
    """What emits exp(x) as float32, for x <= 0."""
    return TensorCore(target, "float16").exponential if target.kind.name == "cuda" else tirx.exp


class TensorCore:
    """Emits the calls, inside an open kernel. Pointers are what `at` gives; `dtype` is float16 or bfloat16.

    Every call but those of numbers and copies needs all 32 lanes of a warp, the threads of a row of 32 along x.
    """

    def __init__(self, target: Target, dtype: str) -> None:
        self.dtype, self._cuda = dtype, target.kind.name == "cuda"

    def mma(self, c: Expr, a: Expr, b: Expr) -> None:
        """c += a b: four float32 at `c`, four words at `a`, two at `b`."""
        self._do(f"mma_{self.dtype}", c, a, b)

    def load_matrices(self, target: Expr, row: Expr, count: int, *, transposed: bool = False) -> None:
        """`count` (2 or 4) matrices of 8 x 8 into as many words at `target`.

        row: lane 8 m + r points to row r of matrix m, 16 bytes in shared memory that are aligned to 16; with two
        matrices, the pointers of lanes from 16 on are not used.
        """
        self._do(f"load_matrices_{count}{'_transposed' * transposed}", target, row)

    def copy_async(self, target: Expr, source: Expr, size: int, present: Expr | bool) -> None:
        """Begins to copy `size` bytes (4, 8 or 16, aligned to as many) to shared memory; zeros where not `present`.

        Where not `present` the source is not read.
        """
        condition = tirx.const(present, "bool") if isinstance(present, bool) else present
        self._do(f"copy_async_{size}", target, source, condition)

    def commit(self) -> None:
        """Closes a group of this thread's copies; it may be empty."""
        self._do("copy_commit")

    def wait(self, pending: int) -> None:
        """Until all groups of this thread have arrived but the last `pending` (0 to 2)."""
        self._do(f"copy_wait_{pending}")

    def pack(self, low: Expr, high: Expr) -> Expr:
        """Two float32 as one word of two elements, each rounded to the nearest."""
        return self._call(f"pack_{self.dtype}", low, high)

    def multiply(self, a: Expr, b: Expr) -> Expr:
        """The products of the elements of two words, each rounded to the nearest."""
        return self._call(f"multiply_{self.dtype}", a, b)

    def low(self, word: Expr) -> Expr:
        """The first element of a word, as float32."""
        return self._call(f"low_{self.dtype}", word)

    def high(self, word: Expr) -> Expr:
        """The second element of a word, as float32."""
        return self._call(f"high_{self.dtype}", word)

    def firsts(self, a: Expr, b: Expr) -> Expr:
        """The first elements of two words, as one."""
        return self._call("firsts", a, b)

    def seconds(self, a: Expr, b: Expr) -> Expr:
        """The second elements of two words, as one."""
        return self._call("seconds", a, b)

    def fma(self, a: Expr, b: Expr, c: Expr) -> Expr:
        """a b + c in float32, rounded once."""
        return self._call("fma", a, b, c)

    def exp2(self, x: Expr) -> Expr:
        """2**x within 2 ulp, as float32; results below the normal numbers are zero."""
        return self._call("exp2", x)

    def exponential(self, x: Expr) -> Expr:
        """exp(x) within 2 + |x| ulp, as float32: an error that is small where x is not, beside a weight exp(0)."""
        return self.exp2(x * tirx.const(math.log2(math.e), "float32"))

    def reciprocal(self, x: Expr) -> Expr:
        """1 / x within 1 ulp, as float32; of results below the normal numbers it is zero."""
        return self._call("reciprocal", x)

    def transpose_quad(self, words: Expr) -> None:
        """Of the four words of each of lanes 4 g to 4 g + 3, lane 4 g + t gets word t of all four, in their order."""
        self._do("transpose_quad", words)

    def shared(self, elements: int) -> tirx.Buffer:
        """Shared memory for the kernel's element type."""
        return self.whole(T.alloc_buffer((elements,), self.dtype, scope="shared"))

    def words(self, count: int) -> tirx.Buffer:
        """Registers for fragments: two elements each."""
        return self.whole(registers(count, "uint32"))

    def sums(self, count: int) -> tirx.Buffer:
        """Registers for accumulators."""
        return self.whole(registers(count))

    def whole(self, buffer: tirx.Buffer) -> tirx.Buffer:
        """The buffer in its full size: TVM shrinks others to the elements that it sees loaded and stored itself."""
        self._do("keep", buffer.data)
        return buffer

    def _do(self, name: str, *arguments: Expr) -> None:
        T.evaluate(self._call(name, *arguments))

    def _call(self, name: str, *arguments: Expr) -> Expr:
        result, source = _FUNCTIONS[name]
        full_name, dtype = _PREFIX + name, _TVM_TYPES[result]
        if not self._cuda:
            return tirx.call_extern(dtype, full_name, *arguments)
        code = f"__device__ __forceinline__ {result} {full_name}{source}\n"
        return cuda_func_call(full_name, *arguments, source_code=code, return_type=dtype)


def at(buffer: tirx.Buffer, index: Any) -> Expr:
    """Pointer to an element."""
    return tirx.address_of(tirx.BufferLoad(buffer, [index]))


def as_bits(buffer: tirx.Buffer, elements: int) -> tirx.Buffer:
    """A buffer of 16-bit elements as one row of unsigned integers, of one or two elements each."""
    count = math.prod(buffer.shape[1:], start=tirx.Cast("int32", buffer.shape[0]))
    dtype = {1: "uint16", 2: "uint32"}[elements]
    return T.decl_buffer((count // elements,), dtype, data=buffer.data, scope=buffer.scope())
