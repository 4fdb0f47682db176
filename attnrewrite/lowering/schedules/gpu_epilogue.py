"""How the sums of a product leave the kernel: through the element-wise stage that follows, in runs of four columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tvm import tirx

from attnrewrite.lowering.kernels.gpu_builder import Flat, load, registers
from attnrewrite.lowering.schedules.gpu_emit import Bound, Device, as_type, put
from attnrewrite.lowering.schedules.gpu_reads import ReadAhead
from attnrewrite.lowering.schedules.gpu_vectors import LANES, address, runs_in_lanes
from attnrewrite.lowering.schedules.loops import const
from attnrewrite.lowering.schedules.products import Contraction
from attnrewrite.lowering.schedules.stages import Expr, Stage, simplify, substitute, substitute_loads


class Epilogue:
    """Stores the results of a product; open only inside its launch.

    stage: the element-wise stage that consumes the sums; None stores them as they are.
    """

    def __init__(self, contraction: Contraction, stage: Stage | None, device: Device) -> None:
        self._contraction, self._device = contraction, device
        self._buffer = (stage or contraction.stage).buffer
        self._results = registers(LANES, str(self._buffer.dtype))
        self._stage = stage
        if stage is not None:
            own = dict(zip(stage.indices, self._output_indices({}), strict=True))
            sums, columns = contraction.stage.buffer, contraction.columns
            self._ahead = ReadAhead(substitute(stage.value, own), columns, besides=sums)
            of_columns = {axis.var for axis in columns}
            self._of_columns = [read for read in self._ahead.reads if read.axes <= of_columns]
            self._of_rows = [read for read in self._ahead.reads if not read.axes <= of_columns]

    @property
    def lanes(self) -> int:
        """How many neighbouring columns, from a multiple of that many on, are stored at once."""
        in_lanes = runs_in_lanes(self._buffer, self._output_indices({}), self._contraction.columns)
        return LANES if in_lanes else 1

    def fetch_columns(self, at: Sequence[Bound]) -> None:
        """Reads what is the same for all rows, at neighbouring columns."""
        if self._stage is not None:
            self._ahead.fetch(self._of_columns, at)

    def store_row(self, at: Sequence[Bound], sums: Sequence[Expr]) -> None:
        """The outputs of one row at the neighbouring columns last fetched. sums: float32, one for each of them."""
        buffer, lanes = self._buffer, len(at)
        if self._stage is not None:
            self._ahead.fetch(self._of_rows, at)
        if lanes == 1:
            put(self._device, buffer, self._output_indices(at[0]), self._result(at[0], 0, sums[0]))
            return
        for lane in range(lanes):
            put(self._device, self._results, [lane], self._result(at[lane], lane, sums[lane]))
        place = simplify(address(buffer, self._output_indices(at[0])))
        Flat(buffer, lanes).store(place, load(self._results, [tirx.Ramp(0, 1, lanes)]))

    def _output_indices(self, at: Bound) -> list[Expr]:
        """Where in the output the sum at a position of the product goes."""
        own = {**at, **{var: substitute(value, at) for var, value in self._contraction.split.items()}}
        return [own.get(axis.var, axis.var) for axis in self._contraction.stage.axes]

    def _result(self, at: Bound, lane: int, sum_: Expr) -> Expr:
        """What is stored for a sum."""
        if self._stage is None:
            return sum_
        product = self._contraction.stage
        computed = replace(product, value=as_type(sum_, str(product.buffer.dtype)), reduction=())
        value = substitute_loads(self._ahead.value, computed)
        return substitute(value, {**at, self._ahead.lane: const(lane)})
