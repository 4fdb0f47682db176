"""What nvcc says of its kernels."""

from __future__ import annotations

from attnrewrite.lowering.cuda_resources import KernelResources, read_resources

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attend' for 'sm_80'
ptxas info    : Function properties for attend
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size, 26496 bytes smem, 388 bytes cmem[0]
ptxas info    : Compile time = 12.000 ms
ptxas info    : Compiling entry function 'add' for 'sm_80'
ptxas info    : Function properties for add
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers, 376 bytes cmem[0]
"""


def test_each_kernel_has_its_registers_spills_and_shared_memory() -> None:
    attend, add = read_resources(LOG)
    assert attend == KernelResources("attend", "sm_80", 255, 16, 24, 8, 26496)
    assert add == KernelResources("add", "sm_80", 12, 0, 0, 0, 0)
    assert (attend.spills, add.spills) == (True, False)


def test_a_kernel_told_of_in_part_is_left_out() -> None:
    assert read_resources(LOG[: LOG.index("ptxas info    : Used 12")]) == read_resources(LOG)[:1]
    assert read_resources("nvcc warning : nothing") == ()
