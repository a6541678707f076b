"""Engine and Conversation: the KV cache, stopping, the context, files; on a scripted model and a trained one."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

import pytest
from scripted_model import FixedCache, ScriptedModel, held, scripted

from mlxmoe.errors import UserError
from mlxmoe.loading import Loaded, RuntimeConfig, open_model
from mlxmoe.session import (
    Conversation,
    Engine,
    Sampling,
    add_generation_arguments,
    check_generation_arguments,
    chosen_sampling,
    model_sampling,
    printable,
)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Loaded:
    return open_model(tiny_model, RuntimeConfig())


def talk(conversation: Conversation, *texts: str) -> list[str]:
    return ["".join(conversation.reply(text)) for text in texts]


def prompt_of(engine: Engine, conversation: Conversation, text: str) -> list[int]:
    return engine.encode([*conversation.messages, {"role": "user", "content": text}])


# --- the cache between turns ---


def test_second_turn_equals_a_fresh_cache(tiny: Loaded) -> None:
    """Greedy tokens of the second turn, from the kept cache and from none, are the same."""
    conversation = Conversation(Engine(tiny, max_tokens=40))
    talk(conversation, "I want to book a table for two in Chicago.")
    prompt = prompt_of(conversation.engine, conversation, "Yes, at 7 pm please.")
    talk(conversation, "Yes, at 7 pm please.")
    fresh = Engine(tiny, max_tokens=40)
    list(fresh.stream(prompt))
    assert conversation.engine.stats is not None
    assert fresh.stats is not None
    assert conversation.engine.stats.cached_tokens > 10
    assert fresh.stats.cached_tokens == 0
    assert fresh.stats.generation_tokens > 5
    assert conversation.engine._cached == fresh._cached
    assert conversation.messages[-1]["content"] == fresh.text


def test_cache_agrees_with_tokens_after_a_stop(tiny: Loaded) -> None:
    """After a stopped answer and a trim, every layer's cache holds as many tokens as the engine believes."""
    conversation = Conversation(Engine(tiny, Sampling(ignore_eos=True), max_tokens=40))
    for n, _ in enumerate(conversation.reply("Tell me a story.")):
        if n == 6:
            conversation.engine.stop()
    engine = conversation.engine
    assert engine.stats is not None
    assert engine.stats.finish_reason == "interrupted"
    assert {c.offset for c in engine._cache or []} == {engine.num_cached_tokens}
    conversation.messages.clear()
    prompt = prompt_of(engine, conversation, "Tell me more.")
    talk(conversation, "Tell me more.")
    fresh = Engine(tiny, engine.sampling, max_tokens=40)
    list(fresh.stream(prompt))
    assert engine.stats.cached_tokens > 3
    assert engine._cached == fresh._cached


def test_only_the_new_suffix_is_read() -> None:
    loaded = scripted({"hi": "hello", "and?": "so"})
    model = loaded.model
    assert isinstance(model, ScriptedModel)
    conversation = Conversation(Engine(loaded))
    assert talk(conversation, "hi") == ["hello"]
    before, suffix = model.num_forwarded, len(loaded.tokenizer.encode("\n<|im_start|>user\nand?<|im_end|>\n"))
    assert talk(conversation, "and?") == ["so"]
    opening, answer = len(loaded.tokenizer.encode("<|im_start|>assistant\n")), len("so") + 1
    assert model.num_forwarded - before == suffix + opening + answer
    assert held(conversation.engine) == conversation.engine._cached


def test_a_cache_that_cannot_go_back_is_extended_or_rebuilt() -> None:
    conversation = Conversation(Engine(scripted({"a": "one", "b": "two", "c": "three"}, cache_type=FixedCache)))
    assert talk(conversation, "a", "b") == ["one", "two"]
    assert conversation.engine.stats is not None
    assert conversation.engine.stats.cached_tokens > 0
    conversation.messages = conversation.messages[:2]
    assert talk(conversation, "c") == ["three"]
    assert conversation.engine.stats.cached_tokens == 0
    assert held(conversation.engine) == conversation.engine._cached


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 6, 7])
def test_cache_is_known_at_every_length(max_tokens: int) -> None:
    engine = Engine(scripted({"q": "12345"}), max_tokens=max_tokens)
    prompt = engine.encode([{"role": "user", "content": "q"}])
    text = "".join(engine.stream(prompt))
    assert text == "12345"[:max_tokens]
    assert held(engine) == engine._cached == prompt + engine.tokenizer.encode("12345<|im_end|>")[:max_tokens]
    assert engine.stats is not None
    assert engine.stats.finish_reason == ("stop" if max_tokens > 5 else "length")
    assert engine.stats.generation_tokens == min(max_tokens, 6)


def test_same_prompt_again_reads_one_token() -> None:
    engine = Engine(scripted({"q": "answer"}))
    prompt = engine.encode([{"role": "user", "content": "q"}])
    assert ["".join(engine.stream(prompt)) for _ in range(2)] == ["answer", "answer"]
    assert engine.stats is not None
    assert engine.stats.cached_tokens == len(prompt) - 1


# --- stopping and failing ---


def test_closing_keeps_the_partial_answer() -> None:
    conversation = Conversation(Engine(scripted({"q": "a long answer", "next": "yes"})))
    pieces = conversation.reply("q")
    assert next(pieces) + next(pieces) + next(pieces) == "a l"
    pieces.close()
    assert conversation.engine.stats is not None
    assert conversation.engine.stats.finish_reason == "interrupted"
    assert conversation.messages[-1] == {"role": "assistant", "content": "a l"}
    assert held(conversation.engine) == conversation.engine._cached != []
    assert talk(conversation, "next") == ["yes"]


def test_stop_at_the_end_of_the_prompt() -> None:
    """The first token is already in the cache when the prompt is reported as read: it is counted, and kept."""
    conversation = Conversation(Engine(scripted({"q": "answer"})))
    engine = conversation.engine
    assert list(conversation.reply("q", lambda done, total: engine.stop() if done == total else None)) == ["a"]
    assert held(engine) == engine._cached
    assert len(held(engine)) == 21


def test_stop_while_the_prompt_is_read() -> None:
    """A message stopped before its answer began is left out; what was read of it stays in the cache."""
    conversation = Conversation(Engine(scripted({"x" * 50: "long", "x" * 50 + "y": "other"}, prefill_step=8)))
    engine = conversation.engine

    def stop_at(done: int, total: int) -> None:
        if done == 24:
            engine.stop()

    assert list(conversation.reply("x" * 50, stop_at)) == []
    assert conversation.messages == []
    assert engine.stats is not None
    assert engine.stats.finish_reason == "interrupted"
    assert len(held(engine)) == 24
    assert held(engine) == engine._cached
    assert talk(conversation, "x" * 50 + "y") == ["other"]
    assert engine.stats.cached_tokens == 24


def test_progress_counts_what_is_left_to_read() -> None:
    engine, seen = Engine(scripted({"q": "a"}, prefill_step=8)), []
    prompt = engine.encode([{"role": "user", "content": "q"}])
    list(engine.stream(prompt, lambda done, total: seen.append((done, total))))
    assert seen == [(0, 20), (8, 20), (16, 20), (19, 20), (20, 20)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_cut_short_drops_the_cache(error: type[BaseException]) -> None:
    """A step that died between two layers leaves a cache that nobody may use; the answer so far is kept."""
    loaded = scripted({"q": "a long answer", "next": "yes"})
    model = loaded.model
    assert isinstance(model, ScriptedModel)
    conversation = Conversation(Engine(loaded))
    talk(conversation, "next")
    model.fail_at, model.error = model.num_forwarded + 25, error
    with pytest.raises(error):
        talk(conversation, "q")
    assert conversation.engine._cache is None
    assert conversation.engine.num_cached_tokens == 0
    assert "a long answer".startswith(conversation.messages[-1]["content"])
    assert len(conversation.messages) == 4
    model.fail_at = None
    assert talk(conversation, "next") == ["yes"]


# --- context, empty and odd input ---


def test_conversation_that_fills_the_context_is_kept() -> None:
    conversation = Conversation(Engine(scripted({"q": "a", "w" * 20: "b"}, context=60)))
    assert talk(conversation, "q") == ["a"]
    kept = list(conversation.messages)
    with pytest.raises(UserError, match=r"takes \d+ tokens and the context holds 60") as error:
        talk(conversation, "w" * 20)
    assert "/reset" in error.value.hint
    assert conversation.messages == kept
    conversation.reset()
    assert talk(conversation, "w" * 20) == ["b"]


def test_answer_ends_where_the_context_does() -> None:
    loaded = scripted({"q": "0123456789" * 3}, context=32)
    conversation = Conversation(Engine(loaded, max_tokens=500))
    (answer,) = talk(conversation, "q")
    engine = conversation.engine
    assert engine.stats is not None
    assert engine.stats.finish_reason == "context"
    assert len(answer) == 32 - engine.stats.prompt_tokens == 12
    assert engine.num_cached_tokens == 32
    assert held(engine) == engine._cached


def test_prompt_that_leaves_no_room_is_refused_and_the_cache_kept() -> None:
    engine = Engine(scripted({"q": "a"}, context=40))
    list(engine.stream(engine.encode([{"role": "user", "content": "q"}])))
    cached = engine.num_cached_tokens
    with pytest.raises(UserError, match="the prompt takes 40 tokens and the context holds 40"):
        list(engine.stream([5] * 40))
    with pytest.raises(UserError, match="empty"):
        list(engine.stream([]))
    assert engine.num_cached_tokens == cached == len(held(engine))
    assert engine.text == ""


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_empty_message_is_refused(text: str) -> None:
    conversation = Conversation(Engine(scripted({})))
    with pytest.raises(UserError, match="empty"):
        talk(conversation, text)
    assert conversation.messages == []


def test_template_that_refuses_is_a_user_error() -> None:
    conversation = Conversation(Engine(scripted({"q": "a"})), system="refuse")
    with pytest.raises(UserError, match="refused the conversation: no system"):
        talk(conversation, "q")
    conversation.system = None
    assert talk(conversation, "q") == ["a"]


def test_without_a_template_the_text_stands_as_it_is() -> None:
    loaded = scripted({}, template=None)
    conversation = Conversation(Engine(loaded, max_tokens=3), system="rules")
    talk(conversation, "once upon")
    assert conversation.engine.stats is not None
    assert conversation.engine.stats.prompt_tokens == len("rules\nonce upon")


def test_lone_surrogates_become_replacement_characters() -> None:
    engine = Engine(scripted({}))
    assert engine.encode_raw("a\udcffb") == engine.encode_raw("a\ufffdb")
    message = {"role": "user", "content": "\ud800"}
    assert engine.encode([message]) == engine.encode([{**message, "content": "\ufffd"}])


# --- what comes out ---


def test_multi_byte_characters_arrive_whole() -> None:
    answer = "h\u00e9llo \u65e5\u672c\u8a9e \U0001f600!"
    engine = Engine(scripted({"q": answer}))
    pieces = list(engine.stream(engine.encode([{"role": "user", "content": "q"}])))
    assert "".join(pieces) == answer
    assert {"\u00e9", " \u65e5", "\u672c", " \U0001f600"} <= set(pieces)


def test_control_characters_are_not_printed_but_remembered() -> None:
    answer = "a\x1b[2Jb\x07\x01c\x9b31m\r\n\td\x7f"
    conversation = Conversation(Engine(scripted({"q": answer, "r": "s"})))
    assert talk(conversation, "q") == ["a[2Jbc31m\n\td"]
    assert conversation.messages[-1]["content"] == answer
    assert talk(conversation, "r") == ["s"]
    assert conversation.engine.stats is not None
    assert conversation.engine.stats.cached_tokens > len(answer)


def test_printable_leaves_nothing_that_drives_a_terminal() -> None:
    kept = "".join(map(chr, [9, 10, *range(32, 127), *range(160, 0x250)]))
    assert printable("".join(map(chr, range(0x250)))) == kept


# --- sampling ---


def sample(loaded: Loaded, sampling: Sampling, max_tokens: int = 24) -> list[int]:
    engine = Engine(loaded, sampling, max_tokens)
    prompt = engine.encode([{"role": "user", "content": "Once upon a time"}])
    list(engine.stream(prompt))
    return engine._cached[len(prompt) :]


def test_same_seed_same_answer(tiny: Loaded) -> None:
    first, again, other = (sample(tiny, Sampling(temp=1.0, seed=s, ignore_eos=True)) for s in (7, 7, 8))
    assert first == again
    assert first != other


def test_ignore_eos_goes_on(tiny: Loaded) -> None:
    ends = tiny.tokenizer.eos_token_ids
    assert sample(tiny, Sampling(), 64)[-1] in ends
    answer = sample(tiny, Sampling(ignore_eos=True), 64)
    assert len(answer) == 64
    assert not ends & set(answer)


def test_top_k_of_one_is_greedy_and_of_everything_is_off(tiny: Loaded) -> None:
    greedy = sample(tiny, Sampling())
    assert sample(tiny, Sampling(temp=1.0, top_k=1, seed=1)) == greedy
    off, everything = (sample(tiny, Sampling(temp=1.0, top_k=k, seed=1, ignore_eos=True)) for k in (0, 10**6))
    assert off == everything != greedy


def test_repetition_penalty_counts_cached_tokens(tiny: Loaded) -> None:
    """The penalty looks back over the start of the prompt, whether it was in the cache or read again."""
    sampling = Sampling(repetition_penalty=1.5, ignore_eos=True)
    kept, fresh = Engine(tiny, sampling, 24), Engine(tiny, sampling, 24)
    prompt = kept.encode([{"role": "user", "content": "the time the time the time the time"}])
    list(kept.stream(prompt))
    list(kept.stream(prompt))
    assert kept.stats is not None
    assert kept.stats.cached_tokens == len(prompt) - 1
    list(fresh.stream(prompt))
    assert kept._cached == fresh._cached
    assert kept._cached[len(prompt) :] != sample_after(tiny, prompt)


def sample_after(loaded: Loaded, prompt: list[int]) -> list[int]:
    engine = Engine(loaded, Sampling(ignore_eos=True), 24)
    list(engine.stream(prompt))
    return engine._cached[len(prompt) :]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temp", -0.1),
        ("temp", math.nan),
        ("temp", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_sampling_out_of_range_is_refused(name: str, value: float) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UserError, match=f"{flag} is {value}, expected"):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"do_sample": True, "temperature": 0.8, "top_p": 0.95}, Sampling(temp=0.8, top_p=0.95)),
        ({"temperature": 0.6, "top_k": 20, "min_p": 0.1}, Sampling(temp=0.6, top_k=20, min_p=0.1)),
        ({"do_sample": True}, Sampling(temp=1.0)),
        ({"do_sample": False, "temperature": 0.8, "repetition_penalty": 1.1}, Sampling(repetition_penalty=1.1)),
        ({"eos_token_id": 2}, Sampling()),
        (
            {"temperature": "hot", "top_p": 7, "top_k": None, "min_p": True, "repetition_penalty": []},
            Sampling(temp=1.0),
        ),
        ({"temperature": 0.5, "top_k": 2.5}, Sampling(temp=0.5)),
        ([1, 2], Sampling()),
        ("{", Sampling()),
    ],
)
def test_sampling_of_the_model(tmp_path: Path, content: object, expected: Sampling) -> None:
    assert model_sampling(tmp_path) == Sampling()  # no such file
    (tmp_path / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert model_sampling(tmp_path) == expected


def test_prefill_step_is_what_is_reserved() -> None:
    """mlx-lm reports progress after every chunk: the chunks are those of the load report."""
    loaded = scripted({}, prefill_step=32)
    seen: list[int] = []
    for _ in Engine(loaded, max_tokens=1).stream(
        [1 + i % 20 for i in range(100)], lambda done, total: seen.append(done)
    ):
        pass
    assert seen[:4] == [0, 32, 64, 96]


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_generation_arguments(parser, max_tokens="512")
    return parser.parse_args(argv)


def test_flags_go_over_the_model() -> None:
    model = Sampling(temp=0.8, top_p=0.95, top_k=20)
    assert chosen_sampling(parse(), model) == model
    chosen = chosen_sampling(parse("--temp", "0", "--top-k", "0", "--seed", "3", "--ignore-eos"), model)
    assert chosen == Sampling(temp=0, top_p=0.95, top_k=0, seed=3, ignore_eos=True)


@pytest.mark.parametrize("argv", [("--max-tokens", "0"), ("--temp", "-1"), ("--top-p", "2")])
def test_flags_out_of_range_are_refused_before_loading(argv: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=argv[0]):
        check_generation_arguments(parse(*argv))


# --- files ---


@pytest.fixture
def spoken() -> Conversation:
    conversation = Conversation(Engine(scripted({"q": "caf\u00e9", "r": "s"})), system="be brief")
    talk(conversation, "q")
    return conversation


def test_save_and_load_go_round(spoken: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    spoken.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text())["model"] == "scripted"
    other = Conversation(Engine(scripted({"r": "s"})))
    other.load(path)
    assert (other.system, other.messages) == ("be brief", spoken.messages)
    assert talk(other, "r") == ["s"]


def test_save_overwrites_only_when_told(spoken: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text("mine")
    with pytest.raises(UserError, match=r"exists") as error:
        spoken.save(path)
    assert "/save!" in error.value.hint
    assert path.read_text() == "mine"
    spoken.save(path, overwrite=True)
    assert json.loads(path.read_text())["messages"] == spoken.messages


def test_save_that_fails_leaves_nothing(spoken: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "talk.json"
    path.write_text("mine")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        spoken.save(path, overwrite=True)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("talk.json", "mine")]


@pytest.mark.parametrize("name", ["no/such/folder/talk.json", "", "x" * 300])
def test_save_to_an_impossible_place(spoken: Conversation, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"cannot write|exists"):
        spoken.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


GOOD = {"format": "mlxmoe-conversation", "version": 1, "system": None, "messages": []}
PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        {**GOOD, "format": "other"},
        {**GOOD, "version": 2},
        {**GOOD, "system": 3},
        {k: v for k, v in GOOD.items() if k != "system"},
        {k: v for k, v in GOOD.items() if k != "messages"},
        {**GOOD, "messages": PAIR[:1]},
        {**GOOD, "messages": PAIR[::-1]},
        {**GOOD, "messages": ["q", "a"]},
        {**GOOD, "messages": [PAIR[0], {"role": "assistant"}]},
        {**GOOD, "messages": [PAIR[0], {"role": "assistant", "content": None}]},
    ],
)
def test_broken_file_keeps_the_conversation(spoken: Conversation, tmp_path: Path, content: object) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    before = (spoken.system, list(spoken.messages))
    with pytest.raises(UserError, match="is not a saved conversation") as error:
        spoken.load(path)
    assert "\n" not in error.value.message
    assert (spoken.system, spoken.messages) == before
    path.write_text(json.dumps({**GOOD, "messages": PAIR}))
    spoken.load(path)
    assert spoken.messages == PAIR


def test_missing_file_keeps_the_conversation(spoken: Conversation, tmp_path: Path) -> None:
    before = list(spoken.messages)
    with pytest.raises(UserError, match="cannot read"):
        spoken.load(tmp_path / "none.json")
    assert spoken.messages == before
