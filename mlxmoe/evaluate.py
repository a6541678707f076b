"""`mlxmoe eval`: how far a model's next-token distribution is from a reference's, and its perplexity.

Owns the choice of text (documents, windows, shares), the per-position scores and their summary; docs/measuring.md
defines each number. Loading is left to loading.py. Both models see the same tokens; nothing here samples.
"""

# B windows of a batch, T tokens of a window, V vocabulary, N scored positions

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlxmoe.arguments import note, print_json
from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.errors import UserError
from mlxmoe.loading import open_model
from mlxmoe.runtime import RuntimeConfig, add_runtime_arguments, runtime_config
from mlxmoe.units import format_size

LogitsFn = Callable[[mx.array], mx.array]  # tokens [B, T] -> logits [B, T, V]; every mlx-lm model is one

BATCH_TOKENS = 2048  # more gains nothing: prefill is compute-bound well before this
BATCH_LOGITS = 1 << 26  # elements: 256 MiB of float32 logits for each of the two models
CHUNK_LOGITS = 1 << 24  # elements scored at once; the temporaries are a few times this


@dataclass(frozen=True)
class EvalConfig:
    """`max_tokens` scored positions over all texts (0: everything), in windows of up to `window` tokens."""

    max_tokens: int = 16384
    window: int = 512


class Text(NamedTuple):
    name: str
    documents: list[str]


class Scores(NamedTuple):
    """One entry per scored position, in the order of the windows. The last three need a reference."""

    window: np.ndarray  # [N] int32, index of the window a position belongs to
    nll: np.ndarray  # [N] float32, -log P_model(next token), nats
    nll_reference: np.ndarray | None  # [N] float32
    kld: np.ndarray | None  # [N] float32, KL(P_reference || P_model), nats
    agree: np.ndarray | None  # [N] bool, both models rank the same token first


def kl_divergence(log_p: mx.array, log_q: mx.array) -> mx.array:
    """KL(P || Q) in nats over the last axis: log-probabilities [..., V] -> float32 [...].

    P is the reference and Q the model, as in llama.cpp --kl-divergence. Tokens of zero probability under P add nothing.
    """
    log_p, log_q = log_p.astype(mx.float32), log_q.astype(mx.float32)
    p = mx.exp(log_p)
    return mx.where(p > 0, p * (log_p - log_q), 0.0).sum(axis=-1)


def log_softmax(logits: mx.array) -> mx.array:
    """Logits [..., V] of any float type -> log-probabilities in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def score_windows(
    model: LogitsFn,
    reference: LogitsFn | None,
    windows: Sequence[Sequence[int]],
    common_vocabulary: int | None = None,
    progress: bool = False,
) -> Scores:
    """Scores every next-token prediction inside each window; the first token of a window is context only.

    Windows of equal length share a batch, and one batch of logits per model is alive at a time. When the two models'
    logits differ in size, both are cut to `common_vocabulary` entries before the softmax; None makes that an error.
    Raises UserError for vocabularies that do not fit, RuntimeError for logits that are not finite.
    """
    lengths = [len(w) - 1 for w in windows]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(starts[-1])
    vocabulary = _shared_vocabulary(model, reference, windows, common_vocabulary)
    names = ["nll"] if reference is None else ["nll", "nll_reference", "kld", "agree"]
    columns = {name: np.zeros(total, bool if name == "agree" else np.float32) for name in names}
    limit = min(BATCH_TOKENS, BATCH_LOGITS // vocabulary)
    rows = max(1, CHUNK_LOGITS // vocabulary)

    bar = tqdm(total=total, unit="tok", desc="eval", file=sys.stderr, disable=not progress, dynamic_ncols=True)
    with bar:
        for batch in _batches(windows, limit):
            tokens = mx.array([list(windows[i]) for i in batch])
            logits = _predictions(model, tokens, vocabulary)
            other = None if reference is None else _predictions(reference, tokens, vocabulary)
            targets = tokens[:, 1:].reshape(-1, 1)
            places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in batch])
            for lo in range(0, len(places), rows):
                chunk = slice(lo, lo + rows)
                scored = _score_rows(logits[chunk], None if other is None else other[chunk], targets[chunk])
                for name, values in zip(names, scored, strict=True):
                    _check_finite(name, values)
                    columns[name][places[chunk]] = values
            bar.update(len(places))
    window = np.repeat(np.arange(len(windows), dtype=np.int32), lengths)
    return Scores(window, columns["nll"], *(columns.get(name) for name in ("nll_reference", "kld", "agree")))


def _score_rows(logits: mx.array, other: mx.array | None, targets: mx.array) -> list[np.ndarray]:
    """Logits [N, V] of the model and the reference, targets [N, 1] -> nll, nll_reference, kld, agree, each [N]."""
    log_q = log_softmax(logits)
    scored = [-mx.take_along_axis(log_q, targets, axis=-1)[:, 0]]
    if other is not None:
        log_p = log_softmax(other)
        scored.append(-mx.take_along_axis(log_p, targets, axis=-1)[:, 0])
        scored.append(kl_divergence(log_p, log_q))
        scored.append(mx.argmax(log_p, axis=-1) == mx.argmax(log_q, axis=-1))
    return [np.array(values) for values in scored]


def _predictions(model: LogitsFn, tokens: mx.array, vocabulary: int) -> mx.array:
    """Evaluated logits [B * (T-1), V] for the tokens that follow; the last position of a window predicts nothing."""
    logits = model(tokens)[:, :-1, :vocabulary].reshape(-1, vocabulary)
    mx.eval(logits)
    return logits


def _batches(windows: Sequence[Sequence[int]], limit: int) -> Iterator[list[int]]:
    """Indices of windows of one length, the longest first, of up to `limit` tokens together (or one window)."""
    by_length: dict[int, list[int]] = {}
    for i, window in enumerate(windows):
        by_length.setdefault(len(window), []).append(i)
    for length in sorted(by_length, reverse=True):
        same = by_length[length]
        count = max(1, limit // length)
        for lo in range(0, len(same), count):
            yield same[lo : lo + count]


def _shared_vocabulary(
    model: LogitsFn, reference: LogitsFn | None, windows: Sequence[Sequence[int]], common: int | None
) -> int:
    """V of both logits, from one token through each. UserError when they differ or a token lies outside."""
    probe = mx.array([list(windows[0][:1])])
    size = model(probe).shape[-1]
    if reference is not None and (other := reference(probe).shape[-1]) != size:
        if common is None or common > min(size, other):
            raise UserError(
                f"the vocabulary of the model has {size} entries, that of the reference {other}",
                "compare a model with the checkpoint it was made from",
            )
        size = common
    highest = max(max(window) for window in windows)
    if highest >= size:
        raise UserError(
            f"the text holds token {highest}, but the model's vocabulary has {size} entries",
            "the tokenizer files do not belong to this model",
        )
    return size


def _check_finite(name: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise RuntimeError(f"{name} is not finite at {count} of {len(values)} positions: a model's logits are broken")


def summarise(scores: Scores, windows: tuple[int, int] | None = None) -> dict[str, Any]:
    """The numbers of docs/measuring.md over all positions, or over those of windows [first, last)."""
    chosen = np.ones(len(scores.nll), bool)
    if windows is not None:
        chosen = (scores.window >= windows[0]) & (scores.window < windows[1])
    nll = scores.nll[chosen].astype(np.float64)
    result: dict[str, Any] = {"tokens": len(nll), "windows": len(np.unique(scores.window[chosen]))}
    if scores.kld is not None and scores.agree is not None and scores.nll_reference is not None:
        kld = scores.kld[chosen].astype(np.float64)
        result |= {
            "kld_mean": float(kld.mean()),
            "kld_stderr": standard_error(kld, scores.window[chosen]),
            "kld_median": float(np.median(kld)),
            "kld_p95": float(np.percentile(kld, 95)),
            "kld_p99": float(np.percentile(kld, 99)),
            "top1_agreement": float(scores.agree[chosen].mean()),
        }
    result["ppl"] = math.exp(nll.mean())
    if scores.nll_reference is not None:
        result["ppl_reference"] = math.exp(scores.nll_reference[chosen].astype(np.float64).mean())
    return result


def standard_error(values: np.ndarray, window: np.ndarray) -> float | None:
    """Standard error of the mean of `values` [N], with windows [N] as the independent units.

    Positions of one window share a context, so the plain s/sqrt(N) is too small; this is the cluster-robust estimate
    sqrt(W/(W-1) * sum_w (sum of the residuals of w)^2) / N over W windows. None for fewer than two windows.
    """
    _, inverse = np.unique(window, return_inverse=True)
    sums = np.bincount(inverse, weights=values - values.mean())
    count = len(sums)
    if count < 2:
        return None
    return float(np.sqrt(count / (count - 1) * np.square(sums).sum()) / len(values))


def read_text(path: str | Path) -> Text:
    """Documents of a .jsonl file (key "text") or one plain-text document. UserError names the file and the line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no text file {path}", "give a .jsonl file with the key text, or a plain text file")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}", "convert it to UTF-8"
        ) from None
    documents = [content] if path.suffix != ".jsonl" else list(_jsonl_documents(path, content))
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise UserError(f"{path} holds no text", "give a file with some text in it")
    return Text(str(path), documents)


def _jsonl_documents(path: Path, content: str) -> Iterator[str]:
    # split("\n"): splitlines would also break at U+2028 and friends, which JSON allows inside a string
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        hint = 'every line must be a JSON object such as {"text": "..."}'
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number} is not JSON: {error.msg}", hint) from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f"{path} line {number} has no text under the key text", hint)
        yield row["text"]


def cut_windows(tokens: Sequence[int], window: int, bos: int | None = None) -> list[list[int]]:
    """Windows of up to `window` tokens in which every token but the document's first is predicted exactly once.

    A window opens with the begin-of-sequence token where the tokenizer has one (`bos`; the document then starts with
    it too), else with the token before its first prediction.
    """
    tokens = list(tokens)
    step = window - 1
    return [[tokens[i] if bos is None else bos, *tokens[i + 1 : i + window]] for i in range(0, len(tokens) - 1, step)]


def choose_windows(documents: Sequence[str], tokenizer: Any, window: int, limit: int | None) -> list[list[int]]:
    """Windows of the documents holding `limit` predictions (None: all of them), the last one shortened to fit.

    Documents and the windows of each are visited in a fixed pseudo-random order, one window of every document before
    a second one of any: a small sample then covers many documents, and not only their openings.
    """
    bos = _begin_token(tokenizer)
    order = list(range(len(documents)))
    if limit is not None:
        random.Random(0).shuffle(order)
    queues: dict[int, list[list[int]]] = {}
    chosen: list[list[int]] = []
    left = sys.maxsize if limit is None else limit
    while order and left > 0:
        for i in list(order):
            if i not in queues:
                # verbose=False: no warning that a document is longer than the context; it is cut below
                queues[i] = cut_windows(tokenizer.encode(documents[i], verbose=False), window, bos)
                if limit is not None:
                    random.Random(i).shuffle(queues[i])
                queues[i].reverse()
            if not queues[i]:
                order.remove(i)
                continue
            taken = queues[i].pop()[: left + 1]
            chosen.append(taken)
            left -= len(taken) - 1
            if left <= 0:
                break
    return chosen


def _begin_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text, if it does."""
    special = tokenizer.encode("")
    return special[0] if special and special[0] == tokenizer.bos_token_id else None


def evaluate(
    model: LogitsFn,
    tokenizer: Any,
    texts: Sequence[Text | str | Path],
    reference: LogitsFn | None = None,
    config: EvalConfig = EvalConfig(),
    reference_tokenizer: Any = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores a model, or any function tokens [B, T] -> logits [B, T, V], against a reference on texts.

    `texts` are Text values or file paths; each gets an even share of config.max_tokens. Returns a dict of plain
    numbers: tokens, windows, ppl; with a reference also kld_mean, kld_stderr, kld_median, kld_p95, kld_p99,
    top1_agreement and ppl_reference; and `texts`, a list with the same keys per text plus its name.
    `reference_tokenizer` is compared with `tokenizer`; given and equal, logits may be padded to different sizes.
    Raises UserError for bad texts or settings and for a reference of another vocabulary.
    """
    if config.window < 2:
        raise UserError(f"a window of {config.window} tokens predicts nothing", "use --window 512")
    if config.max_tokens < 0 or 0 < config.max_tokens < len(texts):
        raise UserError(
            f"{config.max_tokens} tokens cannot be shared by {len(texts)} texts", "raise --max-tokens; 0 means all"
        )
    if not texts:
        raise UserError("there is no text to score", "give at least one text file")
    common = None
    if reference is not None and reference_tokenizer is not None:
        if tokenizer.get_vocab() != reference_tokenizer.get_vocab():
            raise UserError(
                f"the model's tokenizer ({len(tokenizer)} tokens) and the reference's ({len(reference_tokenizer)} "
                "tokens) differ",
                "compare a model with the checkpoint it was made from",
            )
        common = max(tokenizer.get_vocab().values()) + 1

    start = time.perf_counter()
    windows: list[list[int]] = []
    spans: list[tuple[str, tuple[int, int]]] = []
    for n, text in enumerate(texts):
        if not isinstance(text, Text):
            text = read_text(text)
        share = None
        if config.max_tokens:
            share = config.max_tokens // len(texts) + (n < config.max_tokens % len(texts))
        chosen = choose_windows(text.documents, tokenizer, config.window, share)
        if not chosen:
            raise UserError(f"{text.name} is too short: no token follows another", "give a longer text")
        spans.append((text.name, (len(windows), len(windows) + len(chosen))))
        windows += chosen
    scores = score_windows(model, reference, windows, common, progress)
    result = summarise(scores)
    result["window"] = config.window
    result["seconds"] = round(time.perf_counter() - start, 3)
    result["texts"] = [{"name": name, **summarise(scores, span)} for name, span in spans]
    return result


def remembered(model: LogitsFn) -> LogitsFn:
    """The reference's logits, computed once per batch of tokens: every row of the table asks for the same ones."""
    seen: dict[bytes, np.ndarray] = {}

    def logits(tokens: mx.array) -> mx.array:
        key = np.array(tokens).tobytes()
        if key not in seen:
            seen[key] = np.array(model(tokens).astype(mx.float32))
        return mx.array(seen[key])

    return logits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config = EvalConfig()
    add_runtime_arguments(parser)
    parser.add_argument("--reference", metavar="REF", help="the model to compare with, such as the original")
    parser.add_argument(
        "--text", nargs="+", required=True, metavar="F", help='text to score: .jsonl with the key "text", or plain text'
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=config.max_tokens,
        metavar="N",
        help="predictions scored, shared evenly by the texts; 0 scores everything (default: %(default)s)",
    )
    parser.add_argument(
        "--window", type=int, default=config.window, metavar="N", help="tokens of a window (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")


def run(args: argparse.Namespace) -> int:
    texts = [read_text(path) for path in args.text]  # before any model is loaded: a typo must not cost minutes
    loaded = open_model(args.model, runtime_config(args))
    for line in loaded.report.lines():
        note(line)
    if args.window > loaded.report.context:
        raise UserError(
            f"the window of {args.window} tokens is longer than the context of {loaded.report.context}",
            f"use --window {loaded.report.context} or less",
        )
    reference = None
    if args.reference:
        reference = open_model(args.reference, RuntimeConfig(context=args.context))
        for line in reference.report.lines():
            note(f"reference: {line}")
    result: dict[str, Any] = {"model": loaded.report.source, "reference": args.reference}
    result["bytes"] = open_checkpoint(args.model).nbytes  # all files of the folder
    result |= evaluate(
        loaded.model,
        loaded.tokenizer,
        texts,
        reference.model if reference else None,
        EvalConfig(args.max_tokens, args.window),
        reference.tokenizer if reference else None,
        progress=True,
    )
    print("\n".join(report_lines(result)))
    if args.json:
        print_json(result)
    return 0


_COLUMNS = (
    ("tokens", "tokens", "d"),
    ("kld_mean", "KLD mean", ".5f"),
    ("kld_median", "median", ".5f"),
    ("kld_p95", "95%", ".4f"),
    ("kld_p99", "99%", ".4f"),
    ("top1_agreement", "top-1", ".2%"),
    ("ppl", "ppl", ".3f"),
    ("ppl_reference", "ppl ref", ".3f"),
)


def report_lines(result: dict[str, Any]) -> list[str]:
    """A table with one row per text and one for all of them."""
    columns = [c for c in _COLUMNS if c[0] in result]
    rows = [["text", *(title for _, title, _ in columns)]]
    for row in [*result["texts"], {"name": "all", **result}]:
        rows.append([Path(row["name"]).name, *(format(row[key], spec) for key, _, spec in columns)])
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:], strict=True))]) for r in rows
    ]
    if result.get("kld_stderr") is not None:
        lines.append(f"KLD mean {result['kld_mean']:.5f} +- {result['kld_stderr']:.5f} nats (standard error)")
    if "bytes" in result:
        lines.append(f"model: {format_size(result['bytes'])}")
    return lines
