"""A converted folder read layer by layer: the weights that the file holds, and the predictions that the runtime makes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from toy_checkpoints import (
    RuntimeConfig,
    convert,
    edit_config,
    open_model,
    stored_matrix,
    write_architecture,
    write_qwen3,
)

from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.convert.source import Source
from mlxmoe.convert.stream import LayerStream
from mlxmoe.convert.written import Written, open_weights
from mlxmoe.errors import UserError

TOKENS = mx.array(np.random.RandomState(0).randint(0, 256, (2, 32)))


def converted(folder: Path, case: str, *arguments: str) -> Path:
    if case == "qwen3_moe":
        source = write_qwen3(folder / "source", num_hidden_layers=2)
    else:
        source = write_architecture(folder / "source", case)
    assert convert(source, folder / "out", *arguments) == 0
    return folder / "out"


def test_experts_are_what_the_records_hold(tmp_path: Path) -> None:
    folder = converted(tmp_path, "qwen3_moe", "--bpw", "4.5")
    written = Written(open_checkpoint(folder))
    tensors = written.tensors()
    levels = set()
    for layer in written.plan.layers:
        for p, shape in enumerate(layer.projections):
            stack = np.array(tensors[f"{layer.path}.{shape.name}.weight"])
            for e, entry in enumerate(layer.experts):
                levels.add(entry.levels[p])
                wanted = stored_matrix(folder, layer, e, p, entry.levels[p])
                np.testing.assert_allclose(stack[e], wanted, rtol=1e-6, atol=1e-8)
    assert len(levels) > 1, "the test is to see several levels"


def test_all_tensors_of_the_model_and_no_others(tmp_path: Path) -> None:
    written = Written(open_checkpoint(converted(tmp_path, "deepseek_v3", "--bpw", "5")))
    wanted = Source(open_checkpoint(tmp_path / "source"), 32).tensors()
    found = written.tensors()
    assert found.keys() == wanted.keys()
    assert all(found[name].shape == wanted[name].shape for name in found)


@pytest.mark.parametrize(
    ("case", "rotation"),
    [
        ("qwen3_moe", "none"),
        ("qwen3_moe", "randomised-hadamard"),
        ("qwen3_moe", "random"),
        ("deepseek_v3", "none"),
        ("gpt_oss", "none"),
        ("nemotron_h", "none"),
    ],
)
def test_predictions_are_those_of_the_runtime(case: str, rotation: str, tmp_path: Path) -> None:
    """The runtime multiplies with packed codes and rotates activations, this multiplies with what both mean: equal up to
    rounding."""
    folder = converted(tmp_path, case, "--bpw", "6", "--rotation", rotation)
    stream = LayerStream(Written(open_checkpoint(folder)))
    hidden = stream.embed(TOKENS)
    for i in range(len(stream.layers)):
        with stream.loaded(i):
            hidden = stream.run(i, TOKENS, hidden)
            mx.eval(hidden)
    got = np.array(stream.logits(TOKENS, hidden))
    wanted = np.array(open_model(folder, RuntimeConfig(kernels=None)).model(TOKENS))
    np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())


def test_any_checkpoint_can_be_opened(tmp_path: Path) -> None:
    folder = converted(tmp_path, "qwen3_moe", "--bpw", "4")
    assert isinstance(open_weights(open_checkpoint(folder)), Written)
    assert isinstance(open_weights(open_checkpoint(tmp_path / "source")), Source)
    with pytest.raises(UserError, match="is repacked"):
        open_weights(open_checkpoint(folder)._replace(kind="repacked"))


def test_config_and_plan_of_different_models(tmp_path: Path) -> None:
    folder = converted(tmp_path, "qwen3_moe", "--bpw", "4")
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(UserError, match="do not belong together"):
        Written(open_checkpoint(folder))
