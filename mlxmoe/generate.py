"""`mlxmoe generate [MODEL] --prompt P`: one answer to stdout, what it took to stderr."""

from __future__ import annotations

import argparse
import dataclasses

from mlxmoe.arguments import note, print_json
from mlxmoe.errors import UserError
from mlxmoe.runtime import add_runtime_arguments
from mlxmoe.session import (
    Engine,
    PromptProgress,
    accept_any_text,
    add_generation_arguments,
    open_engine,
    print_answer,
    printable,
    read_prompt,
)

MAX_TOKENS = 512
JSON_STATS = (
    "prompt_tokens",
    "generation_tokens",
    "prompt_tps",
    "decode_tps",
    "ttft_s",
    "peak_memory",
    "finish_reason",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runtime_arguments(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the prompt; - reads it from stdin")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it stands, without the chat template"
    )
    add_generation_arguments(parser, max_tokens=str(MAX_TOKENS))
    parser.add_argument("--json", action="store_true", help="end with one line of JSON: the text and what it took")


def run(args: argparse.Namespace) -> int:
    """Streams the answer to stdout, then its stats: to stderr, and with --json as the last line of stdout."""
    if args.raw and args.system:
        raise UserError("--raw leaves out the chat template, where --system would go", "put the text into the prompt")
    accept_any_text()
    prompt = read_prompt(args.prompt)
    engine = open_engine(args)
    tokens = _encode(engine, prompt, args)
    _set_length(engine, args.max_tokens, len(tokens))
    progress = PromptProgress(engine.report.prefill_step)
    print_answer(engine.stream(tokens, progress), progress)
    stats = engine.stats
    assert stats is not None
    if stats.finish_reason == "context":
        note(f"the context of {engine.report.context} tokens is full: the answer ends here")
    note(stats.line())
    if engine.experts is not None:
        note(engine.experts.line())
    if args.json:
        numbers = dataclasses.asdict(stats)
        print_json(
            {
                "text": printable(engine.text),
                **{name: numbers[name] for name in JSON_STATS},
                "load": engine.report.as_json(),
                "experts": engine.experts.as_json() if engine.experts is not None else None,
            }
        )
    return 0


def _encode(engine: Engine, prompt: str, args: argparse.Namespace) -> list[int]:
    if args.raw:
        return engine.encode_raw(prompt)
    system = [{"role": "system", "content": args.system}] if args.system else []
    return engine.encode([*system, {"role": "user", "content": prompt}])


def _set_length(engine: Engine, asked: int | None, prompt_tokens: int) -> None:
    """A length that was asked for must fit; the default is cut to what the context leaves."""
    context = engine.report.context
    if asked is not None and prompt_tokens < context < prompt_tokens + asked:
        found = (
            f"the prompt takes {prompt_tokens} tokens and --max-tokens {asked} more, and the context holds {context}"
        )
        raise UserError(found, f"--max-tokens {context - prompt_tokens} fits; so does a larger --context")
    engine.max_tokens = asked or MAX_TOKENS
