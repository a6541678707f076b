"""`mlxmoe inspect MODEL`: what a model is made of, and what each memory budget would give. Reads no weights."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from mlxmoe.arguments import add_model_arguments, print_json
from mlxmoe.experts import ExpertLayer
from mlxmoe.formats import ABSENT
from mlxmoe.loading import RuntimeConfig
from mlxmoe.models import max_context, num_experts_per_token
from mlxmoe.plan import Plan
from mlxmoe.prepared import (
    Prepared,
    choose_residency,
    full_memory,
    machine_memory,
    prepare,
    smallest_memory,
    smallest_streaming,
)
from mlxmoe.units import format_size, parse_size

_STEPS = 6  # budgets shown between the smallest that works and everything resident


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--layers", action="store_true", help="the levels of each layer as well")
    parser.add_argument("--json", action="store_true", help="last line of stdout is one JSON object")


def run(args: argparse.Namespace) -> int:
    memory = parse_size(args.memory) if args.memory else machine_memory()
    result = describe(prepare(args.model, RuntimeConfig(memory, args.context, kernels=None)), memory)
    if args.json:
        print_json(result)
        return 0
    for line in report_lines(result, args.layers):
        print(line)
    return 0


def describe(prepared: Prepared, memory: int) -> dict[str, Any]:
    """Everything that is printed, as plain data. Bytes are bytes of memory unless the key says file."""
    checkpoint, plan = prepared.checkpoint, prepared.plan
    least, resident = smallest_streaming(prepared), smallest_memory(prepared)
    result: dict[str, Any] = {
        "source": checkpoint.name,
        "architecture": checkpoint.config["model_type"],
        "kind": checkpoint.kind,
        "experts_per_token": num_experts_per_token(checkpoint.config),
        "max_context": max_context(checkpoint.config),
        "bytes_file": checkpoint.nbytes,
        "context": prepared.context,
        "bytes_trunk": prepared.nbytes_trunk,
        "bytes_kv": prepared.nbytes_kv,
        "bytes_buffers": prepared.reserve(memory).nbytes,
        "memory": memory,
        "fits": least <= memory,
        "least_memory": least,
        "least_resident": resident,
    }
    if plan is None:
        return result | {"bytes_experts": prepared.nbytes_experts} | _unconverted(prepared)
    return result | _converted(plan) | {"budgets": _budgets(prepared, resident)}


def _unconverted(prepared: Prepared) -> dict[str, Any]:
    layers = [m for _, m in prepared.model.named_modules() if isinstance(m, ExpertLayer)]
    return {"moe_layers": len(layers), "experts": layers[0].num_experts}


def _converted(plan: Plan) -> dict[str, Any]:
    """What the plan says of the file."""
    by_class: Counter[str] = Counter()
    for entry in plan.trunk.values():
        by_class[f"{entry.tensor_class} {entry.bits} bit"] += 1
    return {
        "parameters": plan.num_parameters,
        "bpw": 8 * plan.nbytes / plan.num_parameters,
        "expected_loss": plan.expected_loss,
        "moe_layers": len(plan.layers),
        "experts": len(plan.layers[0].experts),
        "expert_levels": {str(level): count for level, count in plan.level_histogram().items()},
        "other_tensors": dict(sorted(by_class.items())),
        "settings": plan.settings,
        "converted_from": plan.source["name"],
        "layers": [
            {
                "layer": layer.layer,
                "levels": {
                    shape.name: {
                        str(k): n for k, n in sorted(Counter(e.levels[p] for e in layer.experts).items()) if k != ABSENT
                    }
                    for p, shape in enumerate(layer.projections)
                },
            }
            for layer in plan.layers
        ],
    }


def _budgets(prepared: Prepared, least: int) -> list[dict[str, Any]]:
    """The elastic curve of this file: mode and expected loss from the smallest memory to everything resident."""
    plan, full = prepared.plan, full_memory(prepared)
    assert plan is not None
    rows = []
    for i in range(_STEPS + 1):
        memory = least + (full - least) * i // _STEPS
        residency = choose_residency(prepared, memory)
        rows.append(
            {
                "memory": memory,
                "mode": "elastic" if residency.reduced else "resident",
                "expected_loss": residency.expected_loss,
                "expected_kld": plan.forecast.kld(residency.expected_loss) if plan.forecast else None,
                "levels": {str(level): count for level, count in residency.histogram().items()},
            }
        )
    return rows


def report_lines(result: dict[str, Any], layers: bool) -> list[str]:
    """The table for people."""
    lines = [
        f"{result['source']}: {result['architecture']}, {result['kind']}, {format_size(result['bytes_file'])} on disk",
        f"{result['moe_layers']} layers of {result['experts']} experts, {result['experts_per_token']} per token; "
        f"context up to {result['max_context']} tokens",
    ]
    if result["kind"] == "converted":
        lines += _converted_lines(result, layers)
    else:
        lines.append(f"experts {format_size(result['bytes_experts'])} in memory")
    lines.append(
        f"besides the experts: other weights {format_size(result['bytes_trunk'])}, {result['context']} tokens of context "
        f"{format_size(result['bytes_kv'])}, buffers {format_size(result['bytes_buffers'])}"
    )
    lines.append(
        f"all experts resident from {format_size(result['least_resident'])} on; below that they are read as needed"
    )
    verdict = "fits in" if result["fits"] else "does not fit in"
    lines.append(f"needs at least {format_size(result['least_memory'])}: {verdict} {format_size(result['memory'])}")
    return lines


def _converted_lines(result: dict[str, Any], layers: bool) -> list[str]:
    lines = [
        f"converted from {result['converted_from']}: {result['parameters'] / 1e6:.4g}M parameters, "
        f"{result['bpw']:.3f} bits per weight, expected loss {result['expected_loss']:.3g}",
        "expert matrices written: " + _shares(result["expert_levels"]),
        "other tensors: " + ", ".join(f"{n} {name}" for name, n in result["other_tensors"].items()),
        f"{'memory':>10}  {'mode':<9} {'expected loss':<14} {'KLD':<9} expert matrices resident",
    ]
    for row in result["budgets"]:
        loss, kld = f"{row['expected_loss']:.3g}", "" if row["expected_kld"] is None else f"{row['expected_kld']:.3g}"
        levels = _shares(row["levels"])
        lines.append(f"{format_size(row['memory']):>10}  {row['mode']:<9} {loss:<14} {kld:<9} {levels}")
    if layers:
        for layer in result["layers"]:
            text = "; ".join(f"{name} {_shares(levels)}" for name, levels in layer["levels"].items())
            lines.append(f"layer {layer['layer']}: {text}")
    return lines


def _shares(levels: dict[str, int]) -> str:
    total = sum(levels.values())
    return ", ".join(f"{100 * count / total:.0f} % at {level} bit" for level, count in levels.items())
