"""Element-wise stages in runs of four neighbouring elements, which a thread loads and stores at once."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx

from attnrewrite.lowering.kernels.gpu_builder import Flat, load, registers
from attnrewrite.lowering.schedules.gpu_emit import Bound, Device, bind_axes, count, put
from attnrewrite.lowering.schedules.gpu_reads import Read, ReadAhead, in_lanes
from attnrewrite.lowering.schedules.gpu_vectors import LANES, address, runs_in_lanes
from attnrewrite.lowering.schedules.loops import const
from attnrewrite.lowering.schedules.stages import Axis, Expr, Stage, simplify, substitute


def may_run(stage: Stage, axes: Sequence[Axis], *, in_memory: bool = False) -> bool:
    """Whether runs of four along these axes, the innermost ones, are neighbours in the output and in all that is read,
    or all read the same. in_memory: where the results of these axes lie one after the other, instead of in the output.
    """
    size = count(axes)
    whole = isinstance(size, int) and size % LANES == 0
    if stage.reduction or not (whole if in_memory else runs_in_lanes(stage.buffer, stage.indices, axes)):
        return False
    return in_lanes(stage.value, axes)


class RunStage:
    """The statements for one run of a stage that may run; open only inside a launch.

    target: buffer and first element where the results of these axes lie one after the other; without, the stage's own.
    """

    def __init__(
        self, stage: Stage, axes: Sequence[Axis], device: Device, target: tuple[tirx.Buffer, Expr] | None = None
    ) -> None:
        self._stage, self._axes, self._device, self._target = stage, axes, device, target
        self._ahead = ReadAhead(stage.value, axes)
        self._results = registers(LANES, str(stage.buffer.dtype))

    @property
    def reads(self) -> list[Read]:
        return self._ahead.reads

    def fetch(self, reads: Sequence[Read], first: Expr, bound: Bound) -> None:
        """Reads these for the run that begins at element `first` of the axes. bound: the other axes."""
        self._ahead.fetch(reads, self._points(first, bound))

    def emit(self, first: Expr, bound: Bound, reads: Sequence[Read]) -> None:
        """Stores that run; what is not among `reads` was fetched before."""
        at = self._points(first, bound)
        self._ahead.fetch(reads, at)
        for lane in range(LANES):
            value = substitute(self._ahead.value, {**at[lane], self._ahead.lane: const(lane)})
            put(self._device, self._results, [lane], value)
        buffer, place = self._target or (self._stage.buffer, None)
        flat = address(buffer, [substitute(i, at[0]) for i in self._stage.indices]) if place is None else place + first
        Flat(buffer, LANES).store(simplify(flat), load(self._results, [tirx.Ramp(0, 1, LANES)]))

    def _points(self, first: Expr, bound: Bound) -> list[Bound]:
        return [{**bound, **bind_axes(self._axes, first + lane)} for lane in range(LANES)]
