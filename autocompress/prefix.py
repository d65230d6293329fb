"""Running models of which others have already run a part: values are named by what they were computed from, and kept.

A program is a list of steps. A step's digest names its operation, its weights and the digests of its inputs: equal digests are
equal values, whichever plan asked first. A value is computed only when nothing nearer to the output is kept: layers before
the first changed one are not run again. What is computed is what a plain run computes, to the bit.

Knows nothing of plans, tasks or databases.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from torch import Tensor

from autocompress.graph import Graph

CACHE_BYTES = 2 * 2**30
MEMORY_SHARE = 8
"""Values may take up to 2 GiB, or this part of the machine's memory where that is less."""
SMALL_BYTES = 64 * 2**10
"""Values so small (a batch of logits) are always kept: the answer on a slice is part of the answer on the whole split."""
SEEN = 50_000
"""How many digests are remembered to find out what several plans need."""

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
Digest = bytes
INPUT: Digest = b"input"


def digest_of(what: object, inputs: Iterable[Digest]) -> Digest:
    """The name of a value: ``what`` (its ``repr``) was done to ``inputs``."""
    sha = hashlib.blake2b(repr(what).encode(), digest_size=16)
    for part in inputs:
        sha.update(part)
    return sha.digest()


@dataclass(frozen=True, eq=False)
class Step:
    """One operation: ``run(*values of inputs)``.

    ``worth``: 0 is never kept, 1 is where few examples run, 2 everywhere: other plans may start from its value.
    """

    digest: Digest
    inputs: tuple[Digest, ...]
    run: Callable[..., Any]
    worth: int = 0


class Program:
    """Steps in the order they can run."""

    def __init__(self) -> None:
        self.steps: dict[Digest, Step] = {}

    def add(self, what: object, inputs: Sequence[Digest], run: Callable[..., Any], worth: int = 0) -> Digest:
        """Append a step and return its digest; a value that is there already is not computed twice."""
        digest = digest_of(what, inputs)
        if digest not in self.steps:
            self.steps[digest] = Step(digest, tuple(inputs), run, worth)
        return digest


class ByteCache(Generic[K, V]):
    """What was used last, up to ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._kept: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def get(self, key: K) -> V | None:
        """The value, which then counts as used."""
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        return found[0]

    def put(self, key: K, value: V, size: int) -> V:
        """Keep a value of ``size`` bytes, unless it alone is too large."""
        if size <= self.limit and key not in self._kept:
            self._kept[key] = (value, size)
            self.bytes += size
            while self.bytes > self.limit:
                self.bytes -= self._kept.popitem(last=False)[1][1]
        return value


class Activations:
    """Values by (place in the data, digest), and which digests several plans have had."""

    def __init__(self, limit: int | None = None) -> None:
        self.kept: ByteCache[tuple[Hashable, Digest], Tensor] = ByteCache(default_limit() if limit is None else limit)
        self._seen: OrderedDict[Digest, int] = OrderedDict()

    def expect(self, program: Program, times: int = 1) -> None:
        """Count what a program may leave to others; a value is kept from the second plan on that has it."""
        for step in program.steps.values():
            if step.worth:
                self._seen[step.digest] = self._seen.pop(step.digest, 0) + times
        while len(self._seen) > SEEN:
            self._seen.popitem(last=False)

    def run(
        self,
        program: Program,
        targets: Sequence[Digest],
        place: Hashable,
        inputs: Callable[[], Tensor],
        least: int = 1,
    ) -> list[Any]:
        """Values of ``targets`` for one batch. ``place`` names the batch, ``inputs()`` makes the model's input of it.

        ``least``: how much a value must be worth here to be kept.
        """
        values: dict[Digest, Any] = {}
        todo = self._todo(program, targets, place, values)
        uses = Counter(digest for step in todo for digest in step.inputs)
        uses.update(targets)
        if INPUT in uses:
            values[INPUT] = inputs()
        for step in todo:
            values[step.digest] = value = step.run(*(values[digest] for digest in step.inputs))
            if isinstance(value, Tensor) and self._is_kept(step, value, targets, least):
                self.kept.put((place, step.digest), value, value.untyped_storage().nbytes())
            for digest in step.inputs:
                uses[digest] -= 1
                if not uses[digest]:
                    values.pop(digest, None)
        return [values[digest] for digest in targets]

    def _todo(
        self, program: Program, targets: Sequence[Digest], place: Hashable, values: dict[Digest, Any]
    ) -> list[Step]:
        """Steps that must run, in order; values that are kept go into ``values``."""
        wanted = set(targets)
        todo: list[Step] = []
        for digest, step in reversed(program.steps.items()):
            kept = self.kept.get((place, digest)) if step.worth or digest in wanted else None
            if digest not in wanted:
                continue
            if kept is not None:
                values[digest] = kept
            else:
                todo.append(step)
                wanted.update(step.inputs)
        return todo[::-1]

    def _is_kept(self, step: Step, value: Tensor, targets: Sequence[Digest], least: int) -> bool:
        if step.digest in targets and value.untyped_storage().nbytes() <= SMALL_BYTES:
            return True
        return step.worth >= least and self._seen.get(step.digest, 0) > 1


def default_limit(share: int = 1) -> int:
    """Bytes for one of ``share`` processes on this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(CACHE_BYTES, memory // MEMORY_SHARE)) // share


@dataclass(frozen=True)
class Cut:
    """A node that everything behind it depends on alone. ``before``: layers that have run; ``bytes`` for one example."""

    node: str
    before: int
    bytes: int


def find_cuts(graph: Graph) -> list[Cut]:
    """Nodes through which all that was computed with weights must pass, one between any two layers, in order."""
    nodes = list(graph.module.graph.nodes)
    last = {source: i for i, node in enumerate(nodes) for source in node.all_input_nodes}
    layers = {layer.node for layer in graph.layers.values()}
    weighted: set[Any] = set()
    live: set[Any] = set()
    found: dict[int, Cut] = {}
    before = 0
    for i, node in enumerate(nodes):
        before += node.name in layers
        if node.name in layers or any(source in weighted for source in node.all_input_nodes):
            weighted.add(node)
            live.add(node)
        live = {one for one in live if last.get(one, -1) > i}
        value = graph.values.get(node.name)
        if live == {node} and value is not None and value.shape:
            found[before] = Cut(node.name, before, 4 * int(np.prod(value.shape[1:])))
    return list(found.values())


def choose_cuts(cuts: Sequence[Cut], macs: Sequence[float], limit: int) -> frozenset[str]:
    """Cuts that save most when any one layer changes, within ``limit`` bytes for an example. ``macs``: by layer, in order.

    Greedy by saving per byte; a layer's change saves all that runs before the last cut in front of it.
    """
    total = np.cumsum([0.0, *macs])
    best = np.zeros(len(macs))
    chosen: set[str] = set()
    left = list(cuts)
    room = limit
    while left:
        gains = [float(np.maximum(total[cut.before] - best[cut.before :], 0).sum()) for cut in left]
        rate, index = max((gain / max(cut.bytes, 1), -i) for i, (gain, cut) in enumerate(zip(gains, left, strict=True)))
        cut = left.pop(-index)
        if rate <= 0:
            break
        if cut.bytes <= room:
            room -= cut.bytes
            chosen.add(cut.node)
            best[cut.before :] = np.maximum(best[cut.before :], total[cut.before])
    return frozenset(chosen)
