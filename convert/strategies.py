"""Three ways to share out bytes among experts: by measured losses, by the chapter's benefit, evenly.

`measured` is mlxmoe/budget.py's solver over single matrices. The other two are what it has to beat: `uniform` gives all
experts of a layer and projection the same level; `benefit` serves experts in the order of sensitivity * frequency *
(1 + massive-activation ratio), as the project's chapter does (7.2.4).

Pure functions on options (budget.py): an item is an expert's matrix, its options have the levels as labels.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from mlxmoe.budget import Option, allocate

Items = Sequence[Sequence[Option]]


class Tied(NamedTuple):
    """Items that take the same label: one item for each group, and the positions of its members."""

    items: list[list[Option]]
    members: list[list[int]]


def tie(items: Items, groups: Sequence[Hashable]) -> Tied:
    """Items of equal labels that share a group -> one item each, with their bytes and losses added up."""
    members: dict[Hashable, list[int]] = {}
    for k, group in enumerate(groups):
        members.setdefault(group, []).append(k)
    tied = []
    for positions in members.values():
        columns = zip(*(items[k] for k in positions), strict=True)
        tied.append([Option(c[0].label, sum(o.nbytes for o in c), sum(o.loss for o in c)) for c in columns])
    return Tied(tied, list(members.values()))


def untie(chosen: Sequence[Option], tied: Tied, items: Items) -> list[Option]:
    """The options of the single items that options of the groups stand for."""
    result: dict[int, Option] = {}
    for option, positions in zip(chosen, tied.members, strict=True):
        result |= {k: with_label(items[k], option.label) for k in positions}
    return [result[k] for k in range(len(items))]


def with_label(options: Sequence[Option], label: int) -> Option:
    return next(option for option in options if option.label == label)


def by_score(items: Items, scores: Items, budget: int) -> list[Option]:
    """Chosen by other losses, `scores`, for the same labels and bytes."""
    chosen = allocate(scores, budget)
    return [with_label(options, option.label) for options, option in zip(items, chosen, strict=True)]


def by_benefit(items: Items, experts: Sequence[int], benefits: Sequence[float], budget: int) -> list[Option]:
    """From the smallest options, rounds over the experts from the greatest benefit to the least: each takes one step up with
    all its matrices, while the bytes last. experts: of each item, its place among the benefits.

    Raises ValueError when even the smallest options exceed the budget.
    """
    steps = [sorted(options, key=lambda o: o.nbytes) for options in items]
    chosen = [0] * len(steps)
    left = budget - sum(options[0].nbytes for options in steps)
    if left < 0:
        raise ValueError(f"the smallest options exceed the budget by {-left} bytes")
    own: dict[int, list[int]] = {}
    for k, expert in enumerate(experts):
        own.setdefault(expert, []).append(k)
    order = sorted(own, key=lambda expert: (-benefits[expert], expert))
    for _ in range(max(len(options) for options in steps) - 1):
        for expert in order:
            rising = [k for k in own[expert] if chosen[k] + 1 < len(steps[k])]
            cost = sum(steps[k][chosen[k] + 1].nbytes - steps[k][chosen[k]].nbytes for k in rising)
            if rising and cost <= left:
                for k in rising:
                    chosen[k] += 1
                left -= cost
    return [options[step] for options, step in zip(steps, chosen, strict=True)]
