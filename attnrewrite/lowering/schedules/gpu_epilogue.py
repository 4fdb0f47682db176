"""How the sums of a product leave the kernel: through the element-wise stage that follows, in runs of four columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import tvm_ffi
from tvm import ir, tirx

from attnrewrite.lowering.kernels.gpu_builder import Flat, load, registers, store
from attnrewrite.lowering.schedules.gpu_emit import Bound, Device, as_type, put
from attnrewrite.lowering.schedules.gpu_parts import IF_THEN_ELSE
from attnrewrite.lowering.schedules.gpu_vectors import LANES, address, runs_in_lanes
from attnrewrite.lowering.schedules.loops import const
from attnrewrite.lowering.schedules.products import Contraction
from attnrewrite.lowering.schedules.stages import (
    Expr,
    Stage,
    calls,
    loads_of,
    simplify,
    substitute,
    substitute_loads,
    variables,
)


@dataclass(frozen=True)
class _Read:
    """What an epilogue reads, at `indices` in the axes of the product, and the registers of a run of columns for it."""

    source: tirx.Buffer
    indices: tuple[Expr, ...]
    held: tirx.Buffer
    of_columns: bool  # the same for all rows


class Epilogue:
    """Stores the results of a product; open only inside its launch.

    stage: the element-wise stage that consumes the sums; None stores them as they are.
    """

    def __init__(self, contraction: Contraction, stage: Stage | None, device: Device) -> None:
        self._contraction, self._device = contraction, device
        self._buffer = (stage or contraction.stage).buffer
        self._results = registers(LANES, str(self._buffer.dtype))
        self._lane = tirx.Var("lane", "int64")
        self._stage, self._reads = self._read_ahead(stage)

    @property
    def lanes(self) -> int:
        """How many neighbouring columns, from a multiple of that many on, are stored at once."""
        in_lanes = runs_in_lanes(self._buffer, self._output_indices({}), self._contraction.columns)
        return LANES if in_lanes else 1

    def fetch_columns(self, at: Sequence[Bound]) -> None:
        """Reads what is the same for all rows, at neighbouring columns."""
        self._fetch([read for read in self._reads if read.of_columns], at)

    def store_row(self, at: Sequence[Bound], sums: Sequence[Expr]) -> None:
        """The outputs of one row at the neighbouring columns last fetched. sums: float32, one for each of them."""
        buffer, lanes = self._buffer, len(at)
        self._fetch([read for read in self._reads if not read.of_columns], at)
        if lanes == 1:
            put(self._device, buffer, self._output_indices(at[0]), self._result(at[0], 0, sums[0]))
            return
        for lane in range(lanes):
            put(self._device, self._results, [lane], self._result(at[lane], lane, sums[lane]))
        place = simplify(address(buffer, self._output_indices(at[0])))
        Flat(buffer, lanes).store(place, load(self._results, [tirx.Ramp(0, 1, lanes)]))

    def _fetch(self, reads: Sequence[_Read], at: Sequence[Bound]) -> None:
        """What the stage reads at neighbouring columns, into registers."""
        for read in reads:
            places = [[substitute(index, bound) for index in read.indices] for bound in at]
            if len(at) == LANES and runs_in_lanes(read.source, read.indices, self._contraction.columns):
                run = Flat(read.source, LANES).load(simplify(address(read.source, places[0])))
                store(read.held, [tirx.Ramp(0, 1, LANES)], run)
            else:
                for lane, place in enumerate(places):
                    store(read.held, [lane], load(read.source, [simplify(index) for index in place]))

    def _read_ahead(self, stage: Stage | None) -> tuple[Stage | None, list[_Read]]:
        """The stage with what it reads besides the sums in registers, per lane; as it is where it reads on
        condition, or where to read from memory.
        """
        if stage is None:
            return None, []
        conditional = IF_THEN_ELSE in calls(stage.value)
        if conditional or any(loads_of(index) for read in loads_of(stage.value) for index in read.indices):
            return stage, []
        reads: list[_Read] = []
        own = dict(zip(stage.indices, self._output_indices({}), strict=True))
        columns = {axis.var for axis in self._contraction.columns}

        def replaced(read: ir.TensorLoad) -> ir.TensorLoad:
            if read.source.same_as(self._contraction.stage.buffer):
                return read
            indices = tuple(substitute(index, own) for index in read.indices)
            of_columns = all(variables(index) <= columns for index in indices)
            held = registers(LANES, str(read.source.dtype))
            reads.append(_Read(read.source, indices, held, of_columns))
            return load(held, [self._lane])

        value = tvm_ffi.structural_map(stage.value, (ir.TensorLoad, replaced), order="post")
        return replace(stage, value=value), reads

    def _output_indices(self, at: Bound) -> list[Expr]:
        """Where in the output the sum at a position of the product goes."""
        own = {**at, **{var: substitute(value, at) for var, value in self._contraction.split.items()}}
        return [own.get(axis.var, axis.var) for axis in self._contraction.stage.axes]

    def _result(self, at: Bound, lane: int, sum_: Expr) -> Expr:
        """What is stored for a sum."""
        product, stage = self._contraction.stage, self._stage
        if stage is None:
            return sum_
        computed = replace(product, value=as_type(sum_, str(product.buffer.dtype)), reduction=())
        value = substitute_loads(stage.value, computed)
        indices = dict(zip(stage.indices, self._output_indices(at), strict=True))
        return substitute(value, {**indices, self._lane: const(lane)})
