"""`mlxmoe trace MODEL --prompts F`: records which experts a model chooses, token by token, into a small file.

Owns the observing of a model, the file (docs/caching.md has its layout) and the command; replay.py reads traces and
policies.py knows nothing of them. A text is fed to the model in chunks, and each of its tokens counts as a decode step:
a choice does not depend on what else is in a chunk.

Shapes: T tokens, L layers with experts, A active experts per token, E experts of a layer, D model dim.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

from mlxmoe.arguments import note, print_json
from mlxmoe.errors import UserError
from mlxmoe.evaluate import Text, choose_windows, read_text
from mlxmoe.experts import ExpertLayer, KernelExperts
from mlxmoe.gates import ScoresFn, gate_scores
from mlxmoe.loading import Loaded, open_model
from mlxmoe.runtime import add_runtime_arguments, runtime_config
from mlxmoe.streaming import StreamedExperts
from mlxmoe.units import format_size
from mlxmoe.work import json_array, save_arrays

TRACE_FORMAT = "mlxmoe-trace"
TRACE_VERSION = 1
# What is fed when nobody brings a text: passages of several kinds, written for this project
PROMPTS = Path(__file__).with_name("prompts.jsonl")
SEED = 0  # of the order in which choose_windows visits documents


@dataclass(frozen=True)
class TraceConfig:
    """`max_tokens` recorded over all texts (0: everything), in pieces of up to `window` tokens that share a context."""

    max_tokens: int = 16384
    window: int = 1024
    scores: bool = False


@dataclass(frozen=True)
class Trace:
    """Which experts every token was sent to. Documents do not share a context; a new one starts at each of `starts`."""

    experts: np.ndarray  # [T, L, A] uint8 or uint16, ascending in A
    starts: np.ndarray  # [documents] int64, ascending, the first is 0
    layers: tuple[int, ...]  # the model's numbers of the L layers
    num_experts: int
    scores: np.ndarray | None = None  # [T, L, E] float16: what the router ranked the experts by
    model: str = ""
    model_sha256: str = ""  # of its config.json
    texts: tuple[str, ...] = ()
    seed: int = SEED

    @property
    def num_tokens(self) -> int:
        return self.experts.shape[0]

    def part(self, first: int, last: int) -> Trace:
        """Tokens [first, last); a document that is cut there starts there."""
        inside = self.starts[(self.starts > first) & (self.starts < last)] - first
        return replace(
            self,
            experts=self.experts[first:last],
            starts=np.concatenate([[0], inside]).astype(np.int64),
            scores=None if self.scores is None else self.scores[first:last],
        )

    def halves(self) -> tuple[Trace, Trace]:
        """Two parts, cut between the documents nearest to the middle, or in the middle where those leave one part less than
        a quarter. Needs two tokens."""
        middle = self.num_tokens // 2
        nearest = int(min(self.starts, key=lambda start: abs(start - middle)))
        if 4 * min(nearest, self.num_tokens - nearest) >= self.num_tokens:
            middle = nearest
        return self.part(0, middle), self.part(middle, self.num_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Watching a model
# ---------------------------------------------------------------------------------------------------------------------


class Observed(NamedTuple):
    """One call of a layer's experts: experts [..., A], scores [..., E] or None; neither is evaluated yet."""

    experts: mx.array
    scores: mx.array | None


class ObservedExperts(nn.Module):
    """Stands where a layer's experts were, computes what they compute, and keeps what it was asked for."""

    def __init__(self, inner: ExpertLayer | KernelExperts | StreamedExperts, scores: ScoresFn | None) -> None:
        super().__init__()
        self._inner, self._scores = inner, scores
        self._seen: list[Observed] = []

    @property
    def num_experts(self) -> int:
        return self._inner.num_experts

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self._observe(x, indices)
        return self._inner(x, indices)

    def weighted(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """As KernelExperts.weighted, which FusedBlock calls."""
        assert not isinstance(self._inner, ExpertLayer)
        self._observe(x, experts)
        return self._inner.weighted(x, experts, weights)

    def take(self) -> list[Observed]:
        """What was seen since the last take, in the order of the calls."""
        seen, self._seen = self._seen, []
        return seen

    def _observe(self, x: mx.array, experts: mx.array) -> None:
        self._seen.append(Observed(experts, None if self._scores is None else self._scores(x)))


@contextmanager
def observed(model: nn.Module, scores: bool = False) -> Iterator[dict[int, ObservedExperts]]:
    """Layer number -> what watches its experts, while the context lasts; then the model is as it was.

    `scores` also computes the router's scores where the block's gate is one that is known.
    """
    originals = [
        (p, m) for p, m in model.named_modules() if isinstance(m, ExpertLayer | KernelExperts | StreamedExperts)
    ]
    if not originals:
        raise UserError("the model has no routed experts", "only Mixture-of-Experts models have a choice to record")
    parents = dict(model.named_modules())
    watchers = [
        (path, ObservedExperts(m, gate_scores(parents[path.rpartition(".")[0]], m.num_experts) if scores else None))
        for path, m in originals
    ]
    model.update_modules(tree_unflatten(watchers))
    try:
        yield dict(sorted((_layer_number(path), watcher) for path, watcher in watchers))
    finally:
        model.update_modules(tree_unflatten(originals))


def _layer_number(path: str) -> int:
    return next(int(part) for part in path.split(".") if part.isdigit())


def record(
    model: nn.Module, documents: Sequence[Sequence[int]], chunk: int, scores: bool = False, progress: bool = False
) -> Trace:
    """Feeds every document (token ids) to the model, `chunk` tokens at a time, and returns what its routers chose.

    Scores are left out when any layer's gate is unknown. Raises UserError for a model without routed experts or with
    layers that differ in their number.
    """
    chosen: list[np.ndarray] = []
    ranked: list[np.ndarray] = []
    total = sum(len(document) for document in documents)
    bar = tqdm(total=total, unit="tok", desc="trace", file=sys.stderr, disable=not progress, dynamic_ncols=True)
    with bar, observed(model, scores) as watchers:
        counts = {watcher.num_experts for watcher in watchers.values()}
        if len(counts) != 1:
            raise UserError(
                f"layers have {', '.join(map(str, sorted(counts)))} experts, a trace holds one number for all",
                "this architecture cannot be traced yet; please report it with its config.json",
            )
        num_experts = counts.pop()
        for document in documents:
            cache = make_prompt_cache(model)
            for lo in range(0, len(document), chunk):
                tokens = mx.array([list(document[lo : lo + chunk])])
                model(tokens, cache=cache)
                seen = [watcher.take()[0] for watcher in watchers.values()]
                mx.eval([entry.state for entry in cache], seen)  # without the head: nobody reads the logits
                chosen.append(_stack([np.array(s.experts) for s in seen], np.min_scalar_type(num_experts - 1)))
                known = [s.scores for s in seen if s.scores is not None]
                if len(known) == len(seen):
                    ranked.append(_stack([np.array(s) for s in known], np.dtype(np.float16)))
                bar.update(tokens.size)
        layers = tuple(watchers)
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    return Trace(
        experts=np.sort(np.concatenate(chosen), axis=-1),
        starts=np.concatenate([[0], ends[:-1]]),
        layers=layers,
        num_experts=num_experts,
        scores=np.concatenate(ranked) if ranked else None,
    )


def _stack(per_layer: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """L arrays [..., N] of one chunk -> [T, L, N]."""
    return np.stack([values.reshape(-1, values.shape[-1]) for values in per_layer], axis=1).astype(dtype)


def record_texts(loaded: Loaded, texts: Sequence[Text], config: TraceConfig, progress: bool = False) -> Trace:
    """A trace of an opened model over texts that share config.max_tokens evenly. Raises UserError for bad settings."""
    report = loaded.report
    if not 2 <= config.window <= report.context:
        raise UserError(
            f"a window of {config.window} tokens is not within 2 and the context of {report.context}", "set --window"
        )
    if config.max_tokens < 0 or 0 < config.max_tokens < 2 * len(texts):
        raise UserError(f"{config.max_tokens} tokens are too few for {len(texts)} texts", "raise --max-tokens; 0: all")
    limit = config.max_tokens // len(texts) if config.max_tokens else None
    pieces = [w for text in texts for w in choose_windows(text.documents, loaded.tokenizer, config.window, limit)]
    if not pieces:
        raise UserError("the texts are too short: no token follows another", "give longer texts")
    trace = record(loaded.model, pieces, report.prefill_step, config.scores, progress)
    return replace(
        trace,
        model=report.source,
        model_sha256=hashlib.sha256((report.folder / "config.json").read_bytes()).hexdigest(),
        texts=tuple(Path(text.name).name for text in texts),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------


def save_trace(trace: Trace, path: Path) -> None:
    """Writes the file whole or not at all. Raises UserError for a folder that is not there, OSError for a full disk."""
    header = {
        "format": TRACE_FORMAT,
        "version": TRACE_VERSION,
        "layers": trace.layers,
        "num_experts": trace.num_experts,
        "model": trace.model,
        "model_sha256": trace.model_sha256,
        "texts": trace.texts,
        "seed": trace.seed,
    }
    arrays = {
        "header": json_array(header),
        "experts": trace.experts,
        "starts": trace.starts,
    }
    if trace.scores is not None:
        arrays["scores"] = trace.scores
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}", "make it first, or write the trace somewhere else")
    save_arrays(path, arrays, compressed=True)


def load_trace(path: str | Path) -> Trace:
    """Reads and checks a trace. Raises UserError, in one sentence, for a file that is absent, foreign, newer or damaged."""
    path = Path(path)
    hint = "record it again with mlxmoe trace"
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise UserError(f"{path} is not a trace, or it is cut off", hint)
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        header = json.loads(arrays["header"].tobytes())
        if header["format"] != TRACE_FORMAT:
            raise KeyError("format")
    except OSError as error:
        raise UserError(f"the trace {path} cannot be read: {error.strerror}", hint) from None
    except UserError:
        raise
    except _DAMAGED as error:
        raise UserError(f"{path} is damaged, or not a trace ({type(error).__name__})", hint) from error
    if header["version"] != TRACE_VERSION:
        raise UserError(
            f"{path} has version {header['version']}, this mlxmoe reads {TRACE_VERSION}",
            "upgrade mlxmoe, or trace again",
        )
    try:
        trace = Trace(
            experts=arrays["experts"],
            starts=arrays["starts"],
            layers=tuple(header["layers"]),
            num_experts=header["num_experts"],
            scores=arrays.get("scores"),
            model=header["model"],
            model_sha256=header["model_sha256"],
            texts=tuple(header["texts"]),
            seed=header["seed"],
        )
        _check(trace)
    except _DAMAGED as error:
        raise UserError(f"{path} is damaged: {error}", hint) from error
    return trace


# What a reader of zip, npy and JSON raises for bytes that were changed
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError),
    *(NotImplementedError, OverflowError, MemoryError, SyntaxError, RuntimeError),
)


def _check(trace: Trace) -> None:
    """Raises ValueError with the reason for a trace that cannot be one."""
    experts, starts, scores = trace.experts, trace.starts, trace.scores
    if experts.ndim != 3 or experts.dtype.kind != "u" or 0 in experts.shape or experts.shape[1] != len(trace.layers):
        raise ValueError(f"experts of shape {experts.shape} do not belong to {len(trace.layers)} layers")
    if int(experts.max()) >= trace.num_experts:
        raise ValueError(f"it names expert {int(experts.max())} of {trace.num_experts}")
    if (np.diff(experts.astype(np.int64), axis=-1) <= 0).any():
        raise ValueError("a token has the same expert twice")
    inside = starts.ndim == 1 and starts.dtype.kind == "i" and len(starts) > 0 and int(starts[-1]) < len(experts)
    if not inside or starts[0] != 0 or (np.diff(starts) <= 0).any():
        raise ValueError("its documents do not start one after the other")
    if scores is not None and scores.shape != (*experts.shape[:2], trace.num_experts):
        raise ValueError(f"scores of shape {scores.shape} do not belong to experts of shape {experts.shape}")


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runtime_arguments(parser)
    parser.add_argument(
        "--prompts",
        nargs="+",
        metavar="F",
        help='text to feed: .jsonl with the key "text", or plain text (default: a few passages that come with mlxmoe)',
    )
    parser.add_argument("--output", default="trace.npz", metavar="T", help="the file to write (default: %(default)s)")
    add_trace_arguments(parser)
    parser.add_argument(
        "--scores", action="store_true", help="the routers' scores of all experts as well, 2 bytes each (default: no)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """--max-tokens and --window: how much is recorded."""
    config = TraceConfig()
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=config.max_tokens,
        metavar="N",
        help="tokens recorded, shared evenly by the texts; 0 records everything (default: %(default)s)",
    )
    parser.add_argument(
        "--window",
        type=int,
        default=config.window,
        metavar="N",
        help="tokens of a document that share a context (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    texts = [read_text(path) for path in args.prompts or [PROMPTS]]
    output = Path(args.output)
    loaded = open_model(args.model, runtime_config(args))
    for line in loaded.report.lines():
        note(line)
    trace = record_texts(loaded, texts, TraceConfig(args.max_tokens, args.window, args.scores), progress=True)
    if args.scores and trace.scores is None:
        note("no scores: this architecture's routers are not known")
    save_trace(trace, output)
    result = {
        "model": trace.model,
        "output": str(output),
        "bytes": output.stat().st_size,
        "tokens": trace.num_tokens,
        "documents": len(trace.starts),
        "layers": len(trace.layers),
        "experts": trace.num_experts,
        "experts_per_token": trace.experts.shape[-1],
        "scores": trace.scores is not None,
    }
    print(
        f"{output}: {trace.num_tokens} tokens of {len(trace.starts)} documents, {len(trace.layers)} layers, "
        f"{trace.experts.shape[-1]} of {trace.num_experts} experts each, {format_size(result['bytes'])}"
    )
    if args.json:
        print_json(result)
    return 0
