"""Reading ahead changes when an expert is read and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from toy_checkpoints import convert, prepare, write_qwen3

from mlxmoe import expert_memory, loading
from mlxmoe.loading import Loaded, RuntimeConfig, open_model
from mlxmoe.lookahead import PREDICTORS, Lookahead, make_predictor
from mlxmoe.prefetch import Controller, Frequency, NextRouter, PreviousToken

pytestmark = pytest.mark.usefixtures("limits")

CONTEXT = 128
TOKENS = [5 + i * 7 % 250 for i in range(24)]


class Always(Controller):
    """Fetches the first four ranks for every layer, whatever is measured."""

    def wants(self, layer: int) -> int:
        return 4


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lookahead")
    dims = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 24, "num_hidden_layers": 3}
    assert convert(write_qwen3(root / "source", **dims), root / "out", "--bpw", "12.5") == 0
    return root / "out"


def stream(source: Path, prefetch: str, share: float = 0.3) -> Loaded:
    prepared = prepare(source, RuntimeConfig(context=CONTEXT))
    memory = prepared.streaming(0).least_memory + int(share * sum(s.total for s in prepared.streamed_shapes))
    config = RuntimeConfig(memory, CONTEXT, threads=2, direct=False, prefetch=prefetch)
    return loading._open_streamed(prepared, memory, config)


def decoded(loaded: Loaded) -> list[mx.array]:
    """Logits of single tokens, each with the ones before in its cache."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(loaded.model)
    outputs = []
    for token in TOKENS:
        outputs.append(loaded.model(mx.array([[token]]), cache=cache))
        mx.eval(outputs[-1])
        if loaded.experts is not None:
            loaded.experts.check()
    return outputs


@pytest.mark.parametrize("prefetch", PREDICTORS)
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_reading_ahead_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, converted: Path, prefetch: str, share: float
) -> None:
    monkeypatch.setattr(expert_memory, "Controller", Always)
    loaded = stream(converted, prefetch, share)
    wanted = decoded(open_model(converted, RuntimeConfig(1 << 30, CONTEXT)))
    assert all(bool(mx.array_equal(a, b).item()) for a, b in zip(decoded(loaded), wanted, strict=True))
    assert loaded.experts is not None
    report = loaded.experts.as_json()["prefetch"]
    if prefetch == "off":
        assert report is None
    else:
        assert report["steps"] == len(TOKENS)
        assert 0 <= report["precision"] <= 1
    loaded.experts.resize(loaded.experts.least)  # gives up what is under way
    loaded.experts.check()
    loaded.experts.close()


def test_prompts_are_not_predicted(monkeypatch: pytest.MonkeyPatch, converted: Path) -> None:
    monkeypatch.setattr(expert_memory, "Controller", Always)
    loaded = stream(converted, "router")
    mx.eval(loaded.model(mx.array([TOKENS])))
    assert loaded.experts is not None
    assert loaded.experts.as_json()["prefetch"]["steps"] == 0
    loaded.experts.close()


class Layer:
    """Notes what it is asked for."""

    def __init__(self, here: set[int] | None = None):
        self.sizes = [10] * 8
        self.here = here or set()
        self.asked: list[int] = []
        self.given_up: list[int] = []

    def absent(self, expert: int) -> bool:
        return expert not in self.here

    def fetch_ahead(self, expert: int) -> None:
        self.asked.append(expert)

    def give_up(self, expert: int) -> None:
        self.given_up.append(expert)


def scores_of(order: Sequence[int]) -> mx.array:
    values = np.zeros(8, np.float32)
    values[list(order)] = np.arange(len(order), 0, -1)
    return mx.array(values)


def test_one_token_worked_by_hand() -> None:
    """Layer 0 chooses 1 and 2. The next router likes 5, 3, 7 and 0 best; 3 is there already. It chooses 5 and 6."""
    layers = [Layer(), Layer(here={3})]
    controller = Always(2)
    ahead = Lookahead(layers, [None, lambda x: scores_of([5, 3, 7, 0])], NextRouter(), controller, limit_nbytes=20)
    x = mx.zeros((1, 4))
    first = ahead.routed(0, [1, 2])
    assert first.predicted == []
    ahead.fetch(0, ahead.scores(0, x))
    assert layers[1].asked == [5, 7]  # 0 would be more than may be on its way
    ahead.record(0, [1, 2], first, 0.0, 0.0)
    second = ahead.routed(1, [5, 6])
    assert second.predicted == [5, 3, 7, 0]
    assert second.wasted_nbytes == 10
    assert layers[1].given_up == [7]
    assert ahead.scores(1, x) is None  # no layer comes after the last
    ahead.fetch(1, None)
    ahead.record(1, [5, 6], second, 0.0, 0.0)
    assert ahead.as_json()["layers"][1]["precision"] == 0.25
    assert layers[0].asked == []


def test_another_prompt_gives_up_what_is_under_way() -> None:
    layers = [Layer(), Layer()]
    ahead = Lookahead(layers, [None, lambda x: scores_of([5, 3])], NextRouter(), Always(2), limit_nbytes=1000)
    ahead.routed(0, [1])
    ahead.fetch(0, ahead.scores(0, mx.zeros((1, 4))))
    ahead.stop()
    assert sorted(layers[1].given_up) == sorted(layers[1].asked) != []
    assert ahead.routed(1, [5]).predicted == []


def test_the_predictor_follows_from_its_name() -> None:
    gate = lambda x: x  # noqa: E731
    assert isinstance(make_predictor("auto", 2, 8, [gate, gate]), NextRouter)
    assert isinstance(make_predictor("auto", 2, 8, [gate, None]), PreviousToken)
    assert isinstance(make_predictor("router", 2, 8, [None, None]), NextRouter)
    assert isinstance(make_predictor("previous", 2, 8, [gate, gate]), PreviousToken)
    assert isinstance(make_predictor("frequency", 2, 8, [gate, gate]), Frequency)
    assert make_predictor("off", 2, 8, [gate, gate]) is None
