"""One model, one conversation, no terminal: prompts in, pieces of text out, and a KV cache that is kept between them.

`Engine` runs prompts (token ids) through mlx-lm's stream_generate and owns the KV cache; `Conversation` owns the
messages. `generate` uses an Engine alone, `chat` a Conversation. What both commands share stands at the end of the
file. Sampling rules, templates and detokenizers are mlx-lm's and the checkpoint's.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from jinja2 import TemplateError
from mlx_lm import stream_generate
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlxmoe.arguments import note
from mlxmoe.errors import UserError
from mlxmoe.files import write_atomically
from mlxmoe.loading import Loaded, open_model
from mlxmoe.runtime import runtime_config
from mlxmoe.units import format_size
from mlxmoe.upkeep import Upkeep

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Progress = Callable[[int, int], None]  # prompt tokens read so far, prompt tokens to read

SAVE_FORMAT = "mlxmoe-conversation"
SAVE_VERSION = 1
PENALTY_CONTEXT = 20  # tokens that the repetition penalty looks back on: mlx-lm's default

# All control characters but newline and tab. C1 too: U+009B alone starts a terminal escape sequence.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` without control characters other than newline and tab, so that a model cannot drive the terminal."""
    return _CONTROL.sub("", text)


def valid_unicode(text: str) -> str:
    """`text` without lone surrogates, which is how undecodable bytes of a command line or a terminal arrive."""
    return _SURROGATES.sub("\ufffd", text)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The default is greedy. Raises UserError for a value out of its range."""

    temp: float = 0.0  # 0: the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # 1: off
    seed: int | None = None
    ignore_eos: bool = False  # end-of-sequence tokens are never drawn

    def __post_init__(self) -> None:
        for name in _RANGES:
            if not _in_range(name, getattr(self, name)):
                expected = _RANGES[name][2]
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} is {getattr(self, name)}, expected {expected}", f"choose {expected}")

    def draw(self, logprobs: mx.array) -> mx.array:
        """Token ids [B] from log probabilities [B, V]."""
        # mlx-lm refuses a top-k of the whole vocabulary, which means the same as none
        top_k = self.top_k if self.top_k < logprobs.shape[-1] else 0
        return make_sampler(self.temp, self.top_p, self.min_p, top_k=top_k)(logprobs)


_RANGES: dict[str, tuple[float, float, str]] = {
    "temp": (0, 100, "0 to 100"),
    "top_p": (math.ulp(0.0), 1, "above 0 and at most 1"),
    "top_k": (0, 2**31 - 1, "0 or more"),
    "min_p": (0, 1, "0 to 1"),
    "repetition_penalty": (0.01, 100, "0.01 to 100"),
    "seed": (0, 2**63 - 1, "0 or more"),
}


def _in_range(name: str, value: Any) -> bool:
    if value is None:
        return name == "seed"
    low, high, _ = _RANGES[name]
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True)
class Stats:
    """What one answer took. `cached_tokens` of the `prompt_tokens` were in the KV cache and not read again."""

    prompt_tokens: int
    cached_tokens: int
    generation_tokens: int
    prompt_tps: float  # prompt tokens read per second
    decode_tps: float  # tokens per second after the first; 0 for fewer than two
    ttft_s: float  # seconds to the first token; 0 if there was none
    peak_memory: int  # bytes, MLX's peak since the process began
    finish_reason: str  # stop | length | context | interrupted

    def line(self) -> str:
        cached = f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
        return (
            f"prompt {self.prompt_tokens} tokens{cached}, {self.prompt_tps:.1f} tok/s | "
            f"answer {self.generation_tokens} tokens, {self.decode_tps:.1f} tok/s | "
            f"first token {self.ttft_s:.2f} s | peak memory {format_size(self.peak_memory)}"
        )


class _Meter:
    """Counts and times one answer."""

    def __init__(self, prompt_tokens: int, cached_tokens: int):
        self.prompt_tokens, self.cached_tokens = prompt_tokens, cached_tokens
        self.generation_tokens = 0
        self.prompt_tps = 0.0
        self.started = self.first = self.last = time.perf_counter()

    def tick(self, prompt_tps: float) -> None:
        """Notes one more token."""
        self.last = time.perf_counter()
        if self.generation_tokens == 0:
            self.first, self.prompt_tps = self.last, prompt_tps
        self.generation_tokens += 1

    def stats(self, finish_reason: str) -> Stats:
        elapsed = self.last - self.first
        return Stats(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            generation_tokens=self.generation_tokens,
            prompt_tps=self.prompt_tps,
            decode_tps=(self.generation_tokens - 1) / elapsed if elapsed > 0 else 0.0,
            ttft_s=self.first - self.started,
            peak_memory=mx.get_peak_memory(),
            finish_reason=finish_reason,
        )


class _Stopped(Exception):
    """Raised in mlx-lm's progress callback, between two chunks of the prompt, to stop reading it."""


class Engine:
    """Runs prompts on one model. The KV cache of the last prompt is kept: the next one starts where the two differ.

    After each `stream`, `text` is the answer as the model gave it and `stats` what it took (None if it failed).
    """

    def __init__(self, loaded: Loaded, sampling: Sampling = Sampling(), max_tokens: int | None = None):
        """`max_tokens` limits one answer (None: the context does). A seed in `sampling` sets MLX's random state."""
        self.model, self.tokenizer, self.report, self.experts, _ = loaded
        self._upkeep = Upkeep(loaded)
        self.sampling, self.max_tokens = sampling, max_tokens
        self.text = ""
        self.stats: Stats | None = None
        self._cache: list[Any] | None = None
        self._cached: list[int] = []  # the tokens that _cache holds
        self._stopping = False
        if sampling.seed is not None:
            mx.random.seed(sampling.seed)

    def encode(self, messages: list[Message]) -> list[int]:
        """Token ids of a conversation whose next message is the model's; plain text where there is no chat template."""
        if not self.tokenizer.has_chat_template:
            return self.encode_raw("\n".join(m["content"] for m in messages))
        valid = [{**m, "content": valid_unicode(m["content"])} for m in messages]
        try:
            return list(self.tokenizer.apply_chat_template(valid, add_generation_prompt=True))
        except TemplateError as error:
            hint = "some templates take no system message: try it without"
            raise UserError(f"the model's chat template refused the conversation: {error}", hint) from error

    def encode_raw(self, text: str) -> list[int]:
        """Token ids of `text` as it stands, after the tokenizer's own begin-of-sequence token where it has one."""
        bos = self.tokenizer.bos_token
        add_special_tokens = bos is None or not text.startswith(bos)
        return list(self.tokenizer.encode(valid_unicode(text), add_special_tokens=add_special_tokens))

    def stop(self) -> None:
        """Ends the running answer at the next token or chunk of the prompt. May be called by a signal handler."""
        self._stopping = True

    def forget(self) -> None:
        """Frees the KV cache."""
        self._cache, self._cached = None, []

    @property
    def num_cached_tokens(self) -> int:
        return len(self._cached)

    def stream(self, prompt: list[int], on_progress: Progress | None = None) -> Generator[str, None, None]:
        """The answer to `prompt`, piece by piece, safe to print. Closing the iterator or `stop` ends it cleanly.

        Raises UserError, with the cache as it was, if the prompt is empty or leaves no room for an answer.
        """
        self.text, self.stats, self._stopping = "", None, False
        limit = self._limit(len(prompt))
        cached_tokens = self._reuse(prompt)
        # Put back only after a clean end: a step cut short leaves layers of different length.
        cache, held = self._cache, prompt[:cached_tokens]
        self.forget()

        def progress(done: int, total: int) -> None:
            held.extend(prompt[len(held) : cached_tokens + done])
            if on_progress is not None:
                on_progress(done, total)
            if self._stopping and done < total:
                raise _Stopped

        meter = _Meter(len(prompt), cached_tokens)
        reason: str | None = None
        responses = stream_generate(
            self.model,
            self.tokenizer,
            prompt[cached_tokens:],
            max_tokens=limit,
            sampler=self.sampling.draw,
            logits_processors=self._processors(prompt[:cached_tokens]),
            prompt_cache=cache,
            prefill_step_size=self.report.prefill_step,
            prompt_progress_callback=progress,
        )
        try:
            for response in responses:
                # mlx-lm has fed a token to the model by the time it hands it over, the last one included
                held.append(response.token)
                meter.tick(response.prompt_tps)
                self.text += response.text
                reason = response.finish_reason
                yield printable(response.text)
                if self._stopping:
                    break
                self._upkeep()
        except (_Stopped, GeneratorExit):
            pass
        finally:
            responses.close()
        if reason == "length" and limit != self.max_tokens:
            reason = "context"
        self._cache, self._cached = cache, held
        self.stats = meter.stats(reason or "interrupted")

    def _limit(self, prompt_tokens: int) -> int:
        """The most tokens the answer may have."""
        if prompt_tokens == 0:
            raise empty_prompt()
        room = self.report.context - prompt_tokens
        if room < 1:
            found = f"the prompt takes {prompt_tokens} tokens and the context holds {self.report.context}"
            raise UserError(f"{found}, the answer included", "shorten the prompt, or load with a larger --context")
        return min(room, self.max_tokens or room)

    def _reuse(self, prompt: list[int]) -> int:
        """Makes the cache hold a proper prefix of `prompt`, as long as it can. Returns its length."""
        shared = 0
        for ours, theirs in zip(self._cached, prompt[:-1], strict=False):  # the model needs one token to go on from
            if ours != theirs:
                break
            shared += 1
        excess = len(self._cached) - shared
        if self._cache is not None and shared > 0 and (excess == 0 or trim_prompt_cache(self._cache, excess) == excess):
            self._cached = prompt[:shared]
            return shared
        self._cache, self._cached = make_prompt_cache(self.model), []
        return 0

    def _processors(self, cached: list[int]) -> list[Callable[[mx.array, mx.array], mx.array]]:
        """Changes to the logits [B, V] before sampling: forbidden tokens, and the repetition penalty."""
        forbidden = dict.fromkeys(self.tokenizer.eos_token_ids, -math.inf) if self.sampling.ignore_eos else None
        processors = make_logits_processors(logit_bias=forbidden)
        if self.sampling.repetition_penalty != 1.0:
            (penalize,) = make_logits_processors(
                repetition_penalty=self.sampling.repetition_penalty, repetition_context_size=PENALTY_CONTEXT
            )
            # mlx-lm shows a processor the tokens of this call only; those in the cache count as well
            before = mx.array(cached[-PENALTY_CONTEXT:], dtype=mx.int32)
            processors.append(lambda tokens, logits: penalize(mx.concatenate([before, tokens]), logits))
        return processors


def empty_prompt() -> UserError:
    return UserError("the prompt is empty, expected some text", 'write it as --prompt "...", or --prompt - for stdin')


class Conversation:
    """Messages between a person and a model. `messages` alternates user and assistant; `system` stands before them."""

    def __init__(self, engine: Engine, system: str | None = None):
        self.engine = engine
        self.system = system
        self.messages: list[Message] = []

    def reply(self, text: str, on_progress: Progress | None = None) -> Generator[str, None, None]:
        """The model's answer, piece by piece. An answer that is stopped is kept as far as it went.

        Raises UserError for an empty text and for a conversation that fills the context; nothing has changed then.
        """
        question = {"role": "user", "content": text}
        if not text.strip():
            raise empty_prompt()
        prompt = self.engine.encode([*self._opening(), *self.messages, question])
        context = self.engine.report.context
        if len(prompt) >= context:
            found = f"the conversation with this message takes {len(prompt)} tokens and the context holds {context}"
            raise UserError(found, "/reset starts anew; a larger --context at the start makes room")
        try:
            yield from self.engine.stream(prompt, on_progress)
        finally:
            stats = self.engine.stats
            finished = stats is not None and stats.finish_reason != "interrupted"
            if self.engine.text or finished:
                self.messages += [question, {"role": "assistant", "content": self.engine.text}]

    def reset(self) -> None:
        """Forgets the messages; the system message stays."""
        self.messages = []
        self.engine.forget()

    def _opening(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def save(self, path: Path, overwrite: bool = False) -> None:
        """Writes the conversation as JSON, complete or not at all. Raises UserError, also for a file that exists."""
        content = {
            "format": SAVE_FORMAT,
            "version": SAVE_VERSION,
            "model": self.engine.report.source,
            "system": self.system,
            "messages": self.messages,
        }
        try:
            if not overwrite and path.exists():
                raise UserError(f"{path} exists", f"choose another name, or /save! {path} to overwrite it")
            write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}", "choose a folder that exists") from error

    def load(self, path: Path) -> None:
        """Takes messages and system message from a file of `save`. Raises UserError, with everything as it was."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}", "the conversation is as it was") from error
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
            raise UserError(f"{path} is not a saved conversation: {error}", "the conversation is as it was") from error
        problem = _problem(content)
        if problem:
            raise UserError(f"{path} is not a saved conversation: {problem}", "the conversation is as it was")
        self.system, self.messages = content["system"], content["messages"]


def _problem(content: Any) -> str | None:
    """What is wrong with the content of a saved conversation, or None."""
    if not isinstance(content, dict) or content.get("format") != SAVE_FORMAT:
        return f"expected a JSON object with format {SAVE_FORMAT}"
    if content.get("version") != SAVE_VERSION:
        return f"found version {content.get('version')}, expected {SAVE_VERSION}"
    if not isinstance(content.get("system", 0), (str, type(None))):
        return "expected system to be a text or null"
    messages = content.get("messages")
    if not isinstance(messages, list) or len(messages) % 2:
        return "expected pairs of messages"
    for i, message in enumerate(messages):
        role = "assistant" if i % 2 else "user"
        if not (isinstance(message, dict) and message.keys() == {"role", "content"} and message["role"] == role):
            return f"expected message {i} to be of role {role}"
        if not isinstance(message["content"], str):
            return f"expected the content of message {i} to be a text"
    return None


# --- what the commands share ---


def model_sampling(folder: Path) -> Sampling:
    """The sampling a model asks for in its generation_config.json, less what is out of range; greedy without one."""
    found = _generation_config(folder)
    if found.get("do_sample") is False or not ({"do_sample", "temperature"} & found.keys()):
        return Sampling(repetition_penalty=_usable(found).get("repetition_penalty", 1.0))
    return Sampling(**{"temp": 1.0, **_usable(found)})


def _usable(found: dict[str, Any]) -> dict[str, Any]:
    names = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
    names["repetition_penalty"] = "repetition_penalty"
    values = {name: found.get(key) for key, name in names.items()}
    if not isinstance(values["top_k"], int):
        del values["top_k"]
    return {name: value for name, value in values.items() if _in_range(name, value)}


def _generation_config(folder: Path) -> dict[str, Any]:
    """The content of generation_config.json; {} if there is none that can be read."""
    try:
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such file, or not JSON
        return {}
    return found if isinstance(found, dict) else {}


def add_generation_arguments(parser: argparse.ArgumentParser, max_tokens: str) -> None:
    """--system, --max-tokens (left out: `max_tokens`, in words) and the sampling flags (left out: the model's own)."""
    own = "(default: the model's own, else {})"
    parser.add_argument("--system", metavar="TEXT", help="system message (default: none)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help=f"most tokens of an answer (default: {max_tokens})")
    parser.add_argument("--temp", type=float, metavar="T", help=f"temperature, 0 = greedy {own.format(0)}")
    parser.add_argument("--top-p", type=float, metavar="P", help=f"nucleus sampling {own.format('1 = off')}")
    parser.add_argument("--top-k", type=int, metavar="K", help=f"the K most likely tokens {own.format('0 = off')}")
    parser.add_argument(
        "--min-p", type=float, metavar="P", help=f"least share of the top token {own.format('0 = off')}"
    )
    penalty = f"penalty on the last {PENALTY_CONTEXT} tokens {own.format('1 = off')}"
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help=penalty)
    parser.add_argument(
        "--seed", type=int, metavar="N", help="same seed, same answer (default: a different one each time)"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="do not let the model end an answer (for measuring)")


def check_generation_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for values out of range, before a model is loaded."""
    chosen_sampling(args, Sampling())
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UserError(f"--max-tokens is {args.max_tokens}, expected 1 or more", "leave it out for the default")


def chosen_sampling(args: argparse.Namespace, model: Sampling) -> Sampling:
    """The model's sampling with the flags that were given put over it."""
    given = {name: getattr(args, name) for name in _RANGES if getattr(args, name) is not None}
    return replace(model, **given, ignore_eos=args.ignore_eos)


def open_engine(args: argparse.Namespace) -> Engine:
    """Loads the model of the arguments and says on stderr what was loaded."""
    check_generation_arguments(args)
    loaded = open_model(args.model, runtime_config(args))
    for line in loaded.report.lines():
        note(line)
    sampling = chosen_sampling(args, model_sampling(loaded.report.folder))
    if not loaded.tokenizer.has_chat_template:
        note("this model has no chat template: it continues the text as it stands")
    unused = [flag for flag in ("top_p", "top_k", "min_p") if sampling.temp == 0 and getattr(args, flag) is not None]
    if unused:
        note(f"at temperature 0 (greedy) --{unused[0].replace('_', '-')} has no effect: give --temp as well")
    return Engine(loaded, sampling, args.max_tokens)


class PromptProgress:
    """A line on stderr while a prompt of more than `least` tokens is read; nothing where stderr is no terminal."""

    def __init__(self, least: int) -> None:
        self._least = least
        self._width = 0  # of the line on the screen

    def __call__(self, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        text = f"reading the prompt: {done}/{total} tokens" if done < total and total > self._least else ""
        if text or self._width:
            # two columns more than the line before: the terminal may have put ^C there
            end = "" if text else "\r"
            print(f"\r{text:{self._width + 2}}", end=end, file=sys.stderr, flush=True)
        self._width = len(text)

    def clear(self) -> None:
        """Takes the line off the screen when the prompt was not read to its end."""
        self(0, 0)


def print_answer(pieces: Generator[str, None, None], progress: PromptProgress) -> None:
    """Pieces of an answer to stdout as they come; the line is ended however the answer ends."""
    last = ""
    try:
        with closing(pieces):
            for piece in pieces:
                last = piece or last
                sys.stdout.write(piece)
                sys.stdout.flush()
    finally:
        progress.clear()
        if last and not last.endswith("\n"):
            print(flush=True)


def accept_any_text() -> None:
    """Undecodable input and characters that the terminal's encoding lacks become replacement characters, not errors."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def read_prompt(text: str) -> str:
    """The prompt of --prompt; `-` reads stdin, less one newline at its end. Raises UserError if it is empty."""
    if text == "-":
        text = sys.stdin.read().removesuffix("\n")
    if not text.strip():
        raise empty_prompt()
    return text
