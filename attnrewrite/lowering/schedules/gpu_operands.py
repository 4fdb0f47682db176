"""The operands of a matrix product on a GPU: tiles of them in shared memory, a few steps of the reduction at a time.

An operand is read through its own index expression, so that a convolution's window is not unfolded in memory. Where
neighbours in memory are neighbours in the product, runs of them are loaded at once (gpu_vectors.py). What lies outside
the product is zero in the tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import DataType, tirx
from tvm.tirx.script.builder import ir as T

from attnrewrite.lowering.kernels.gpu_builder import (
    WORD_BYTES,
    Flat,
    SharedMemory,
    SharedTile,
    TileShape,
    choose,
    every,
    load,
    registers,
    store,
    typed,
    when,
)
from attnrewrite.lowering.kernels.tensor_core import TensorCore
from attnrewrite.lowering.schedules.gpu_emit import Bound, Thread, as_type, below, bind_axes, count, keep
from attnrewrite.lowering.schedules.gpu_vectors import LANES, address, runs_in_lanes
from attnrewrite.lowering.schedules.products import Contraction
from attnrewrite.lowering.schedules.stages import Axis, Expr, is_load, loads_of, stride, substitute


@dataclass(frozen=True)
class Operand:
    """One side of a product: `value` at a place along `axes` (rows or columns) and a step of `reduction`.

    lanes: how many neighbours are loaded at once, along the axes or, with along_steps, along the reduction.
    """

    value: Expr
    axes: tuple[Axis, ...]
    reduction: tuple[Axis, ...]
    along_steps: bool
    lanes: int

    @property
    def dtype(self) -> str:
        return str(self.value.ty.dtype)


def read_operand(contraction: Contraction, value: Expr, axes: tuple[Axis, ...], most_lanes: int = LANES) -> Operand:
    """A side of the product with the widest loads, of at most so many elements, that its layout allows."""
    value, reduction = substitute(value, contraction.split), contraction.stage.reduction
    for lanes in sorted({most_lanes, LANES}, reverse=True):
        for along, along_steps in ((reduction, True), (axes, False)):
            if is_load(value) and runs_in_lanes(value.source, value.indices, along, lanes):
                return Operand(value, axes, reduction, along_steps, lanes)
    return Operand(value, axes, reduction, not _runs_along(value, axes, reduction), 1)


class StagedOperand:
    """A tile of an operand in shared memory: `depth` steps by `places` rows or columns of the product.

    by_place: the tile has a row for every place, where the operand's memory runs along the reduction; otherwise it
    always has one for every step. memory, first_byte: where the tile lies; without, it has memory of its own.
    stages: how many such tiles, one after the other. copies: by which runs of elements are copied asynchronously.
    """

    def __init__(
        self,
        thread: Thread,
        operand: Operand,
        depth: int,
        places: int,
        dtype: str,
        *,
        by_place: bool = False,
        memory: SharedMemory | None = None,
        first_byte: int = 0,
        stages: int = 1,
        copies: TensorCore | None = None,
    ) -> None:
        self.thread, self.operand, self.depth, self.places, self.dtype = thread, operand, depth, places, dtype
        self.by_place = by_place and operand.along_steps
        self._height, width = (places, depth) if self.by_place else (depth, places)
        shape = TileShape(stages * self._height, width, dtype)
        self.tile = SharedTile(shape, memory, first_byte, lanes=sorted({1, 2, LANES, operand.lanes}))
        # Elements that are not neighbours in the tile as well, or less than a word of them, go through registers.
        words = operand.lanes * DataType(dtype).itemsize >= 4 and self.by_place == operand.along_steps
        self._copies = copies if words else None
        self._run = registers(operand.lanes, dtype)
        self._fetched = None if copies is None or words else registers(self._rounds, dtype)

    def at(self, step: Expr, place: Expr, stage: Expr | int = 0) -> tuple[Expr, Expr]:
        """Row and column in the tiles."""
        row, column = (place, step) if self.by_place else (step, place)
        return row + stage * self._height, column

    def stage(self, batch: Bound, first_place: Expr, first_step: Expr, stage: Expr | int = 0) -> None:
        """Copies the tile whose corner is at a place and step, dealt over all threads, neighbours along memory."""
        with T.serial(self._rounds) as round_:
            dealt, step, place = self._position(round_)
            with when(dealt):
                value, inside = self._element(batch, first_place, first_step, step, place)
                self._put(value, inside, *self.at(step, place, stage))

    def fetch(self, batch: Bound, first_place: Expr, first_step: Expr, stage: Expr | int = 0) -> None:
        """Begins to copy the tile. It is there when asynchronous copies have arrived and `put_fetched` was called."""
        if self._fetched is None:
            self.stage(batch, first_place, first_step, stage)
            return
        for round_ in range(self._rounds):
            dealt, step, place = self._position(round_)
            value, inside = self._element(batch, first_place, first_step, step, place)
            zero = tirx.const(0.0, self.dtype)
            store(self._fetched, [round_], choose(every([dealt, inside]), as_type(value, self.dtype), zero))

    def put_fetched(self, stage: Expr | int) -> None:
        """Writes to the tile what `fetch` has in registers."""
        if self._fetched is None:
            return
        for round_ in range(self._rounds):
            dealt, step, place = self._position(round_)
            with when(dealt):
                self.tile.store(*self.at(step, place, stage), load(self._fetched, [round_]))

    @property
    def _threads(self) -> int:
        return self.thread.size[0] * self.thread.size[1]

    @property
    def _rounds(self) -> int:
        """How many runs of elements a thread copies."""
        return -(-(self.depth * self.places // self.operand.lanes) // self._threads)

    def _position(self, round_: Expr | int) -> tuple[Expr | bool, Expr, Expr]:
        """Whether there is a run for this thread, and the step and place at which it begins."""
        operand, lanes = self.operand, self.operand.lanes
        threads = self._threads
        fast = self.depth if operand.along_steps else self.places
        flat = keep(round_ * threads + self.thread.index)
        outer = keep(tirx.floordiv(flat, fast // lanes))
        inner = keep(tirx.floormod(flat, fast // lanes) * lanes)
        step, place = (inner, outer) if operand.along_steps else (outer, inner)
        return below(flat, self.depth * self.places // lanes, threads), step, place

    def _element(
        self, batch: Bound, first_place: Expr, first_step: Expr, step: Expr, place: Expr
    ) -> tuple[Expr, Expr | bool]:
        """The operand there, and whether it lies inside the product."""
        operand = self.operand
        extent, steps = count(operand.axes), count(operand.reduction)
        at = {
            **batch,
            **bind_axes(operand.axes, first_place + place),
            **bind_axes(operand.reduction, first_step + step),
        }
        inside = [below(first_place + place, extent, self.places), below(first_step + step, steps, self.depth)]
        return substitute(operand.value, at), every(inside)

    def _put(self, value: Expr, inside: Expr | bool, row: Expr, column: Expr) -> None:
        """The element there, or a run along memory from there on; zero where it is not inside."""
        lanes, zero = self.operand.lanes, tirx.const(0.0, self.dtype)
        if self._copies is not None:
            size = lanes * DataType(self.dtype).itemsize
            target = tirx.address_of(self.tile.load(row, column))
            self._copies.copy_async(target, tirx.address_of(value), size, inside)
            return
        if lanes == 1:
            self.tile.store(row, column, choose(inside, as_type(value, self.dtype), zero))
            return
        source = Flat(value.source, lanes)
        run = source.load(address(value.source, value.indices))
        if lanes > LANES:  # bits of the type that the tile has as well
            self.tile.store(row, column, choose(inside, run, source.zero), lanes)
            return
        run = choose(inside, typed(run, self.dtype, lanes), tirx.Broadcast(zero, lanes))
        if self.by_place == self.operand.along_steps:
            self.tile.store(row, column, run, lanes)
            return
        store(self._run, [tirx.Ramp(0, 1, lanes)], run)
        for lane in range(lanes):
            self.tile.store(row + lane, column, load(self._run, [lane]))


def staged_bytes(operand: Operand, depth: int, places: int, dtype: str) -> int:
    """Of the tile that is staged by place where the operand's memory runs along the reduction."""
    return (TileShape(places, depth, dtype) if operand.along_steps else TileShape(depth, places, dtype)).size_bytes


def lanes_of_word(dtype: str) -> int:
    return WORD_BYTES // DataType(dtype).itemsize


def _runs_along(value: Expr, axes: Sequence[Axis], reduction: Sequence[Axis]) -> bool:
    """The operand's memory runs along `axes` rather than along the reduction."""
    operand = loads_of(value)[0]
    if reduction and stride(operand, reduction[-1].var) == 1 and reduction[-1].size != 1:
        return any(axis.size != 1 and stride(operand, axis.var) == 1 for axis in axes[-1:])
    return True
