"""What an error in one class of tensors costs: `python -m mlxmoe.bench.class_weights CHECKPOINT --text F...`.

Quantizes one class at a time of an unconverted checkpoint, at 3 and at 4 bits, by the converter's own quantizers, and
divides the measured KLD by the mean relative squared error of the class. The slopes are what convert/sensitivity.py
holds as CLASS_WEIGHTS; docs/quantization.md has the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxmoe.arguments import note, print_json
from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.convert.quantize import affine_search, clip_search, encode
from mlxmoe.convert.source import Source
from mlxmoe.evaluate import EvalConfig, evaluate, remembered
from mlxmoe.loading import open_model
from mlxmoe.models import named_arrays

BITS = (3, 4)


class ClassSlope(NamedTuple):
    """One class at one width: mean relative squared error of its tensors, the KLD that it causes, and the quotient."""

    tensor_class: str
    bits: int
    error: float
    kld: float
    slope: float


def quantized(weight: mx.array, bits: int, group_size: int, symmetric: bool) -> tuple[mx.array, float]:
    """The weight [..., K] after the converter's quantizer, and its relative squared error."""
    groups = np.array(weight.astype(mx.float32)).reshape(-1, group_size)
    if symmetric:
        scales, _ = clip_search(groups, bits)
        scale = scales.astype(np.float32)[:, None]
        value = (encode(groups, scale[:, 0], bits) - np.float32(((1 << bits) - 1) / 2)) * scale
    else:
        coded = affine_search(groups, bits)
        value = coded.codes * coded.scales.astype(np.float32)[:, None] + coded.biases.astype(np.float32)[:, None]
    error = float(np.square(value - groups).sum() / np.square(groups).sum())
    return mx.array(value.reshape(weight.shape)), error


def tensors_by_class(checkpoint: Path) -> dict[str, dict[str, int]]:
    """class -> parameter name -> group size, as the converter classifies them."""
    source = Source(open_checkpoint(checkpoint), 128)
    classes: dict[str, dict[str, int]] = {"experts": {}}
    for site in source.sites:
        classes["experts"] |= {f"{site.path}.{s.name}.weight": s.group_size for s in source.shapes[site.path]}
    for tensor in source.trunk:
        if tensor.tensor_class:
            classes.setdefault(tensor.tensor_class, {})[tensor.name] = tensor.group_sizes[0]
    return classes


def measure_classes(checkpoint: Path, texts: list[Path], max_tokens: int) -> list[ClassSlope]:
    """One row per class and width, smallest class first."""
    loaded, reference = open_model(checkpoint), remembered(open_model(checkpoint).model)
    original = named_arrays(loaded.model.parameters())
    rows = []
    for tensor_class, names in sorted(tensors_by_class(checkpoint).items(), key=lambda item: len(item[1])):
        for bits in BITS:
            errors = []
            for name, group_size in names.items():
                value, error = quantized(original[name], bits, group_size, symmetric=tensor_class == "experts")
                loaded.model.load_weights([(name, value)], strict=False)
                errors.append(error)
            result = evaluate(loaded.model, loaded.tokenizer, texts, reference, EvalConfig(max_tokens=max_tokens))
            loaded.model.load_weights([(name, original[name]) for name in names], strict=False)
            error = float(np.mean(errors))
            rows.append(ClassSlope(tensor_class, bits, error, result["kld_mean"], result["kld_mean"] / error))
            note(
                f"{tensor_class} at {bits} bits: error {error:.4f}, KLD {rows[-1].kld:.4f}, slope {rows[-1].slope:.3g}"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what an error in one class of tensors costs.")
    parser.add_argument("checkpoint", type=Path, help="a small unconverted checkpoint")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files, as for mlxmoe eval")
    parser.add_argument("--max-tokens", type=int, default=4096, help="scored tokens per row (default: %(default)s)")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = [row._asdict() for row in measure_classes(args.checkpoint, args.text, args.max_tokens)]
    print("| class | bits | relative error | KLD | KLD / error |\n|---|---|---|---|---|")
    for r in rows:
        print(f"| {r['tensor_class']} | {r['bits']} | {r['error']:.4f} | {r['kld']:.4f} | {r['slope']:.3g} |")
    print_json({"classes": rows})


if __name__ == "__main__":
    main()
