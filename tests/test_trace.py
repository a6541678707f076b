"""Recording what a model's routers choose: against the gates themselves, and the file against every kind of damage."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_unflatten
from toy_checkpoints import write_architecture, write_qwen3

from mlxmoe.cli import main
from mlxmoe.errors import UserError
from mlxmoe.evaluate import Text
from mlxmoe.kernels import ReferenceKernels
from mlxmoe.loading import Loaded, open_model
from mlxmoe.prepared import prepare, smallest_streaming
from mlxmoe.runtime import RuntimeConfig
from mlxmoe.trace import PROMPTS, Trace, TraceConfig, load_trace, observed, record, record_texts, save_trace

TOKENS = [(7 * i * i + 3 * i) % 300 for i in range(50)]
ONE_EXPERT_A_TOKEN = 0.02  # share of tokens whose choice may differ where two computations round differently


class Listener(nn.Module):
    """A linear gate that keeps its logits."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self._gate, self.heard = gate, []

    def __call__(self, x: mx.array) -> mx.array:
        self.heard.append(self._gate(x))
        return self.heard[-1]


@contextmanager
def gates_heard(model: nn.Module) -> Iterator[list[Listener]]:
    gates = [(path, m) for path, m in model.named_modules() if path.endswith(".mlp.gate")]
    listeners = [(path, Listener(gate)) for path, gate in sorted(gates)]
    model.update_modules(tree_unflatten(listeners))
    yield [listener for _, listener in listeners]
    model.update_modules(tree_unflatten(gates))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace") / "qwen3"
    write_qwen3(folder)
    return folder


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return open_model(None)


# -- observing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_records_what_the_gates_choose(qwen3: Path, chunk: int) -> None:
    """The A largest logits of every gate, which transformers' softmax and top-k come to, per layer and token."""
    model = open_model(qwen3).model
    with gates_heard(model) as listeners:
        trace = record(model, [TOKENS], chunk)
    assert trace.layers == tuple(range(len(listeners)))
    assert trace.experts.dtype == np.uint8
    active = trace.experts.shape[-1]
    for layer, listener in enumerate(listeners):
        logits = np.concatenate([np.array(heard)[0] for heard in listener.heard])
        expected = np.sort(np.argsort(-logits, axis=-1)[:, :active], axis=-1)
        assert trace.experts[:, layer].tolist() == expected.tolist()


def test_scores_rank_the_chosen_first(qwen3: Path) -> None:
    trace = record(open_model(qwen3).model, [TOKENS], 16, scores=True)
    assert trace.scores is not None
    assert trace.scores.dtype == np.float16
    assert np.allclose(trace.scores.astype(np.float32).sum(axis=-1), 1, atol=2e-3)  # softmax, in 11 bits
    best = np.sort(np.argsort(-trace.scores, axis=-1)[..., : trace.experts.shape[-1]], axis=-1)
    assert (best == trace.experts).all(axis=-1).mean() >= 1 - ONE_EXPERT_A_TOKEN


def test_documents_do_not_see_each_other(demo: Loaded) -> None:
    together = record(demo.model, [TOKENS, TOKENS[:20]], 16)
    assert together.starts.tolist() == [0, len(TOKENS)]
    assert together.experts[len(TOKENS) :].tolist() == record(demo.model, [TOKENS[:20]], 16).experts.tolist()


def test_a_model_is_left_as_it_was(demo: Loaded) -> None:
    """Also after an error, and it computes the same while it is watched."""
    tokens = mx.array([TOKENS])
    before = [(path, id(module)) for path, module in demo.model.named_modules()]
    plain = demo.model(tokens)
    with observed(demo.model, scores=True):
        assert mx.array_equal(demo.model(tokens), plain)
    assert [(path, id(module)) for path, module in demo.model.named_modules()] == before
    with pytest.raises(ZeroDivisionError), observed(demo.model):
        raise ZeroDivisionError
    assert [(path, id(module)) for path, module in demo.model.named_modules()] == before


def test_fused_blocks_are_seen(demo: Loaded) -> None:
    fused = open_model(None, RuntimeConfig(kernels=ReferenceKernels()))
    trace, expected = (record(loaded.model, [TOKENS], 32, scores=True) for loaded in (fused, demo))
    assert trace.layers == expected.layers
    assert (trace.experts != expected.experts).any(axis=-1).mean() <= ONE_EXPERT_A_TOKEN
    assert trace.scores is not None


def test_streamed_experts_are_seen(demo: Loaded) -> None:
    """Streaming is exact, so that the trace is that of the same weights all resident."""
    config = RuntimeConfig(exact=True, context=256, threads=2, direct=False)
    memory = smallest_streaming(prepare(None, config)) + 1_000_000
    streamed = open_model(None, replace(config, memory=memory))
    assert streamed.report.mode == "streaming"
    assert streamed.experts is not None
    trace = record(streamed.model, [TOKENS], 16)
    streamed.experts.close()
    assert trace.experts.shape == (len(TOKENS), 5, 4)
    assert (trace.experts != record(demo.model, [TOKENS], 16).experts).any(axis=-1).mean() <= ONE_EXPERT_A_TOKEN


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v2", "glm4_moe", "gemma4_text"])
def test_architectures(name: str, tmp_path: Path) -> None:
    """Blocks, gates and paths of several kinds. gemma4's router is a module of its own: no scores."""
    write_architecture(tmp_path / name, name)
    trace = record(open_model(tmp_path / name).model, [TOKENS[:12]], 8, scores=True)
    assert trace.experts.shape[:2] == (12, len(trace.layers))
    assert (np.diff(trace.experts.astype(int), axis=-1) > 0).all()
    assert (trace.scores is None) == (name == "gemma4_text")


def test_a_dense_model_has_nothing_to_record() -> None:
    with pytest.raises(UserError, match="has no routed experts"):
        record(nn.Sequential(nn.Linear(2, 2)), [[1, 2]], 8)


def test_texts_share_the_tokens(demo: Loaded) -> None:
    texts = [Text("a/one.txt", ["once upon a time " * 40]), Text("two.txt", ["def f(x): return x\n" * 40])]
    trace = record_texts(demo, texts, TraceConfig(max_tokens=60, window=32))
    assert trace.texts == ("one.txt", "two.txt")
    assert trace.model == "demo"
    assert len(trace.model_sha256) == 64
    assert 60 <= trace.num_tokens <= 60 + len(trace.starts)  # a window's first token is predicted by none


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TraceConfig(window=1), "a window of 1 tokens"),
        (TraceConfig(window=4096), "a window of 4096 tokens"),
        (TraceConfig(max_tokens=-1), "-1 tokens are too few"),
        (TraceConfig(max_tokens=1), "1 tokens are too few"),
    ],
)
def test_bad_settings(demo: Loaded, config: TraceConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        record_texts(demo, [Text("t", ["once upon a time"])], config)


def test_text_that_is_too_short(demo: Loaded) -> None:
    with pytest.raises(UserError, match="too short"):
        record_texts(demo, [Text("t", ["a"])], TraceConfig())


# -- parts and the file ------------------------------------------------------------------------------------------------


def toy_trace(tokens: int = 20, starts: tuple[int, ...] = (0, 6, 13), scores: bool = True) -> Trace:
    rng = np.random.default_rng(0)
    experts = np.sort(np.stack([[rng.permutation(16)[:3] for _ in range(2)] for _ in range(tokens)])).astype(np.uint8)
    values = rng.random((tokens, 2, 16)).astype(np.float16) if scores else None
    return Trace(experts, np.array(starts), (1, 3), 16, values, "a model", "cd" * 32, ("t.jsonl",))


def same(a: Trace, b: Trace) -> bool:
    arrays = [(a.experts, b.experts), (a.starts, b.starts), (a.scores, b.scores)]
    rest = [replace(t, experts=a.experts, starts=a.starts, scores=None) for t in (a, b)]
    return all(np.array_equal(x, y) for x, y in arrays) and vars(rest[0]) == vars(rest[1])  # type: ignore[arg-type]


def test_part_keeps_the_documents() -> None:
    trace = toy_trace()
    part = trace.part(4, 15)
    assert part.starts.tolist() == [0, 2, 9]
    assert part.experts.tolist() == trace.experts[4:15].tolist()
    assert part.scores is not None
    assert part.scores.tolist() == trace.scores[4:15].tolist()  # type: ignore[index]
    assert part.layers == trace.layers


@pytest.mark.parametrize(
    ("starts", "lengths"), [((0, 6, 13), (13, 7)), ((0,), (10, 10)), ((0, 18), (10, 10)), ((0, 15), (15, 5))]
)
def test_halves_are_cut_between_documents(starts: tuple[int, ...], lengths: tuple[int, int]) -> None:
    first, second = toy_trace(starts=starts).halves()
    assert (first.num_tokens, second.num_tokens) == lengths
    assert second.starts[0] == 0


@pytest.mark.parametrize("scores", [True, False])
def test_trace_comes_back(scores: bool, tmp_path: Path) -> None:
    trace = toy_trace(scores=scores)
    save_trace(trace, tmp_path / "a.npz")
    save_trace(trace, tmp_path / "b.npz")
    assert same(load_trace(tmp_path / "a.npz"), trace)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        save_trace(toy_trace(), tmp_path / "absent" / "t.npz")


def loaded_or_refused(path: Path) -> Trace | UserError:
    try:
        return load_trace(path)
    except UserError as error:
        return error


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damage_is_one_sentence(tmp_path: Path, data: st.DataObject) -> None:
    """Any byte changed, or the end cut off: an error for people, or the very same trace."""
    path = tmp_path / "t.npz"
    save_trace(toy_trace(), path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    found = loaded_or_refused(path)
    if isinstance(found, UserError):
        assert str(path) in found.message
        assert "\n" not in found.message
    else:
        assert same(found, toy_trace())


def rewritten(path: Path, header: dict[str, Any], **arrays: np.ndarray) -> None:
    """The toy trace with a changed header and other arrays, correctly packed."""
    save_trace(toy_trace(), path)
    with np.load(path) as archive:
        content = {name: archive[name] for name in archive.files}
    text = json.dumps(json.loads(content["header"].tobytes()) | header)
    np.savez(path, **(content | {"header": np.frombuffer(text.encode(), np.uint8)} | arrays))


@pytest.mark.parametrize(
    ("header", "arrays", "words"),
    [
        ({"format": "other"}, {}, "not a trace"),
        ({"version": 2}, {}, "has version 2, this mlxmoe reads 1"),
        ({"layers": [1]}, {}, "do not belong to 1 layers"),
        ({"num_experts": 9}, {}, "names expert 15 of 9"),
        ({}, {"experts": np.zeros((20, 2, 3), np.uint8)}, "the same expert twice"),
        ({}, {"experts": np.zeros((20, 2), np.uint8)}, "do not belong"),
        ({}, {"experts": np.zeros((20, 2, 3), np.float32)}, "do not belong"),
        ({}, {"starts": np.array([0, 20])}, "do not start one after the other"),
        ({}, {"starts": np.array([1, 5])}, "do not start one after the other"),
        ({}, {"starts": np.array([0, 5, 5])}, "do not start one after the other"),
        ({}, {"starts": np.array([], np.int64)}, "do not start one after the other"),
        ({}, {"scores": np.zeros((20, 2, 4), np.float16)}, "scores of shape"),
    ],
)
def test_foreign_and_newer(header: dict[str, Any], arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
    rewritten(tmp_path / "t.npz", header, **arrays)
    with pytest.raises(UserError, match=words):
        load_trace(tmp_path / "t.npz")


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read: No such file"):
        load_trace(tmp_path / "absent.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "hello")
    np.savez(tmp_path / "pickle.npz", header=np.array([{"a": 1}], object), allow_pickle=True)
    (tmp_path / "text").write_text("hello")
    for name in ("other.npz", "other.zip", "pickle.npz", "text"):
        with pytest.raises(UserError, match="not a trace"):
            load_trace(tmp_path / name)


# -- the command -------------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "t.npz"
    command = ["trace", "--output", str(output), "--max-tokens", "40", "--window", "16", "--scores", "--json"]
    assert main(command) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    trace = load_trace(output)
    assert result["tokens"] == trace.num_tokens
    assert result["bytes"] == output.stat().st_size
    assert (result["layers"], result["experts"], result["experts_per_token"]) == (5, 32, 4)
    assert trace.texts == (PROMPTS.name,)
    assert "demo: deepseek_v3" in captured.err


def test_command_reads_texts_before_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(tmp_path / "no-model"), "--prompts", str(tmp_path / "no-text")]) == 2
    assert "there is no text file" in capsys.readouterr().err
