"""--memory is a hard ceiling: measured peaks, the least that works, and what a budget decides."""

from __future__ import annotations

import gc
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from toy_checkpoints import (
    RuntimeConfig,
    choose_residency,
    convert,
    load,
    open_model,
    prepare,
    run_child,
    write_architecture,
    write_qwen3,
)

from mlxmoe.errors import UserError
from mlxmoe.prepared import full_memory, smallest_memory

pytestmark = pytest.mark.usefixtures("limits")

CONTEXT = 384

# Loads, prefills a long prompt, decodes, and answers a second prompt; a fresh process, so that the peak is its own.
_RUN = """
import json, sys
import mlx.core as mx
from mlxmoe.loading import (RuntimeConfig, open_model)
from mlx_lm import stream_generate
from mlx_lm.models.cache import make_prompt_cache
source, memory, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
loaded = open_model(source, RuntimeConfig(memory, context))
peaks = {"load": mx.get_peak_memory()}
ids = [5 + i * 7 % 250 for i in range(context)]
cache = make_prompt_cache(loaded.model)
tokens = []
for name, prompt in (("first", ids[: context - 60]), ("second", ids[:20])):
    for part in stream_generate(
        loaded.model, loaded.tokenizer, prompt, max_tokens=20, prompt_cache=cache,
        prefill_step_size=loaded.report.prefill_step,
    ):
        tokens.append(part.token)
    peaks[name] = mx.get_peak_memory()
report = loaded.report
print(json.dumps({"peaks": peaks, "tokens": tokens, "mode": report.mode, "loss": report.expected_loss,
                  "levels": report.levels, "bytes": report.nbytes,
                  "held": mx.get_active_memory() + mx.get_cache_memory()}))
"""


def measure(source: Path, memory: int, context: int = CONTEXT) -> dict[str, Any]:
    """What one run of a fresh process measured: peak bytes after each stage, the tokens, what the report said."""
    done = subprocess.run(
        run_child(_RUN, str(source), str(memory), str(context)), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def elastic_memory(source: Path, context: int = CONTEXT) -> int:
    """Enough for some refinements, not for all."""
    return smallest_memory(prepare(source, RuntimeConfig(context=context))) * 11 // 10


def least_memory(source: Path, context: int = CONTEXT) -> int:
    """The minimum that the refusal of a hopeless budget names."""
    with pytest.raises(UserError, match="does not fit in 1 kB: it needs at least") as refused:
        open_model(source, RuntimeConfig(1000, context))
    assert "--memory" in refused.value.hint
    found = re.search(r"at least (\d+) bytes", refused.value.message)
    assert found is not None
    return int(found[1])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many small experts, so that the reserve for buffers is small beside them."""
    folder = tmp_path_factory.mktemp("memory") / "source"
    return write_qwen3(folder, hidden_size=64, moe_intermediate_size=64, num_experts=64, num_hidden_layers=2)


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    output = source.parent / "converted"
    assert convert(source, output, "--bpw", "12.5", "--expert-bits", "6,8") == 0
    return output


@pytest.mark.parametrize(
    ("mode", "share"), [("streaming", 0.0), ("streaming", 0.5), ("elastic", 0.0), ("elastic", 0.3), ("resident", 0.0)]
)
def test_peak_is_within_the_budget(converted: Path, mode: str, share: float) -> None:
    """From the least that works to enough for everything, `share` of the way to the next mode's least."""
    prepared = prepare(converted, RuntimeConfig(context=CONTEXT))
    bounds = [least_memory(converted), smallest_memory(prepared), full_memory(prepared), 1 << 30]
    place = ["streaming", "elastic", "resident"].index(mode)
    memory = int(bounds[place] + share * (bounds[place + 1] - bounds[place]))
    first = measure(converted, memory)
    assert max(first["peaks"].values()) <= memory
    assert first["held"] <= memory
    assert first["bytes"] <= memory
    assert first["mode"] == mode
    assert len(first["tokens"]) > 20


def test_streaming_gives_the_resident_models_tokens(converted: Path) -> None:
    memory = least_memory(converted)
    assert measure(converted, memory)["tokens"] == measure(converted, 1 << 30)["tokens"]


@pytest.mark.parametrize("mode", ["streaming", "resident"])
def test_unconverted_peak_is_within_the_budget(tmp_path: Path, mode: str) -> None:
    """Stacking and casting the experts of a layer takes more than the reserve for so short a context."""
    dims = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 128, "num_hidden_layers": 1}
    source = write_qwen3(tmp_path / "source", **dims)
    prepared = prepare(source, RuntimeConfig(context=100))
    memory = least_memory(source, 100) if mode == "streaming" else smallest_memory(prepared)
    found = measure(source, memory, 100)
    assert found["mode"] == mode
    assert max(found["peaks"].values()) <= memory


def test_architecture_with_latent_attention(tmp_path: Path) -> None:
    """Keys and values are unpacked for the whole context there, which the reserve must hold."""
    source = write_architecture(tmp_path / "source", "deepseek_v3")
    assert convert(source, tmp_path / "out", "--bpw", "6") == 0
    memory = least_memory(tmp_path / "out")
    assert max(measure(tmp_path / "out", memory)["peaks"].values()) <= memory


def test_same_file_and_budget_give_the_same_logits(converted: Path) -> None:
    """Bit for bit, where experts are reduced."""
    config = RuntimeConfig(elastic_memory(converted), CONTEXT)
    ids = mx.array([[5 + i * 7 % 250 for i in range(90)]])
    first, second = open_model(converted, config), open_model(converted, config)
    assert first.report == second.report
    assert first.report.mode == "elastic"
    assert mx.array_equal(first.model(ids), second.model(ids)).item()


@pytest.mark.parametrize("context", [16, CONTEXT])
def test_the_least_that_is_named_works(converted: Path, source: Path, context: int) -> None:
    """Also where an eighth of it would be more than the smallest prefill chunk needs (context 16)."""
    for folder in (source, converted):
        least = least_memory(folder, context)
        assert open_model(folder, RuntimeConfig(least, context)).report.nbytes <= least
        with pytest.raises(UserError, match=f"at least {least} bytes"):
            open_model(folder, RuntimeConfig(least - 1, context))


def test_more_memory_never_costs_fidelity(converted: Path) -> None:
    """At every size, those included at which the prefill chunk grows by a step (a large trunk brings them in reach)."""
    prepared = prepare(converted, RuntimeConfig(context=16))._replace(nbytes_trunk=12_000_000)
    least = prepared.nbytes_least + prepared.reserve(0).nbytes
    sizes = range(least, least + 3_200_000, 20_011)
    losses = [choose_residency(prepared, memory).expected_loss for memory in sizes]
    steps = [prepared.reserve(memory).prefill_step for memory in sizes]
    assert losses == sorted(losses, reverse=True)
    assert steps == sorted(steps)
    assert losses[0] > losses[-1]
    assert len(set(steps)) > 3


def test_a_shorter_context_leaves_more_for_the_experts(converted: Path) -> None:
    memory = elastic_memory(converted)
    long, short = (open_model(converted, RuntimeConfig(memory, context)).report for context in (CONTEXT, 64))
    assert short.nbytes_kv < long.nbytes_kv
    assert short.nbytes_experts > long.nbytes_experts
    assert (short.expected_loss or 0) < (long.expected_loss or 0)


def test_report_says_what_was_chosen(converted: Path) -> None:
    memory = elastic_memory(converted)
    report = open_model(converted, RuntimeConfig(memory, CONTEXT)).report
    first, second = report.lines()
    assert "elastic" in first
    assert all(word in first for word in ("experts", "other weights", f"{CONTEXT} tokens of context", "buffers"))
    assert re.fullmatch(
        r"expert matrices: (\d+ % at \d bit, )*\d+ % at \d bit; expected loss \S+ \(\S+ with .*\)", second
    )
    assert sum(report.levels.values()) == 2 * 64 * 3
    parts = report.nbytes_experts + report.nbytes_trunk + report.nbytes_kv + report.nbytes_buffers
    assert parts == report.nbytes == report.as_json()["bytes_resident"] <= memory
    assert report.expected_loss is not None
    assert report.written_loss is not None
    assert report.expected_loss > report.written_loss
    full = open_model(converted, RuntimeConfig(1 << 30, CONTEXT)).report
    assert full.mode == "resident"
    assert "resident" in full.lines()[0]
    assert full.expected_loss == pytest.approx(report.written_loss, rel=1e-3)


@pytest.mark.parametrize("memory", [1 << 30, None], ids=["all in one width", "tight"])
def test_counted_bytes_are_the_bytes_held(memory: int | None, converted: Path) -> None:
    """The report's weights against what MLX holds after loading."""
    memory = memory or elastic_memory(converted)
    gc.collect()
    mx.clear_cache()  # MLX counts a reused buffer whole, even where it is larger than the array in it
    before = mx.get_active_memory()
    loaded = open_model(converted, RuntimeConfig(memory, CONTEXT))
    held = mx.get_active_memory() - before
    counted = loaded.report.nbytes_experts + loaded.report.nbytes_trunk
    assert counted <= held <= 1.02 * counted + 32768
    assert loaded.report.nbytes_file == sum(path.stat().st_size for path in converted.iterdir())


@pytest.mark.parametrize("text", ["0", "-1", "9 elephants", ""])
def test_memory_that_is_no_size(converted: Path, text: str) -> None:
    with pytest.raises(UserError) as refused:
        load(converted, memory=text)
    assert "9GB" in refused.value.hint


@pytest.mark.parametrize("context", [0, -5, 513])
def test_context_that_the_model_does_not_have(converted: Path, context: int) -> None:
    with pytest.raises(UserError, match="not within 1 to 512"):
        load(converted, context=context)
