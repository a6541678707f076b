"""Stock mlx-lm's 4-bit version of a model, the baseline of `mlxmoe bench --compare mlx-lm`.

mlx-lm's own classes, loader and quantizer, nothing of ours: what `mlx_lm.convert -q --q-bits 4 --q-group-size 64`
writes, kept in memory.
"""

from __future__ import annotations

import contextlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.utils import _get_classes, load_model, quantize_model

from mlxmoe.bench.decode import arrays
from mlxmoe.checkpoint import Checkpoint
from mlxmoe.errors import UserError
from mlxmoe.models import normalise_config

BITS = 4
GROUP_SIZE = 64

# what load_model raises for weights or settings that its classes do not expect
_CANNOT_READ = (ValueError, KeyError, TypeError, AttributeError, IndexError)


class Baseline(NamedTuple):
    model: nn.Module
    notes: list[str]  # how it was made: part of every report


def stock_model(checkpoint: Checkpoint, given: bool = False) -> Baseline:
    """The stock baseline for a checkpoint, evaluated and in memory.

    An unconverted Hugging Face folder is quantized to 4 bits; a stock MLX checkpoint is taken as it stands. For a
    converted folder, whose source is not at hand, and for weights that mlx-lm cannot read, a model of the same shapes
    is made with random 4-bit weights: speed depends on the shapes. With `given`, `checkpoint` is the baseline that the
    user chose, and random weights would not be it. Raises UserError when mlx-lm cannot do it.
    """
    config = normalise_config(checkpoint.config)  # only the config: what transformers 5 writes, stock mlx-lm misreads
    if checkpoint.kind == "converted" and given:
        raise UserError(
            f"the baseline {checkpoint.name} is a converted folder, which stock mlx-lm cannot read",
            "give a stock MLX checkpoint or the unconverted folder with --baseline",
        )
    with contextlib.redirect_stdout(sys.stderr):  # mlx-lm prints progress to stdout, which is for results
        if checkpoint.kind == "converted":
            model, note = _synthetic(config, "the converted model's source is not at hand")
        else:
            try:
                model, note = _from_folder(checkpoint.folder, config)
            except _CANNOT_READ as error:
                if given:
                    reason = next(iter(str(error).splitlines()), "")  # the first line; lists of tensors follow
                    raise UserError(
                        f"mlx-lm {version('mlx-lm')} cannot load {checkpoint.name}: {type(error).__name__}: {reason}",
                        "give a stock MLX checkpoint with --baseline",
                    ) from error
                model, note = _synthetic(config, f"mlx-lm {version('mlx-lm')} cannot read these weights")
    notes = [note]
    if mx.default_device() == mx.Device(mx.cpu):
        model.update(_cast(model, mx.float32))
        notes.append("its floating-point parameters are cast to float32, the type that MLX's CPU code is fastest with")
    for _, array in arrays(model.parameters()):
        mx.eval(array)  # one by one: what an array was made from is freed before the next
    model.eval()
    return Baseline(model, notes)


def _from_folder(folder: Path, config: dict[str, Any]) -> tuple[nn.Module, str]:
    model, config = load_model(folder, lazy=True, model_config=config)
    if "quantization" in config:
        return model, f"the stock checkpoint {folder} as it stands"
    model, _ = quantize_model(model, config, GROUP_SIZE, BITS)
    return model, f"{folder} quantized by mlx-lm to {BITS} bits in groups of {GROUP_SIZE}"


def _synthetic(config: dict[str, Any], reason: str) -> tuple[nn.Module, str]:
    """mlx-lm's own class for `config` with random weights, quantized; nothing is evaluated yet."""
    plain = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    model_class, args_class = _get_classes(plain)
    model = model_class(args_class.from_dict(plain))
    dtype = getattr(mx, str(plain.get("dtype") or plain.get("torch_dtype") or "bfloat16"), mx.bfloat16)
    model.update(_cast(model, dtype))
    model, _ = quantize_model(model, plain, GROUP_SIZE, BITS)
    return model, (
        f"{reason}: random weights of the same shapes, {BITS} bits in groups of {GROUP_SIZE}; "
        "routing is then close to even, which a trained router's need not be"
    )


def _cast(model: nn.Module, dtype: mx.Dtype) -> dict[str, Any]:
    """The floating-point parameters of `model` in another type, as a tree."""
    floats = [(k, a) for k, a in arrays(model.parameters()) if mx.issubdtype(a.dtype, mx.floating)]
    return tree_unflatten([(k, a.astype(dtype)) for k, a in floats])
