"""The routed experts of a layer when they do not all fit in memory: StreamedExperts, exact to the last bit.

Stands where ExpertLayer does. Each call reads the router's choice on the host, lets the experts that are present and the
shared ones run, and meanwhile has the others read; each needed expert is read at most once per call, in file order,
however many tokens want it. A (token, expert) pair is computed as if all experts were there, so the output is the same.

Leaves to others: who leaves memory (cache.py), where experts lie and what a product is (shelves.py), reading (reader.py).

Shapes: T tokens, A active experts per token, P = T * A pairs, E experts, D model dim.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxmoe.arena import ArenaShelf
from mlxmoe.cache import LayerCache
from mlxmoe.errors import UserError
from mlxmoe.kernels import DECODE, phase_of, weighted_sum
from mlxmoe.lookahead import Lookahead, Outcome
from mlxmoe.reader import Reader, Ticket
from mlxmoe.shelves import Busy, Group, Shelf


@dataclass
class StreamCounts:
    """Over all layers: calls that read the routing on the host, seconds those waited for what comes before it to be
    computed, and seconds that were spent waiting for experts."""

    host_reads: int = 0
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0

    def since(self, earlier: StreamCounts) -> tuple[float, float]:
        """Seconds of waiting for experts and of computing since a copy was taken."""
        return self.wait_seconds - earlier.wait_seconds, self.compute_seconds - earlier.compute_seconds


class _Running(NamedTuple):
    """An output that may not be evaluated yet, and the experts that its graph reads."""

    output: mx.array
    cache: LayerCache
    experts: list[int]


class Running:
    """What is being computed, of all layers of a model: until it is, the experts it reads stay where they are."""

    def __init__(self) -> None:
        self._entries: list[_Running] = []

    def add(self, output: mx.array, cache: LayerCache, experts: list[int]) -> None:
        cache.hold(experts)
        self._entries.append(_Running(output, cache, experts))

    def settle(self) -> None:
        """Waits until all of it is computed; what is computed already costs nothing."""
        mx.eval([entry.output for entry in self._entries])
        for entry in self._entries:
            entry.cache.release(entry.experts)
        self._entries.clear()


class Beside(nn.Module):
    """A module that a block calls on the same input as its experts (shared experts). `start` has it computed while experts
    are read; the block's own call on that very array then gets the result."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self._started: tuple[mx.array, mx.array] | None = None

    def start(self, x: mx.array) -> None:
        if self._started is None or self._started[0] is not x:
            self._started = x, self.module(x)
            mx.async_eval(self._started[1])

    def __call__(self, x: mx.array) -> mx.array:
        started, self._started = self._started, None
        return started[1] if started is not None and started[0] is x else self.module(x)


class _Call(NamedTuple):
    """x as the block gave it and as rows [T, D], the chosen experts [T, A] and each of them once, the least wanted first,
    and what reading ahead has to know."""

    x: mx.array
    rows: mx.array
    chosen: np.ndarray
    experts: list[int]
    ahead: Lookahead | None
    scores: mx.array | None
    outcome: Outcome | None
    before: StreamCounts


class StreamedExperts(nn.Module):
    """The routed experts of one layer, called like ExpertLayer: x [..., D], indices [..., A] -> [..., A, D].

    Blocks until every needed expert has been in memory. An error or Ctrl-C while it waits loses nothing: what has arrived
    is used by the next call, what has not is waited for or read again. `running` and `counts` are shared by all layers.
    """

    def __init__(
        self,
        shelf: Shelf,
        cache: LayerCache,
        reader: Reader,
        running: Running,
        counts: StreamCounts,
        beside: Sequence[Beside] = (),
    ):
        super().__init__()
        self._shelf, self._cache, self._reader = shelf, cache, reader
        self._running, self._counts = running, counts
        self._beside = tuple(beside)  # not children: they are the block's
        self._tickets: dict[int, Ticket] = {}
        self._lookahead: Lookahead | None = None
        self._index = 0

    def follow(self, lookahead: Lookahead, index: int) -> None:
        """Lets `lookahead` read for this layer, the index-th of the model, and tells it what is chosen here."""
        self._lookahead, self._index = lookahead, index

    @property
    def num_experts(self) -> int:
        return len(self._shelf.sizes)

    @property
    def cache(self) -> LayerCache:
        return self._cache

    @property
    def nbytes(self) -> int:
        """The most bytes that the layer's experts take."""
        return self._cache.capacity

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        call = self._begin(x, indices)
        y = self._pairs(call)
        self._end(call)
        return y.reshape(*indices.shape, x.shape[-1])

    def weighted(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """x [..., D], experts and router weights [T, A] -> the weighted sum of the chosen experts' outputs [..., D]: for a
        layer on an ArenaShelf, as KernelExperts.weighted, to the last bit.

        Decoding adds up a token's outputs inside its last product, for which all of its experts have to be there. Of
        several tokens whose experts do not fit together one may therefore be read more than once.
        """
        call = self._begin(x, experts)
        if phase_of(call.chosen.size, self.num_experts) == DECODE:
            y = self._sums(call, experts, weights)
        else:
            y = weighted_sum(self._pairs(call).reshape(*experts.shape, -1), weights)
        self._end(call)
        return y.reshape(x.shape)

    def _begin(self, x: mx.array, indices: mx.array) -> _Call:
        """Waits for the routing, and lets everybody know of it."""
        rows = x.reshape(-1, x.shape[-1])
        ahead = self._lookahead if len(rows) == 1 else None  # a prompt needs most experts anyway
        scores = ahead.scores(self._index, rows) if ahead is not None else None
        before = replace(self._counts)
        chosen = self._read_routing(indices, scores)
        self._collect()
        # The most wanted last, so that a policy which goes by recency keeps them
        found, pairs = np.unique(chosen, return_counts=True)
        experts: list[int] = found[np.argsort(pairs, kind="stable")].tolist()
        self._cache.routed(experts)
        outcome = ahead.routed(self._index, experts) if ahead is not None else None
        return _Call(x, rows, chosen, experts, ahead, scores, outcome, before)

    def _meanwhile(self, call: _Call, missing: Sequence[int]) -> None:
        """What is done while experts are read."""
        if call.ahead is not None:
            call.ahead.fetch(self._index, call.scores)
        if missing:
            for module in self._beside:
                module.start(call.x)

    def _end(self, call: _Call) -> None:
        if call.ahead is not None and call.outcome is not None:
            call.ahead.record(self._index, call.experts, call.outcome, *self._counts.since(call.before))

    def _pairs(self, call: _Call) -> mx.array:
        """The output of each pair [P, D]: of the experts that are there first, of the others as they come."""
        groups = group_pairs(call.chosen)
        here, missing = self._divide(groups)
        batch = self._fetch(missing, keep=here)
        self._meanwhile(call, missing)
        done, outputs = list(here), [self._launch(call, [groups[e] for e in here])] if here else []
        if missing:
            mx.async_eval(outputs)
        while missing:
            if not batch:
                self._clear(missing)
                batch = self._fetch(missing) or [e for e in missing if e in self._tickets]
            missing = [e for e in missing if e not in batch]
            following = self._fetch(missing)
            self._await(batch)
            outputs.append(self._launch(call, [groups[e] for e in batch]))
            done += batch
            batch = following
            if missing:
                mx.async_eval(outputs[-1])
        return _in_order(outputs, [groups[e] for e in done])

    def _sums(self, call: _Call, experts: mx.array, weights: mx.array) -> mx.array:
        """The weighted sum of each token [T, D], for as many tokens at a time as have room for their experts."""
        sums: list[mx.array] = []
        for start, stop in self._waves(call.chosen):
            if sums:
                mx.async_eval(sums[-1])
            wave = call._replace(rows=call.rows[start:stop], chosen=call.chosen[start:stop])
            sums.append(self._wave_sums(wave, experts[start:stop], weights[start:stop]))
        return sums[0] if len(sums) == 1 else mx.concatenate(sums)

    def _waves(self, chosen: np.ndarray) -> list[tuple[int, int]]:
        """Tokens from and up to, one after the other, where the experts of one more would not fit beside the others."""
        starts, together = [0], set[int]()
        for token, experts in enumerate(chosen.tolist()):
            if sum(self._shelf.sizes[e] for e in together.union(experts)) > self._cache.capacity:
                starts.append(token)
                together.clear()
            together.update(experts)
        return list(pairwise([*starts, len(chosen)]))

    def _wave_sums(self, call: _Call, experts: mx.array, weights: mx.array) -> mx.array:
        """The same for tokens whose experts fit: what those that are there do first is done while the others are read."""
        shelf, groups = self._shelf, group_pairs(call.chosen)
        assert isinstance(shelf, ArenaShelf)
        here, missing = self._divide(groups)
        self._fetch_all(missing, keep=groups)
        self._meanwhile(call, missing)
        if not missing:
            y = shelf.weighted(call.rows, experts, weights)
        else:
            hidden = [self._first_products(shelf, call, [groups[e] for e in here])] if here else []
            mx.async_eval(hidden)
            self._await(missing)
            hidden.append(self._first_products(shelf, call, [groups[e] for e in missing]))
            together = _in_order(hidden, [groups[e] for e in here + missing])
            y = shelf.last_products(together.reshape(*experts.shape, -1), experts, weights)
        self._running.add(y, self._cache, list(groups))
        return y

    def _divide(self, experts: Iterable[int]) -> tuple[list[int], list[int]]:
        """Those that are in memory, and the others."""
        here = [e for e in experts if e in self._cache]
        return here, [e for e in experts if e not in self._cache]

    def absent(self, expert: int) -> bool:
        return expert not in self._cache and expert not in self._tickets

    def fetch_ahead(self, expert: int) -> None:
        """Has an absent expert read after everything that is waited for; not at all where there is no room."""
        self._submit(expert, urgent=False)

    def give_up(self, expert: int) -> None:
        """Drops an expert that is not there yet, unless it is being read already: then it may as well come."""
        ticket = self._tickets.get(expert)
        if ticket is not None and ticket.drop():
            self._forget(expert)

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of memory that each expert takes."""
        return self._shelf.sizes

    def resize(self, capacity: int) -> None:
        """Another ceiling for the layer. Nothing may be being computed; what is being read is given up."""
        for expert in list(self._tickets):
            self._abandon(expert)
        for expert in self._cache.resize(capacity):
            self._shelf.drop(expert)
        self._shelf.resize(capacity)

    def check(self) -> None:
        """Asserts what must hold between two calls."""
        self._cache.check()
        assert self._cache.loading == self._tickets.keys()
        assert set(self._shelf.filled) == self._cache.present | self._cache.loading

    def _read_routing(self, indices: mx.array, scores: mx.array | None) -> np.ndarray:
        """The chosen experts [T, A] on the host. Waits until they, the scores and everything before are computed."""
        started = time.perf_counter()
        mx.eval(indices, scores)
        self._running.settle()
        self._counts.compute_seconds += time.perf_counter() - started
        self._counts.host_reads += 1
        return np.array(indices).reshape(-1, indices.shape[-1])

    def _launch(self, call: _Call, groups: list[Group]) -> mx.array:
        output = self._shelf.outputs(call.rows, groups, call.chosen.size)
        self._running.add(output, self._cache, [group.expert for group in groups])
        return output

    def _first_products(self, shelf: ArenaShelf, call: _Call, groups: list[Group]) -> mx.array:
        hidden = shelf.first_products(call.rows, groups)
        self._running.add(hidden, self._cache, [group.expert for group in groups])
        return hidden

    def _fetch(self, experts: Sequence[int], keep: Collection[int] = ()) -> list[int]:
        """Has the first of these absent experts read, as many as there is room for, and no more than half of the room at
        a time where there are more: the other half is computed meanwhile. Returns them; those under way count as well."""
        batch: list[int] = []
        nbytes = 0
        for expert in experts:
            nbytes += self._shelf.sizes[expert]
            if batch and 2 * nbytes > self._cache.capacity:
                break
            if expert not in self._tickets and not self._submit(expert, keep):
                break
            batch.append(expert)
        return batch

    def _fetch_all(self, experts: Sequence[int], keep: Collection[int]) -> None:
        """Has all of these absent experts read, which fit beside those of `keep` that are there. May wait for room."""
        for expert in experts:
            if expert not in self._tickets and not self._submit(expert, keep):
                self._clear(keep)
                submitted = self._submit(expert, keep)
                assert submitted

    def _clear(self, wanted: Collection[int]) -> None:
        """Waits for all that may be in the way of an expert: what is being computed, and read. What was read ahead for
        nothing is given up; the others are still to be awaited."""
        self._running.settle()
        for expert, ticket in list(self._tickets.items()):
            if expert not in wanted:
                self._abandon(expert)
            else:
                with suppress(UserError):
                    ticket.wait()

    def _submit(self, expert: int, keep: Collection[int] = (), urgent: bool = True) -> bool:
        """Has an absent expert read; False where there is no room for it, or what lies in its way cannot be moved yet."""
        evicted = self._cache.admit(expert, keep)
        if evicted is None:
            return False
        for other in evicted:
            self._shelf.drop(other)
        try:
            reads = self._shelf.reads(expert, self._busy)
        except Busy:
            self._cache.abandon(expert)
            return False
        self._tickets[expert] = self._reader.submit(reads, urgent)
        return True

    @property
    def _busy(self) -> list[int]:
        """Experts that a graph reads, or a thread fills."""
        return [*self._cache.held, *(e for e, ticket in self._tickets.items() if not ticket.done())]

    def _await(self, experts: Sequence[int]) -> None:
        """Waits for experts under way. Raises UserError for one that could not be read."""
        started = time.perf_counter()
        try:
            for expert in experts:
                self._tickets[expert].wait()
                self._finish(expert)
        except UserError:
            self._collect()
            raise
        finally:
            self._counts.wait_seconds += time.perf_counter() - started

    def _collect(self) -> None:
        """Books what has arrived, or failed, without waiting. Whoever needs a failed one asks again and hears why."""
        for expert in [e for e, ticket in self._tickets.items() if ticket.done()]:
            try:
                self._tickets[expert].wait()
            except UserError:
                self._abandon(expert)
            else:
                self._finish(expert)

    def _abandon(self, expert: int) -> None:
        """Forgets an expert under way; waits for the reads that have been started."""
        ticket = self._tickets[expert]
        ticket.cancel()
        with suppress(UserError):
            ticket.wait()
        self._forget(expert)

    def _forget(self, expert: int) -> None:
        del self._tickets[expert]
        self._cache.abandon(expert)
        self._shelf.drop(expert)

    def _finish(self, expert: int) -> None:
        del self._tickets[expert]
        self._cache.arrived(expert)


def _in_order(parts: Sequence[mx.array], groups: Sequence[Group]) -> mx.array:
    """Rows of pairs, in the order of the groups over all parts -> all rows in the order of the pairs."""
    y = parts[0] if len(parts) == 1 else mx.concatenate(list(parts))
    return y[mx.array(np.argsort(np.concatenate([group.pairs for group in groups])))]


def group_pairs(chosen: np.ndarray) -> dict[int, Group]:
    """chosen [T, A] -> the pairs of each chosen expert, experts in ascending order (that of the file)."""
    flat = chosen.reshape(-1)
    order = np.argsort(flat, kind="stable")
    experts, starts = np.unique(flat[order], return_index=True)
    pairs = np.split(order, starts[1:])
    return {int(e): Group(int(e), p, p // chosen.shape[-1]) for e, p in zip(experts, pairs, strict=True)}
