"""Prefetch: every predictor against a plain one, and the controller against simulated clocks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxmoe.prefetch import (
    CoActivation,
    Controller,
    ControllerConfig,
    Frequency,
    InFlight,
    NextRouter,
    Predictor,
    PreviousToken,
    Settled,
    Trial,
    _Half,
)

# T tokens, L layers, A active experts, E experts


@pytest.fixture(scope="module")
def trace() -> np.ndarray:
    """[T, L, A] with equal experts excluded within a choice."""
    rng = np.random.default_rng(3)
    return np.array([[rng.permutation(9)[:3] for _ in range(4)] for _ in range(50)])


# -- predictors --------------------------------------------------------------------------------------------------------


def test_previous_token_is_the_last_choice_of_the_layer(trace: np.ndarray) -> None:
    predictor = PreviousToken()
    assert predictor.predict(0) == []
    for step, token in enumerate(trace):
        for layer, experts in enumerate(token):
            assert predictor.predict(layer) == (trace[step - 1, layer].tolist() if step else [])
            predictor.observe(layer, experts)


def test_previous_token_ranks_by_score() -> None:
    predictor = PreviousToken()
    predictor.observe(0, [5, 1, 3], np.array([0.0, 0.2, 0.0, 0.5, 0.0, 0.2]))
    assert predictor.predict(0) == [3, 1, 5]


def test_next_router_ranks_the_scores_it_is_given() -> None:
    scores = np.random.default_rng(0).normal(size=40).astype(np.float32)
    scores[7] = scores[3]
    plain = sorted(range(40), key=lambda e: (-scores[e], e))
    predictor = NextRouter()
    predictor.observe(0, [1, 2])
    assert predictor.predict(1, scores) == plain
    assert predictor.predict(1) == []


def test_co_activation_against_counting(trace: np.ndarray) -> None:
    predictor = CoActivation.from_trace(trace[:30], 9)
    for token in trace[30:]:
        assert predictor.predict(0) == []
        for layer in range(3):
            predictor.observe(layer, token[layer])
            likely: Counter[int] = Counter()
            for s in token[layer]:
                having = [t for t in trace[:30] if s in t[layer]]
                for e in range(9):
                    likely[e] += sum(e in t[layer + 1] for t in having) / max(len(having), 1)  # type: ignore[assignment]
            ranked = predictor.predict(layer + 1)
            assert sorted(ranked) == sorted(e for e in likely if likely[e])
            values = [likely[e] for e in ranked]
            assert values == pytest.approx(sorted(values, reverse=True), abs=1e-5)


def test_co_activation_of_unseen_experts_says_nothing() -> None:
    predictor = CoActivation.from_trace(np.array([[[0, 1], [2, 3]]]), 9)
    predictor.observe(0, [7, 8])
    assert predictor.predict(1) == []
    predictor.observe(0, [0, 8])
    assert predictor.predict(1) == [2, 3]


def test_frequency_against_a_sum_of_powers(trace: np.ndarray) -> None:
    predictor = Frequency(np.zeros((4, 9)), decay=0.9)
    assert predictor.predict(2) == []
    for token in trace:
        for layer, experts in enumerate(token):
            predictor.observe(layer, experts)
    worth = [sum(0.9 ** (len(trace) - 1 - t) for t in range(len(trace)) if e in trace[t, 2]) for e in range(9)]
    assert predictor.predict(2) == sorted(range(9), key=lambda e: -worth[e])


def test_frequency_begins_where_it_is_told() -> None:
    assert Frequency(np.array([[0, 3, 0, 5]])).predict(0) == [3, 1]


@pytest.mark.parametrize(
    "make",
    [PreviousToken, NextRouter, lambda: Frequency(np.ones((4, 9))), lambda: CoActivation(np.ones((3, 9, 9)))],
)
def test_every_predictor_ranks_each_expert_once_and_changes_nothing(
    make: Callable[[], Predictor], trace: np.ndarray
) -> None:
    predictor = make()
    scores = np.linspace(0, 1, 9)
    for token in trace[:5]:
        for layer, experts in enumerate(token):
            ranked = predictor.predict(layer, scores)
            assert len(set(ranked)) == len(ranked)
            assert predictor.predict(layer, scores) == ranked
            predictor.observe(layer, experts, scores)


# -- in flight ---------------------------------------------------------------------------------------------------------


def test_only_the_leading_ranks_that_are_missing() -> None:
    flight = InFlight(100)
    assert flight.start(1, [4, 2, 7, 1], ranks=3, resident={2}, nbytes=lambda e: 10) == [4, 7]
    assert flight.start(1, [7, 5], ranks=2, resident={2}, nbytes=lambda e: 10) == [5]
    assert flight.nbytes == 30
    assert flight.settle(1, used={4, 2}) == Settled([4], [7, 5], 20)
    assert flight.nbytes == 0
    assert flight.settle(1, used={4}) == Settled([], [], 0)


def test_a_worse_rank_does_not_take_the_place_of_a_better_one() -> None:
    flight = InFlight(25)
    assert flight.start(0, [0, 1, 2], ranks=3, resident=(), nbytes=lambda e: 20 if e < 2 else 5) == [0]


def test_clear_says_what_to_cancel() -> None:
    flight = InFlight(100)
    flight.start(0, [3], 1, (), lambda e: 10)
    flight.start(2, [3, 5], 2, (), lambda e: 10)
    assert sorted(flight.clear()) == [(0, 3), (2, 3), (2, 5)]
    assert (flight.nbytes, flight.clear()) == (0, [])


@given(
    limit=st.integers(0, 60),
    calls=st.lists(
        st.tuples(st.booleans(), st.integers(0, 2), st.lists(st.integers(0, 5), unique=True), st.integers(0, 4))
    ),
)
def test_the_bytes_under_way_stay_below_the_limit(limit: int, calls: list[tuple[bool, int, list[int], int]]) -> None:
    flight = InFlight(limit)
    model: dict[tuple[int, int], int] = {}
    for starts, layer, experts, ranks in calls:
        if starts:
            for e in flight.start(layer, experts, ranks, {5}, lambda e: 7 + e):
                assert e in experts[:ranks]
                assert e != 5
                assert (layer, e) not in model
                model[layer, e] = 7 + e
        else:
            settled = flight.settle(layer, set(experts))
            asked = {e: n for (at, e), n in model.items() if at == layer}
            assert (set(settled.useful), set(settled.wasted)) == (asked.keys() & experts, asked.keys() - experts)
            assert settled.wasted_nbytes == sum(asked[e] for e in settled.wasted)
            model = {key: n for key, n in model.items() if key[0] != layer}
        assert flight.nbytes == sum(model.values()) <= limit


# -- controller --------------------------------------------------------------------------------------------------------

SHORT = ControllerConfig(watch=8, watch_longest=64, epoch=4, pairs=2, hold=40)
Clock = Callable[[int, int, bool], tuple[float, float]]  # step, layer, prefetch on -> miss and compute seconds


def drive(controller: Controller, steps: int, clock: Clock, start: int = 0, precise: bool = True) -> list[list[int]]:
    """Steps with the seconds of `clock`; the ranks wanted per step and layer."""
    wanted = []
    for step in range(start, start + steps):
        row = []
        for layer in range(controller.num_layers):
            ranks = controller.wants(layer)
            miss, compute = clock(step, layer, ranks > 0)
            predicted = [0, 1, 2, 3] if precise else [9, 8, 7, 6]
            controller.record(layer, miss, compute, predicted, [0, 1, 2, 3], 100 if ranks and not precise else 0)
            row.append(ranks)
        wanted.append(row)
    return wanted


def steady(miss: float, compute: float, with_prefetch: float) -> Clock:
    """Misses that take `miss` seconds, or with prefetch `with_prefetch`."""
    return lambda step, layer, on: (with_prefetch if on else miss, compute)


def test_where_computing_takes_longer_nothing_is_tried() -> None:
    controller = Controller(3, SHORT)
    wanted = drive(controller, 500, steady(miss=0.9, compute=1.0, with_prefetch=0.0))
    assert not np.any(wanted)
    report = controller.report()
    assert (report.trials, report.steps, report.steps_on, report.seconds_saved) == (0, 500, 0, None)


def test_a_gain_turns_it_on_and_it_stays() -> None:
    controller = Controller(3, SHORT)
    wanted = np.array(drive(controller, 300, steady(miss=3.0, compute=1.0, with_prefetch=1.0)))
    first = SHORT.watch + 2 * SHORT.pairs * SHORT.epoch
    assert not wanted[: SHORT.watch].any()
    assert wanted[first : first + SHORT.hold].all()
    report = controller.report()
    assert [layer.on for layer in report.layers] == [True] * 3
    assert report.seconds_saved == pytest.approx(3 * 2.0)
    assert report.layers[0].gain == pytest.approx(0.5)
    assert (report.layers[0].seconds_off, report.layers[0].seconds_on) == (4.0, 2.0)
    assert report.steps_on == np.any(wanted, axis=1).sum()


def test_a_loss_keeps_it_off_and_is_tried_ever_more_rarely() -> None:
    controller = Controller(2, SHORT)
    wanted = np.array(drive(controller, 2000, steady(miss=3.0, compute=1.0, with_prefetch=3.3))).any(axis=1)
    assert not any(layer.on for layer in controller.report().layers)
    assert controller.report().seconds_saved == pytest.approx(-0.6)
    starts = np.flatnonzero(np.diff(wanted.astype(int)) == 1)
    assert wanted[:100].sum() > wanted[-100:].sum()
    assert wanted.mean() < 0.12
    assert len(starts) >= 20  # it does not give up either


def test_layers_are_judged_one_by_one() -> None:
    """Layer 0 gains, layer 1 loses, layer 2 computes longer than it waits."""
    table = {0: (3.0, 1.0, 1.0), 1: (3.0, 1.0, 3.5), 2: (0.5, 1.0, 0.0)}

    def clock(step: int, layer: int, on: bool) -> tuple[float, float]:
        miss, compute, with_prefetch = table[layer]
        return with_prefetch if on else miss, compute

    controller = Controller(3, SHORT)
    wanted = np.array(drive(controller, 60, clock))
    assert [layer.on for layer in controller.report().layers] == [True, False, False]
    assert wanted[-1].astype(bool).tolist() == [True, False, False]
    assert not wanted[:, 2].any()


def test_a_gain_that_delays_the_other_layers_more_is_none() -> None:
    running = {}

    def clock(step: int, layer: int, on: bool) -> tuple[float, float]:
        running[layer] = on
        if layer == 0:
            return (1.5 if on else 2.0), 1.0
        return (2.0 if running[0] else 1.0), 2.0

    controller = Controller(2, SHORT)
    drive(controller, SHORT.watch + 2 * SHORT.pairs * SHORT.epoch, clock)
    report = controller.report()
    assert report.trials == 1
    assert report.layers[0].gain == pytest.approx(1 / 6)
    assert report.seconds_saved == pytest.approx(-0.5)
    assert not report.layers[0].on


@pytest.mark.parametrize(
    ("gain", "from_off", "from_on"), [(0.01, False, False), (0.035, False, True), (0.2, True, True)]
)
def test_between_the_thresholds_it_stays_as_it_was(gain: float, from_off: bool, from_on: bool) -> None:
    small = steady(miss=3.0, compute=1.0, with_prefetch=3.0 - 4.0 * gain)
    controller = Controller(1, SHORT)
    drive(controller, 200, small)
    assert controller.report().layers[0].on == from_off
    controller = Controller(1, SHORT)
    drive(controller, 30, steady(miss=3.0, compute=1.0, with_prefetch=0.0))
    assert controller.report().layers[0].on
    drive(controller, 200, small)
    assert controller.report().layers[0].on == from_on


def test_it_goes_off_when_it_no_longer_pays_and_on_again_when_it_does() -> None:
    controller = Controller(2, SHORT)
    good, bad = steady(3.0, 1.0, 1.0), steady(3.0, 1.0, 4.0)
    drive(controller, 60, good)
    assert controller.report().layers[0].on
    drive(controller, SHORT.hold + 2 * SHORT.pairs * SHORT.epoch, bad)
    assert not controller.report().layers[0].on
    drive(controller, SHORT.watch_longest + 2 * SHORT.pairs * SHORT.epoch, good)
    assert controller.report().layers[0].on


def test_what_is_on_goes_off_when_records_become_quick() -> None:
    """With the misses gone there is nothing to hide, even where the trial still shows a gain."""
    controller = Controller(1, SHORT)
    drive(controller, 60, steady(3.0, 1.0, 1.0))
    drive(controller, SHORT.hold + 2 * SHORT.pairs * SHORT.epoch, steady(0.5, 1.0, 0.0))
    assert not controller.report().layers[0].on


def test_one_slow_moment_does_not_decide() -> None:
    def clock(step: int, layer: int, on: bool) -> tuple[float, float]:
        slow = 100.0 if SHORT.watch + 2 <= step < SHORT.watch + SHORT.epoch else 0.0  # in the first off half
        return (3.2 if on else 3.0) + slow, 1.0

    controller = Controller(1, ControllerConfig(watch=8, epoch=4, pairs=3))
    drive(controller, 8 + 24, clock)
    assert controller.report().trials == 1
    assert not controller.report().layers[0].on


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_a_real_machine(seed: int) -> None:
    """Seconds that scatter by a third: a gain of 30 % is found, a loss of 30 % is not taken for one."""
    for factor, found in ((0.7, True), (1.3, False)):
        rng = np.random.default_rng(seed)

        def clock(
            step: int, layer: int, on: bool, rng: np.random.Generator = rng, factor: float = factor
        ) -> tuple[float, float]:
            scale = math.exp(rng.normal(0, 0.33)) * (factor if on else 1.0)
            return 3.0 * scale, 1.0 * scale

        controller = Controller(4, ControllerConfig(hold=64))
        drive(controller, 1000, clock)
        assert all(layer.on == found for layer in controller.report().layers)


def test_the_same_seconds_give_the_same_decisions() -> None:
    def clock(step: int, layer: int, on: bool) -> tuple[float, float]:
        return 1.0 + (step * 7919 + layer * 31) % 5 - (1.2 if on else 0.0), 2.0

    first, second = Controller(3, SHORT), Controller(3, SHORT)
    assert drive(first, 700, clock) == drive(second, 700, clock)
    assert first.report() == second.report()


def test_ranks_that_are_mostly_wrong_are_not_fetched() -> None:
    controller = Controller(1, SHORT)
    wanted = []
    for step in range(200):
        wanted.append(controller.wants(0))
        miss = 1.0 if wanted[-1] else 3.0
        used = [0, 1, 9] if step % 3 else [0, 8, 9]  # rank 0 is always right, rank 1 in two of three, rank 2 never
        controller.record(0, miss, 1.0, [0, 1, 2, 3], used)
    assert set(wanted) == {0, 2}
    report = controller.report()
    assert report.precision == pytest.approx((1 + 2 / 3) / 4, abs=0.01)
    assert report.recall == pytest.approx((1 + 2 / 3) / 3, abs=0.01)


def test_a_predictor_that_is_always_wrong_is_not_even_tried() -> None:
    controller = Controller(2, SHORT)
    assert not np.any(drive(controller, 300, steady(3.0, 1.0, 1.0), precise=False))
    report = controller.report()
    assert (report.trials, report.precision, report.recall, report.wasted_nbytes) == (0, 0.0, 0.0, 0)


def test_wasted_bytes_and_totals_add_up() -> None:
    controller = Controller(2, SHORT)
    controller.record(0, 0.0, 1.0, [1, 2], [1, 5, 6], wasted_nbytes=300)
    controller.record(1, 0.0, 1.0, [], [1, 2], wasted_nbytes=0)
    controller.record(0, 0.0, 1.0, [5, 1], [1, 5, 6], wasted_nbytes=50)
    report = controller.report()
    assert (report.steps, report.wasted_nbytes) == (2, 350)
    assert report.layers[0][2:4] == (3 / 4, 3 / 6)
    assert report.layers[1][2:4] == (None, None)
    assert (report.precision, report.recall) == (3 / 4, 3 / 8)
    assert report.as_json()["layers"][0]["wasted_nbytes"] == 350


def test_a_layer_that_is_left_out_does_not_join_two_steps() -> None:
    """A layer with everything resident may not be recorded at all."""
    controller = Controller(3, SHORT)
    for _ in range(10):
        controller.record(1, 1.0, 1.0, [], [0])
    assert controller.report().steps == 10


def test_trial_takes_medians_over_pairs() -> None:
    def half(*seconds: float) -> _Half:
        return _Half(np.array(seconds), np.zeros(len(seconds)), 1)

    off = [half(10.0, 1.0), half(12.0, 1.0), half(99.0, 1.0)]
    on = [half(5.0, 2.0), half(9.0, 2.0), half(100.0, 2.0)]
    trial = Trial.of(off, on)
    assert trial.gain.tolist() == [0.25, -1.0]
    assert trial.saved == 2.0
    assert trial.waits.all()
