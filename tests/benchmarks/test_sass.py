"""Listings of machine code are read as the loops they are, and what a warp issues is added up from trips round them."""

from __future__ import annotations

import pytest

from benchmarks import sass

# A loop within another, of which a part lies behind the end of the kernel.
LISTING = """
	.headerflags	@"EF_CUDA_SM90"
.text.attend:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0030*/                   LDS.128 R8, [R1+0x10] ;
        /*0040*/                   FFMA R5, R4, R8, R5 ;
        /*0050*/                   FFMA R5, R4, R9, R5 ;
        /*0060*/              @!P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/                   STS.U16 [R1], R5 ;
        /*0080*/                   BRA.U UP0, `(.L_x_0) ;
        /*0090*/               @P2 EXIT ;
        /*00a0*/                   F2FP.F16.F32.PACK_AB R5, RZ, R5 ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   MUFU.EX2 R5, R5 ;
        /*00d0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00e0*/                   BRA `(.L_x_4) ;
        /*00f0*/                   NOP ;
"""


def kernel() -> sass.Kernel:
    (found,) = sass.read_kernels(LISTING)
    return found


def test_an_instruction_counts_for_the_innermost_loop_around_it() -> None:
    whole, outer, inner = kernel().loops
    assert (whole.depth, outer.depth, inner.depth) == (0, 1, 2)
    assert (outer.first, inner.first, inner.last) == (0x10, 0x30, 0x60)
    assert inner.own == {"LDS 128": 1, "FFMA": 2, "other": 1}
    # With what is behind the end, and comes back.
    assert outer.own == {"LDG 128": 1, "MUFU": 1, "STS 16": 1, "other": 3}
    # The jump to itself that fills the kernel up is never reached.
    assert whole.own == {"convert": 1, "other": 5}


def test_trips_multiply() -> None:
    issued = kernel().issued([3, 5])
    assert (issued["FFMA"], issued["LDG 128"], issued["convert"]) == (2 * 5 * 3, 3, 1)
    assert sass.shared_bytes(issued) == 3 * (5 * 512 + 64)
    with pytest.raises(ValueError, match="shorter"):
        kernel().issued([3])


def test_kinds_are_listed_in_their_order_wide_accesses_first() -> None:
    assert sass.kinds_in_order([{"other": 1, "LDS 32": 1}, {"FFMA": 2, "LDS 128": 1}]) == [
        "FFMA",
        "LDS 128",
        "LDS 32",
        "other",
    ]
