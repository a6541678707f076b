"""`mlxmoe bench convert`: speed and memory of the converter against mlx_lm.convert and mlx_lm.gptq, on one checkpoint.

Every conversion runs in a process of its own, so that peak memory is its own; with repeats they take turns. The converter
must stream: its peak may depend on one layer, never on the model. `--synthetic` makes a checkpoint of many equal layers for
that. docs/measuring.md defines each number; what the results are worth is for `bench quantizers`.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mlxmoe.arguments import note, print_json
from mlxmoe.bench import stock
from mlxmoe.bench.checkpoint import shape_of_size, write_checkpoint
from mlxmoe.bench.child import Ran, nothing, run_child
from mlxmoe.bench.timing import Ratio, Spread, interleave
from mlxmoe.checkpoint import Checkpoint, folder_nbytes, open_checkpoint
from mlxmoe.cli import main as command_line
from mlxmoe.convert import gptq, polish, quantize
from mlxmoe.convert.source import Source
from mlxmoe.convert.stats import Accumulator
from mlxmoe.convert.stream import LayerStream
from mlxmoe.convert.walk import Walk
from mlxmoe.errors import UserError
from mlxmoe.machine import machine_facts
from mlxmoe.units import format_size, parse_size

OURS = "mlxmoe convert"
CALIBRATED = "mlxmoe convert --calibration"
STOCK = "mlx_lm.convert"
STOCK_GPTQ = "mlx_lm.gptq"
PAIRS = ((OURS, STOCK), (CALIBRATED, STOCK_GPTQ))

# What a calibrated conversion spends its time on. Every function stands for itself and all that it calls.
STAGES: dict[str, tuple[Callable[..., Any], ...]] = {
    "forward": (Walk.advance,),
    "backward": (LayerStream.differentiate, LayerStream.sample, Accumulator.add),
    "codes": (gptq.curvature, gptq.quantize, quantize.clip_search, quantize.affine_search),
    "polish": (polish.polish_layer,),
}


@dataclass(frozen=True)
class ConvertBench:
    """`bpw` of our files; theirs have the nearest width that they offer, in groups of 64."""

    bpw: float = 3.0
    repeats: int = 1
    calibration_tokens: int = 16384

    def __post_init__(self) -> None:
        for name in ("repeats", "calibration_tokens"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} is {getattr(self, name)}, expected 1 or more", f"leave {flag} out")


class Converted(NamedTuple):
    """One conversion. calibration_seconds: of mlx_lm.gptq's pass over the text."""

    ran: Ran
    nbytes: int
    calibration_seconds: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = ConvertBench()
    parser.add_argument("source", nargs="?", metavar="SRC", help="a Hugging Face folder or Hub id")
    parser.add_argument(
        "--synthetic", metavar="SIZE", help="instead of SRC: a checkpoint of random weights of that size, such as 1GB"
    )
    parser.add_argument(
        "--layers", type=int, default=64, metavar="N", help="equal layers of that checkpoint (default: %(default)s)"
    )
    parser.add_argument(
        "--calibration", metavar="F", help="text: measure conversion by it and mlx_lm.gptq as well (default: neither)"
    )
    parser.add_argument(
        "--calibration-tokens", type=int, default=default.calibration_tokens, metavar="N",
        help="tokens of it that both are given (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--bpw", type=float, default=default.bpw, help="bits per weight of our files (default: 3)")
    parser.add_argument(
        "--repeats", type=int, default=default.repeats, metavar="R", help="runs of each (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")


def run(args: argparse.Namespace) -> int:
    config = ConvertBench(args.bpw, args.repeats, args.calibration_tokens)
    if (args.source is None) == (args.synthetic is None):
        raise UserError("give either SRC or --synthetic SIZE", "example: mlxmoe bench convert --synthetic 1GB")
    if args.layers < 1:
        raise UserError(f"--layers is {args.layers}, expected 1 or more", "leave --layers out for the default")
    with _work_folder() as work:
        if args.synthetic:
            args.source = _write_synthetic(parse_size(args.synthetic), args.layers, work / "source")
        result = measure(open_checkpoint(args.source), args.calibration, config, work)
    print("\n".join(report_lines(result)))
    if args.json:
        print_json(result)
    return 0


@contextmanager
def _work_folder() -> Iterator[Path]:
    work = Path(tempfile.mkdtemp(prefix="mlxmoe-bench-"))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_synthetic(nbytes: int, layers: int, folder: Path) -> Path:
    """Raises UserError when the disk has no room for it and one conversion of it."""
    shape = shape_of_size(nbytes, layers)
    free = shutil.disk_usage(folder.parent).free
    if free < 1.6 * shape.nbytes():
        raise UserError(
            f"{folder.parent.parent} has {format_size(free)} free, expected {format_size(1.6 * shape.nbytes())}",
            "set TMPDIR to a folder on a larger disk, or give a smaller size",
        )
    note(f"writing a synthetic checkpoint of {format_size(shape.nbytes())}, {layers} layers")
    write_checkpoint(folder, shape)
    return folder


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(checkpoint: Checkpoint, calibration: str | None, config: ConvertBench, work: Path) -> dict[str, Any]:
    """All conversions of `checkpoint`, one at a time, each removed from `work` when it is measured."""
    source = Source(checkpoint, group_size=128)
    tokens = work / "tokens.npy"
    np.save(tokens, _tokens(checkpoint, calibration, config))
    text = ["--calibration", str(calibration), "--calibration-tokens", str(config.calibration_tokens)]
    subjects: dict[str, Callable[[], Converted]] = {
        OURS: partial(_ours, checkpoint, config, ["--method", "rtn"], work / "out"),
        STOCK: partial(_theirs, checkpoint, f"rtn:{_nearest(config.bpw, (2, 3, 4, 6, 8))}:64", tokens, work / "out"),
    }
    if calibration:
        subjects[CALIBRATED] = partial(_ours, checkpoint, config, text, work / "out")
        recipe = f"gptq:{_nearest(config.bpw, (2, 4, 8))}:64"
        subjects[STOCK_GPTQ] = partial(_theirs, checkpoint, recipe, tokens, work / "out")
    with tqdm(total=config.repeats * len(subjects), unit="run", desc="bench convert", dynamic_ncols=True) as bar:
        runs = dict(zip(subjects, interleave(list(subjects.values()), config.repeats, bar.update), strict=True))
    stages = None
    if calibration:
        note("once more under Python's profiler, for the stages")
        stages = run_child(profiled, _arguments(checkpoint, config, text, work / "out")).value
        shutil.rmtree(work / "out")
    return _summary(checkpoint, source.num_parameters, config, runs, stages)


def _tokens(checkpoint: Checkpoint, calibration: str | None, config: ConvertBench) -> np.ndarray:
    """The windows that `mlxmoe convert` takes from the same file; none without one."""
    if calibration is None:
        return np.zeros((0, stock.WINDOW), np.int32)
    return stock.read_tokens(checkpoint, calibration, config.calibration_tokens)


def _nearest(bpw: float, widths: Sequence[int]) -> int:
    """A group of 64 has 32 bits of scale and bias, half a bit a weight."""
    return min(widths, key=lambda bits: abs(bits + 0.5 - bpw))


def _arguments(checkpoint: Checkpoint, config: ConvertBench, more: list[str], output: Path) -> list[str]:
    return ["convert", str(checkpoint.folder), str(output), "--bpw", f"{config.bpw:g}", *more]


def _ours(checkpoint: Checkpoint, config: ConvertBench, more: list[str], output: Path) -> Converted:
    ran = run_child(command_line, _arguments(checkpoint, config, more, output), imports=["mlxmoe.convert.cli"])
    if ran.value == 2:  # it has said why
        raise UserError("mlxmoe convert refuses these settings", "the lines above say why; --bpw sets the size")
    if ran.value:
        raise RuntimeError(f"mlxmoe convert ended with status {ran.value}")
    return Converted(ran, _removed(output))


def _theirs(checkpoint: Checkpoint, recipe: str, tokens: Path, output: Path) -> Converted:
    ran = run_child(stock.quantize, recipe, str(checkpoint.folder), str(output), str(tokens))
    return Converted(ran, _removed(output), ran.value)


def _removed(folder: Path) -> int:
    """Its bytes."""
    nbytes = folder_nbytes(folder)
    shutil.rmtree(folder)
    return nbytes


def profiled(arguments: list[str]) -> dict[str, float]:
    """Runs `mlxmoe ARGUMENTS` under Python's profiler: the seconds of each stage, and in all."""
    profile = cProfile.Profile()
    if profile.runcall(command_line, arguments):
        raise RuntimeError(f"{' '.join(arguments)} failed")
    entries = pstats.Stats(profile).stats  # type: ignore[attr-defined]

    def seconds(function: Callable[..., Any]) -> float:
        """0 of what was not called: text of one window is not polished by."""
        code = function.__code__
        return float(entries.get((code.co_filename, code.co_firstlineno, code.co_name), (0.0,) * 4)[3])

    total = sum(entry[2] for entry in entries.values())
    return {name: sum(map(seconds, functions)) for name, functions in STAGES.items()} | {"all": total}


# -- the report --------------------------------------------------------------------------------------------------------


def _summary(
    checkpoint: Checkpoint,
    weights: int,
    config: ConvertBench,
    runs: dict[str, list[Converted]],
    stages: dict[str, float] | None,
) -> dict[str, Any]:
    imports = {
        OURS: run_child(nothing, imports=["mlxmoe.convert.cli"]).peak_rss,
        STOCK: run_child(nothing, imports=[stock.__name__]).peak_rss,
    }
    imports |= {CALIBRATED: imports[OURS], STOCK_GPTQ: imports[STOCK]}
    tokens, file_nbytes = config.calibration_tokens, sum(path.stat().st_size for path in checkpoint.shards)
    subjects: dict[str, dict[str, Any]] = {}
    for name, each in runs.items():
        peak = max(run.ran.peak_rss for run in each)
        above = max(1, peak - imports[name])
        subjects[name] = {
            "seconds": Spread.of([run.ran.seconds for run in each]).as_json(),
            "weights_per_second": round(weights / Spread.of([run.ran.seconds for run in each]).median),
            "peak_rss": peak,
            "imports_rss": imports[name],
            "peak_above_imports": above,
            "file_over_peak": round(file_nbytes / above, 3),
            "converted_bytes": each[-1].nbytes,
        }
    if STOCK_GPTQ in runs:
        read = Spread.of([run.calibration_seconds or float("nan") for run in runs[STOCK_GPTQ]]).median
        coding = subjects[STOCK_GPTQ]["seconds"]["median"] - read
        subjects[STOCK_GPTQ]["stages"] = {
            "forward_tokens_per_second": round(tokens / read, 1),
            "coded_weights_per_second": round(weights / coding),
        }
    if stages is not None:
        rates = {name: tokens / stages[name] for name in ("forward", "backward", "polish") if stages[name]}
        subjects[CALIBRATED]["stages"] = {
            **{f"{name}_tokens_per_second": round(rate, 1) for name, rate in rates.items()},
            "coded_weights_per_second": round(weights / stages["codes"]),
            "seconds": {name: round(value, 3) for name, value in stages.items()},
        }
    return {
        "source": checkpoint.name,
        "file_bytes": file_nbytes,
        "layer_bytes": _layer_nbytes(checkpoint),
        "weights": weights,
        "settings": asdict(config),
        "subjects": subjects,
        "ratios": {
            f"{ours} / {theirs}": {
                "seconds": Ratio.of(*([run.ran.seconds for run in runs[name]] for name in (ours, theirs))).as_json(),
                "peak_rss": Ratio.of(*([run.ran.peak_rss for run in runs[name]] for name in (ours, theirs))).as_json(),
            }
            for ours, theirs in PAIRS
            if ours in runs
        },
        "machine": machine_facts(),
    }


def _layer_nbytes(checkpoint: Checkpoint) -> int:
    """Of the largest layer in the files."""
    sums: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        found = re.search(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.", name)
        if found:
            sums[found[1]] = sums.get(found[1], 0) + info.nbytes
    return max(sums.values(), default=0)


def report_lines(result: dict[str, Any]) -> list[str]:
    """For people: a row per subject, then the stages and the ratios."""
    lines = [
        f"{result['source']}: {format_size(result['file_bytes'])}, largest layer {format_size(result['layer_bytes'])}, "
        f"{result['weights'] / 1e6:.4g}M weights",
        f"{'':30}{'seconds':>22}{'weights/s':>12}{'peak':>10}{'less imports':>14}{'file / that':>13}{'written':>10}",
    ]
    for name, each in result["subjects"].items():
        took = each["seconds"]
        lines.append(
            f"{name:30}{took['median']:8.1f} ({took['low']:.1f}..{took['high']:.1f})".ljust(52)
            + f"{each['weights_per_second']:12.3g}{format_size(each['peak_rss']):>10}"
            + f"{format_size(each['peak_above_imports']):>14}{each['file_over_peak']:13.2f}"
            + f"{format_size(each['converted_bytes']):>10}"
        )
    for name, each in result["subjects"].items():
        if "stages" in each:
            rates = {key: value for key, value in each["stages"].items() if key != "seconds"}
            lines.append(f"{name}: " + ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in rates.items()))
    for pair, ratios in result["ratios"].items():
        for what, ratio in ratios.items():
            lines.append(
                f"{pair}, {what.replace('_rss', ' memory')}: {ratio['of_medians']:.3f} (pairs: median "
                f"{ratio['median_of_pairs']:.3f}, {ratio['low']:.3f}..{ratio['high']:.3f})"
            )
    settings, machine = result["settings"], result["machine"]
    lines.append(
        f"{settings['repeats']} runs of each, {settings['bpw']:g} bits a weight; mlx_lm.gptq gets the "
        f"{settings['calibration_tokens']} tokens that mlxmoe gets, not its own text from the network"
        if STOCK_GPTQ in result["subjects"]
        else f"{settings['repeats']} runs of each, {settings['bpw']:g} bits a weight"
    )
    lines.append(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['platform']}, MLX {machine['mlx']} on {machine['device']}, "
        f"mlx-lm {machine['mlx_lm']}, commit {machine['commit'] or 'unknown'}"
    )
    return lines
