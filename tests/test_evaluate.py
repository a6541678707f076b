"""mlxmoe eval: the scores against numpy and scipy in float64, the choice of text, and what bad input says."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from scipy.special import log_softmax as scipy_log_softmax
from scipy.special import rel_entr

from mlxmoe import evaluate as ev
from mlxmoe.bench.checkpoint import CheckpointShape, write_checkpoint
from mlxmoe.cli import main
from mlxmoe.errors import UserError

V = 37


class Letters:
    """A tokenizer of single characters: 'a' is 1, 'b' is 2, ...; 0 is the begin token, used if `bos`."""

    bos_token_id = 0

    def __init__(self, bos: bool = False, size: int = V):
        self.bos = bos
        self.size = size

    def encode(self, text: str, verbose: bool = True) -> list[int]:
        return [0] * self.bos + [ord(c) - 96 for c in text]

    def get_vocab(self) -> dict[str, int]:
        return {chr(96 + i): i for i in range(self.size)}

    def __len__(self) -> int:
        return self.size


class Bigram:
    """Logits that depend on the last token only, much alike for all seeds; remembers its largest batch."""

    def __init__(self, seed: int, vocabulary: int = V):
        common = np.random.default_rng(0).standard_normal((V, vocabulary))
        own = np.random.default_rng(seed).standard_normal((V, vocabulary))
        self.table = (3 * common + own).astype(np.float32)
        self.largest = 0

    def __call__(self, tokens: mx.array) -> mx.array:
        self.largest = max(self.largest, tokens.size)
        return mx.array(self.table)[tokens]


def numpy_scores(model: Bigram, reference: Bigram, windows: list[list[int]]) -> dict[str, np.ndarray]:
    """The same numbers, one position after the other in float64."""
    log_q = scipy_log_softmax(model.table.astype(np.float64), axis=-1)
    log_p = scipy_log_softmax(reference.table.astype(np.float64), axis=-1)
    pairs = [(now, then) for window in windows for now, then in itertools.pairwise(window)]
    return {
        "nll": np.array([-log_q[now, then] for now, then in pairs]),
        "nll_reference": np.array([-log_p[now, then] for now, then in pairs]),
        "kld": np.array([rel_entr(np.exp(log_p[now]), np.exp(log_q[now])).sum() for now, _ in pairs]),
        "agree": np.array([log_p[now].argmax() == log_q[now].argmax() for now, _ in pairs]),
    }


def some_windows() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, V, n).tolist() for n in (2, 9, 9, 31, *[9] * 7, 33, 2)]


@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
@pytest.mark.parametrize("chunk_logits", [1, 7 * V, 1 << 24])
def test_scores_equal_numpy(monkeypatch: pytest.MonkeyPatch, batch_tokens: int, chunk_logits: int) -> None:
    monkeypatch.setattr(ev, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(ev, "CHUNK_LOGITS", chunk_logits)
    model, reference, windows = Bigram(1), Bigram(2), some_windows()
    scores = ev.score_windows(model, reference, windows)
    for name, expected in numpy_scores(model, reference, windows).items():
        # float32 sums over 37 entries of size up to about 10
        np.testing.assert_allclose(getattr(scores, name), expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert scores.window.tolist() == [i for i, w in enumerate(windows) for _ in w[1:]]
    assert model.largest <= max(batch_tokens, max(len(w) for w in windows))


def test_summary_equals_numpy() -> None:
    model, reference, windows = Bigram(1), Bigram(2), some_windows()
    expected = numpy_scores(model, reference, windows)
    result = ev.summarise(ev.score_windows(model, reference, windows))
    assert result["tokens"] == len(expected["kld"])
    assert result["windows"] == len(windows)
    assert result["kld_mean"] == pytest.approx(expected["kld"].mean(), rel=1e-5)
    assert result["kld_median"] == pytest.approx(np.median(expected["kld"]), rel=1e-5)
    assert result["kld_p95"] == pytest.approx(np.quantile(expected["kld"], 0.95), rel=1e-5)
    assert result["kld_p99"] == pytest.approx(np.quantile(expected["kld"], 0.99), rel=1e-5)
    assert result["top1_agreement"] == expected["agree"].mean()
    assert 0 < result["top1_agreement"] < 1
    assert result["ppl"] == pytest.approx(math.exp(expected["nll"].mean()), rel=1e-5)
    assert result["ppl_reference"] == pytest.approx(math.exp(expected["nll_reference"].mean()), rel=1e-5)


def test_the_reference_is_p_not_q() -> None:
    p, q = np.array([0.9, 0.1]), np.array([0.5, 0.5])
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert ev.kl_divergence(mx.array(np.log(p)), mx.array(np.log(q))).item() == pytest.approx(expected, rel=1e-5)


def test_a_token_of_zero_probability_adds_nothing() -> None:
    log_p = mx.array([0.0, -float("inf")])
    log_q = mx.array([math.log(0.5), -float("inf")])
    assert ev.kl_divergence(log_p, log_q).item() == pytest.approx(math.log(2), rel=1e-6)


def test_a_model_is_exactly_its_own_reference() -> None:
    scores = ev.score_windows(Bigram(3), Bigram(3), some_windows())
    assert scores.kld is not None
    assert scores.agree is not None
    assert not scores.kld.any()
    assert scores.agree.all()


def test_without_a_reference_only_the_models_own_numbers() -> None:
    result = ev.evaluate(Bigram(1), Letters(), [ev.Text("t", ["abcabc"])])
    assert set(result) == {"tokens", "windows", "ppl", "window", "seconds", "texts"}


def test_standard_error_takes_windows_as_the_units() -> None:
    window = np.repeat(np.arange(50), 20)
    shared = np.random.default_rng(0).standard_normal(50)
    # positions of a window all alike: as much as 50 independent values, not 1000
    assert ev.standard_error(shared[window], window) == pytest.approx(np.std(shared, ddof=1) / math.sqrt(50))
    assert ev.standard_error(shared, np.zeros(50, int)) is None


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("window", [2, 3, 7, 100])
@pytest.mark.parametrize("length", [0, 1, 2, 6, 7, 8, 30])
def test_windows_predict_every_token_but_the_first_once(length: int, window: int, bos: int | None) -> None:
    tokens = list(range(length))
    windows = ev.cut_windows(tokens, window, bos)
    assert [t for w in windows for t in w[1:]] == tokens[1:]
    assert all(2 <= len(w) <= window for w in windows)
    assert all(w[0] == (w[1] - 1 if bos is None else bos) for w in windows)


def test_a_limited_choice_is_exact_spread_and_repeatable() -> None:
    documents = [chr(97 + i) * 50 for i in range(20)]
    chosen = ev.choose_windows(documents, Letters(), 11, 95)
    assert sum(len(w) - 1 for w in chosen) == 95
    assert len({w[0] for w in chosen}) == 10  # a window of ten different documents
    assert chosen == ev.choose_windows(documents, Letters(), 11, 95)


def test_no_limit_takes_everything() -> None:
    chosen = ev.choose_windows(["abcdefgh", "xyz", "q"], Letters(), 4, None)
    assert sorted(len(w) - 1 for w in chosen) == [1, 2, 3, 3]


def test_a_begin_token_opens_every_window() -> None:
    chosen = ev.choose_windows(["abcdefgh"], Letters(bos=True), 4, None)
    assert [w[0] for w in chosen] == [0, 0, 0]
    assert sorted(t for w in chosen for t in w[1:]) == list(range(1, 9))


def test_texts_share_the_tokens_evenly() -> None:
    texts = [ev.Text("a", ["abc" * 100]), ev.Text("b", ["xyz" * 100]), ev.Text("short", ["hello"])]
    result = ev.evaluate(Bigram(1), Letters(), texts, Bigram(2), ev.EvalConfig(max_tokens=100, window=16))
    assert [(t["name"], t["tokens"]) for t in result["texts"]] == [("a", 34), ("b", 33), ("short", 4)]
    assert result["tokens"] == 71
    mean = sum(t["kld_mean"] * t["tokens"] for t in result["texts"]) / 71
    assert result["kld_mean"] == pytest.approx(mean)


def test_padded_vocabularies_are_compared_on_the_common_part() -> None:
    padded = Bigram(2, vocabulary=V + 3)
    cut = Bigram(2)
    cut.table = padded.table[:, :V]
    texts = [ev.Text("t", ["abcdefghijkl"])]
    for one, other, one_cut, other_cut in ((Bigram(1), padded, Bigram(1), cut), (padded, Bigram(1), cut, Bigram(1))):
        result = ev.evaluate(one, Letters(), texts, other, reference_tokenizer=Letters())
        expected = ev.evaluate(one_cut, Letters(), texts, other_cut)
        assert result["kld_mean"] == expected["kld_mean"] > 0
    with pytest.raises(UserError, match=f"has {V} entries, that of the reference {V + 3}"):
        ev.evaluate(Bigram(1), Letters(), texts, padded)


def test_what_cannot_be_compared() -> None:
    texts = [ev.Text("t", ["abcabc"])]
    with pytest.raises(UserError, match=r"tokenizer \(37 tokens\) and the reference's \(36 tokens\) differ"):
        ev.evaluate(Bigram(1), Letters(), texts, Bigram(2), reference_tokenizer=Letters(size=36))
    with pytest.raises(UserError, match=r"holds token 26, but the model's vocabulary has 20 entries"):
        ev.evaluate(Bigram(1, vocabulary=20), Letters(), [ev.Text("t", ["zzz"])])
    broken = Bigram(2)
    broken.table[3, 5] = np.nan
    with pytest.raises(RuntimeError, match="nll_reference is not finite at 1 of 5 positions"):
        ev.evaluate(Bigram(1), Letters(), texts, broken)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ev.EvalConfig(window=1), "a window of 1 tokens predicts nothing"),
        (ev.EvalConfig(max_tokens=-1), "-1 tokens cannot be shared by 2 texts"),
        (ev.EvalConfig(max_tokens=1), "1 tokens cannot be shared by 2 texts"),
    ],
)
def test_settings_that_make_no_sense(config: ev.EvalConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ev.evaluate(Bigram(1), Letters(), [ev.Text("a", ["abc"]), ev.Text("b", ["abc"])], config=config)


def test_a_text_of_one_token_and_no_text() -> None:
    with pytest.raises(UserError, match="t is too short"):
        ev.evaluate(Bigram(1), Letters(), [ev.Text("t", ["a"])])
    with pytest.raises(UserError, match="there is no text to score"):
        ev.evaluate(Bigram(1), Letters(), [])


def test_reading_text(tmp_path: Path) -> None:
    jsonl = tmp_path / "a.jsonl"
    # U+2028 may stand in a JSON string as it is; it does not end a line
    jsonl.write_text('{"text": "one\u2028line", "domain": "x"}\n\n{"text": ""}\n{"text": "two"}\n', encoding="utf-8")
    assert ev.read_text(jsonl).documents == ["one\u2028line", "two"]
    plain = tmp_path / "a.txt"
    plain.write_text("first\nsecond\n", encoding="utf-8")
    assert ev.read_text(plain).documents == ["first\nsecond\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"text": "fine"}\n\n{"body": "x"}\n', "a.jsonl line 3 has no text under the key text"),
        ("a.jsonl", b'["text"]\n', "a.jsonl line 1 has no text under the key text"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl line 1 has no text under the key text"),
        ("a.jsonl", b'{"text": " "}\n', "a.jsonl holds no text"),
        ("a.txt", b" \n", "a.txt holds no text"),
        ("a.txt", b"ok \xff", "a.txt is not UTF-8 text: invalid start byte at byte 3"),
    ],
)
def test_bad_text_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        ev.read_text(tmp_path / name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "model"
    write_checkpoint(folder, CheckpointShape())
    return folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": "It was the best of times. " * 9}) + "\n", encoding="utf-8")
    return path


def test_command_on_a_checkpoint(checkpoint: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = text_file.with_suffix(".txt")
    other.write_text("A plain file.", encoding="utf-8")
    arguments = ["eval", str(checkpoint), "--reference", str(checkpoint), "--text", str(text_file), str(other)]
    assert main([*arguments, "--window", "64", "--max-tokens", "100", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["bytes"] == sum(p.stat().st_size for p in checkpoint.iterdir())
    assert result["tokens"] == 50 + len("A plain file.") - 1
    assert result["kld_mean"] == result["kld_p99"] == 0.0
    assert result["top1_agreement"] == 1.0
    assert result["ppl"] == result["ppl_reference"]
    assert 1 < result["ppl"] < 1e6
    assert [Path(t["name"]).name for t in result["texts"]] == ["t.jsonl", "t.txt"]
    assert "eval: 100%" in err
    assert "KLD mean" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "missing.jsonl"], "there is no text file missing.jsonl"),
        (["--text", "{text}", "--window", "2049"], "the window of 2049 tokens is longer than the context"),
    ],
)
def test_command_errors(
    checkpoint: Path, text_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["eval", str(checkpoint), *(a.replace("{text}", str(text_file)) for a in arguments)]) == 2
    err = capsys.readouterr().err
    assert f"error: {message}" in err
    assert "hint: " in err


def test_a_window_beyond_the_reserved_context(
    checkpoint: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = ev.open_model(checkpoint)
    small = loaded._replace(report=replace(loaded.report, context=100))
    monkeypatch.setattr(ev, "open_model", lambda source, config: small)
    assert main(["eval", str(checkpoint), "--text", str(text_file), "--window", "101"]) == 2
    assert "the window of 101 tokens is longer than the context of 100" in capsys.readouterr().err
