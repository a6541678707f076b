"""mlx-lm's own quantizers, run on a checkpoint with our text: what `bench convert` and `bench quantizers` compare with.

    rtn:BITS:GROUP             mlx_lm.convert -q; a RECIPE in place of BITS: --quant-predicate RECIPE
    gptq:BITS:GROUP            mlx_lm.gptq
    dynamic:BPW:LOW:HIGH       mlx_lm.dynamic_quant in groups of 64
    awq:BITS:GROUP             mlx_lm.awq
    dwq:RATE:STUDENT           mlx_lm.dwq at a learning rate from another of these, such as dwq:1e-4:rtn:2:32

The learned ones fetch their calibration text from the network. Here their functions are called with windows of a text file
instead; everything else is theirs. On a CPU two things differ, neither of them in what is computed: floating point is
float32, stored in the source's types (MLX's CPU code is many times slower with 16-bit floats), and dwq multiplies with
unpacked codes (`Unpacked`), as training through MLX's quantized products takes a CPU hours.
"""

# T tokens of a window, P pairs of a token and an expert, E experts, N rows, K columns

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder
from mlx_lm.models.mla import QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.quant import awq, dwq, dynamic_quant, gptq
from mlx_lm.utils import load, quantize_model, save

from mlxmoe.checkpoint import Checkpoint
from mlxmoe.convert.calibrate import Calibration, choose_tokens, read_documents
from mlxmoe.convert.tokens import read_tokenizer
from mlxmoe.errors import UserError
from mlxmoe.models import named_arrays

WINDOW = 512  # tokens; mlx-lm's default but for dwq, whose text is far longer
BATCH = 1  # windows in a step of dwq: its default is 4 of twice the length, for text of two million tokens
_VALIDATION = 0.1  # share of the windows on which dwq reports its loss and does not train
_QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedMultiLinear, QuantizedSwitchLinear)

Made = tuple[nn.Module, dict[str, Any]]  # a quantized model and its config


def parse(recipe: str) -> list[str]:
    """The parts of a recipe, which the file's heading lists. Raises UserError for what is none."""
    kind, *parts = recipe.split(":")
    try:
        if kind == "dwq":
            known = 0 < float(parts[0]) < 1 and parse(":".join(parts[1:]))[0] != "dwq"
        elif kind == "dynamic":
            known = 0 < int(parts[1]) < int(parts[2]) <= 8 and float(parts[0]) > 0 and len(parts) == 3
        else:
            bits = (kind == "rtn" and parts[0] in QUANT_RECIPES) or int(parts[0]) in (2, 3, 4, 5, 6, 8)
            known = kind in ("rtn", "gptq", "awq") and bits and int(parts[1]) in (32, 64, 128) and len(parts) == 2
    except (ValueError, IndexError):
        known = False
    if not known:
        raise UserError(
            f"{recipe!r} is no quantizer of mlx-lm with its settings",
            "examples: rtn:2:64, rtn:mixed_2_6:64, gptq:2:64, dynamic:3.0:2:4, awq:4:64, dwq:1e-4:rtn:2:32",
        )
    return [kind, *parts]


def read_tokens(checkpoint: Checkpoint, file: str, count: int) -> np.ndarray:
    """int32 [windows, WINDOW]: what `mlxmoe convert` takes from the same file for the same count. Raises UserError."""
    tokenizer = read_tokenizer(checkpoint)
    calibration = Calibration(file, tokens=count, window=WINDOW)
    return choose_tokens(read_documents(file, tokenizer), tokenizer, calibration, seed=0)


def quantize(recipe: str, source: str, output: str, tokens: str, seed: int = 123) -> float | None:
    """Writes the folder `output` from the folder `source`, by the int32 [windows, T] in the file `tokens`.

    Returns the seconds of gptq's pass over them, None for the others. Raises UserError where mlx-lm does not do it.
    """
    parts = parse(recipe)
    mx.random.seed(seed)
    data = _Windows(mx.array(np.load(tokens)))
    model, tokenizer, config = load(source, lazy=True, return_config=True)  # type: ignore[misc]
    types = {name: array.dtype for name, array in named_arrays(model.parameters()).items()}
    if parts[0] != "rtn" and mx.default_device() == mx.Device(mx.cpu):
        _cast(model, lambda _: mx.float32)
    model, config = _make(parts, model, config, data)
    _cast(model, lambda name: types.get(name) or types[name.rpartition(".")[0] + ".weight"])
    save(output, source, model, tokenizer, config)
    return data.seconds() if parts[0] == "gptq" else None


def _make(parts: list[str], model: nn.Module, config: dict[str, Any], data: _Windows) -> Made:
    kind, *settings = parts
    makers: dict[str, Callable[..., Made]] = {"rtn": _rtn, "gptq": _gptq, "dynamic": _dynamic, "awq": _awq, "dwq": _dwq}
    return makers[kind](model, config, data, *settings)


# -- their quantizers --------------------------------------------------------------------------------------------------


def _rtn(model: nn.Module, config: dict[str, Any], data: _Windows, bits: str, group_size: str) -> Made:
    if bits in QUANT_RECIPES:
        predicate = mixed_quant_predicate_builder(bits, model, int(group_size))
        return quantize_model(model, config, int(group_size), None, quant_predicate=predicate)  # type: ignore[arg-type]
    return quantize_model(model, config, int(group_size), int(bits))


def _gptq(model: nn.Module, config: dict[str, Any], data: _Windows, bits: str, group_size: str) -> Made:
    if int(bits) not in (2, 4, 8):
        raise UserError(f"mlx_lm.gptq does not write {bits} bits", "it writes 2, 4 and 8")
    fallback_bits, fallback_group_size = 6, 64  # their defaults, for the modules that it has no inputs of
    model, quantization = gptq.gptq_quantize(
        model, data, int(bits), int(group_size), fallback_bits, fallback_group_size
    )
    return model, config | {"quantization": quantization}


def _dynamic(model: nn.Module, config: dict[str, Any], data: _Windows, bpw: str, low: str, high: str) -> Made:
    widths = int(low), 64, int(high), 64
    sensitivities = dict(dynamic_quant.estimate_sensitivities(model, data, *widths))
    threshold = dynamic_quant.estimate_threshold(model, sensitivities, float(bpw), *widths)

    def width(path: str, module: nn.Module) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": int(high), "group_size": 64} if sensitivities[path] > threshold else True

    return quantize_model(model, config, 64, int(low), quant_predicate=width)


def _awq(model: nn.Module, config: dict[str, Any], data: _Windows, bits: str, group_size: str) -> Made:
    settings = awq.AWQ_MODEL_CONFIGS.get(config["model_type"])
    if settings is None:
        raise UserError(
            f"mlx_lm.awq does not support {config['model_type']}",
            f"it supports {', '.join(awq.AWQ_MODEL_CONFIGS)}",
        )
    awq.awq_quantize(model, data[:], settings, int(group_size), int(bits))
    return model, awq.update_config(model, config)


def _dwq(model: nn.Module, config: dict[str, Any], data: _Windows, rate: str, *student: str) -> Made:
    quantized, config = _make(list(student), copy.deepcopy(model), config, data)
    windows: list[tuple[Any, int]] = [(row.tolist(), 0) for row in data[:]]
    held = max(BATCH, round(_VALIDATION * len(windows)))
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    packed = [(path, m) for path, m in quantized.named_modules() if isinstance(m, _QUANTIZED)] if on_cpu else []
    if on_cpu:
        quantized.update_modules(tree_unflatten([(path, Unpacked(module)) for path, module in packed]))
    dwq.dwq_quantize(
        *(quantized, lambda batch, *_, **__: model(batch), optimizers.Adam(float(rate), bias_correction=True)),
        *(windows[held:], windows[:held], BATCH, len(windows[0][0]), 123),
        dtype=mx.float32 if on_cpu else mx.bfloat16,
    )
    trained = dict(quantized.named_modules())
    for path, module in packed:
        module.scales, module.biases = trained[path].scales, trained[path].biases
    quantized.update_modules(tree_unflatten(packed))
    return quantized, config


# -- helpers -----------------------------------------------------------------------------------------------------------


class _Windows:
    """Windows of tokens that note when batches of them are asked for."""

    def __init__(self, tokens: mx.array):
        self._tokens, self._times, self._sizes = tokens, list[float](), list[int]()

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, rows: slice) -> mx.array:
        self._times.append(time.perf_counter())
        batch = self._tokens[rows]
        self._sizes.append(len(batch))
        return batch

    def seconds(self) -> float:
        """Of all windows, by those of all batches but the last, whose end nothing marks; nan for one batch."""
        done = sum(self._sizes[:-1])
        return (self._times[-1] - self._times[0]) * sum(self._sizes) / done if done else float("nan")


def _cast(model: nn.Module, dtype: Callable[[str], mx.Dtype]) -> None:
    """The floating-point parameters of `model` in the type that `dtype` gives for their names."""
    floats = [(n, a) for n, a in named_arrays(model.parameters()).items() if mx.issubdtype(a.dtype, mx.floating)]
    model.update(tree_unflatten([(name, array.astype(dtype(name))) for name, array in floats]))


class Unpacked(nn.Module):
    """In the place of a quantized module: the same matrices, from codes in float32 times the scales plus the biases."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.bits, self.group_size, self.mode = inner.bits, inner.group_size, inner.mode
        self.weight, self.scales, self.biases = inner.weight, inner.scales, inner.biases
        self.replaces = type(inner)
        if "bias" in inner:
            self.bias = inner.bias
        ones = mx.ones(inner.scales.shape)
        codes = mx.dequantize(inner.weight, ones, mx.zeros_like(ones), inner.group_size, inner.bits)
        self._codes = mx.unflatten(codes, -1, (-1, inner.group_size))
        self.freeze()

    def _values(self) -> mx.array:
        return (self._codes * self.scales[..., None] + self.biases[..., None]).flatten(-2, -1)

    def __call__(
        self, x: mx.array, *experts: mx.array, transpose: bool = True, sorted_indices: bool = False
    ) -> mx.array:
        values = self._values()
        if self.replaces is nn.QuantizedEmbedding:
            return values[x]
        if experts:
            y = _sorted_products(x, values, experts[0]) if sorted_indices else x @ values[experts[0]].swapaxes(-1, -2)
            return y + self.bias[experts[0]][..., None, :] if "bias" in self else y
        y = x @ (values.swapaxes(-1, -2) if transpose else values)
        return y + self.bias if "bias" in self else y

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ self._values().T


def _sorted_products(x: mx.array, values: mx.array, experts: mx.array) -> mx.array:
    """x [P, 1, K] with experts [P] in rising order, values [E, N, K] -> [P, 1, N].

    Its gradient is written out: MLX's of a split or an index is as large as all experts, once for every expert."""
    ends = np.cumsum(np.bincount(np.array(experts), minlength=len(values)))[:-1].tolist()

    @mx.custom_function  # type: ignore[untyped-decorator]
    def products(x: mx.array, values: mx.array) -> mx.array:
        return mx.concatenate([part @ matrix.T for part, matrix in zip(mx.split(x, ends), values, strict=True)])

    @products.vjp  # type: ignore[untyped-decorator]
    def gradients(primals: list[mx.array], slopes: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        x, values = primals
        pairs = list(zip(mx.split(x, ends), mx.split(slopes, ends), strict=True))
        inputs = [slope @ matrix for (_, slope), matrix in zip(pairs, values, strict=True)]
        return mx.concatenate(inputs), mx.stack([slope.T @ part for part, slope in pairs])

    result: mx.array = products(x.squeeze(1), values)  # type: ignore[assignment]
    return result[:, None]
