"""Ranking scores by measured divergences: correlations against SciPy, scores written out, the command on a toy model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import kendalltau, rankdata, spearmanr
from toy_checkpoints import write_qwen3

from mlxmoe.bench.ranking import correlation, kendall, ranks, spearman
from mlxmoe.bench.sensitivity import (
    Item,
    Measurement,
    SensitivityConfig,
    _by_tokens,
    _Rows,
    bench,
    read_tokens,
    report_lines,
    scaled_by_layer,
    stratified,
    summarise,
)
from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.cli import main
from mlxmoe.convert.scores import Observed
from mlxmoe.convert.stream import Record
from mlxmoe.convert.tokens import read_tokenizer
from mlxmoe.errors import UserError


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_scipys(ties: bool) -> None:
    random = np.random.RandomState(0)
    for n in (2, 5, 40):
        x, y = random.standard_normal((2, n))
        y += x
        if ties:
            x, y = np.round(x), np.round(y)
        np.testing.assert_allclose(ranks(x), rankdata(x) - 1)
        if len(set(x)) > 1 and len(set(y)) > 1:
            assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
            assert kendall(x, y) == pytest.approx(kendalltau(x, y).statistic)
    assert spearman(np.ones(4), np.arange(4)) == kendall(np.ones(4), np.arange(4)) == 0


def test_interval_holds_the_value_and_narrows() -> None:
    random = np.random.RandomState(1)
    widths = []
    for n in (20, 200):
        x = random.standard_normal(n)
        found = correlation(spearman, x, x + random.standard_normal(n))
        assert found.low < found.value < found.high
        widths.append(found.high - found.low)
    assert widths[1] < 0.6 * widths[0]


def test_sample_goes_from_rare_to_frequent() -> None:
    tokens = np.array([5, 0, 9, 9, 3, 7])
    assert stratified(tokens, 2).tolist() == [1, 3]  # of the two most frequent the later one
    assert stratified(tokens, 3).tolist() == [0, 1, 3]
    assert stratified(tokens, 99).tolist() == list(range(6))


def test_scores_of_single_tokens_are_the_written_out_sums() -> None:
    """Two projections, three experts of which two are sampled, records in any order."""
    random = np.random.RandomState(0)
    experts, chosen, total = np.array([0, 2]), random.randint(0, 3, 50), 40
    kept, batches = [], []
    for _ in range(2):
        rows = _Rows(experts)
        x, g = random.standard_normal((2, 50, 4)).astype(np.float32)
        for part in (slice(0, 20), slice(20, 50)):
            rows.add(Record(x[part], g[part], chosen[part], g[part]))
        kept.append(rows)
        batches.append((x.astype(np.float64), g.astype(np.float64)))
    differences = {(p, 0): random.standard_normal((2, 4, 4)).astype(np.float32) for p in range(2)}
    tokens = np.bincount(chosen, minlength=3)
    nothing = np.zeros(0)
    observed = Observed(nothing, nothing, nothing, tokens, nothing, nothing, total)
    single, whole = _by_tokens(differences, kept, observed, experts, 1)
    for k, e in enumerate(experts):
        orders = []
        for p, (x, g) in enumerate(batches):
            d = differences[p, 0][k].astype(np.float64)
            order = np.array([g[t] @ d @ x[t] for t in range(50) if chosen[t] == e])
            squares = sum(np.outer(g[t] ** 2, x[t] ** 2) for t in range(50) if chosen[t] == e)
            assert single["taylor"][p, k, 0] == pytest.approx(abs(order.sum()) / total, rel=1e-4)
            assert single["fisher-token"][p, k, 0] == pytest.approx((order**2).sum() / 2 / total, rel=1e-4)
            assert single["diagonal"][p, k, 0] == pytest.approx((squares * d**2).sum() / 2 / total, rel=1e-4)
            orders.append(order)
        together = orders[0] + orders[1]
        assert whole["taylor"][0, k, 0] == pytest.approx(abs(together.sum()) / total, rel=1e-4)
        assert whole["fisher-token"][0, k, 0] == pytest.approx((together**2).sum() / 2 / total, rel=1e-4)


def test_interval_of_strata_keeps_items_in_their_own() -> None:
    """Resampled among themselves, strata of constant values keep every resample the same."""
    values = np.repeat([1.0, 2.0, 5.0], [3, 4, 2])
    found = correlation(lambda x, y: float(x.sum()), values, values, [3, 4, 2])
    assert found == (21.0, 21.0, 21.0)
    assert correlation(lambda x, y: float(x.sum()), values, values).low < 21.0


def test_scaled_by_the_others_of_the_layer() -> None:
    loss, kld = np.array([1.0, 2.0, 4.0, 1.0, 3.0]), np.array([2.0, 4.0, 8.0, 9.0, 10.0])
    found = scaled_by_layer(loss, kld, np.array([0, 0, 0, 1, 1]))
    np.testing.assert_allclose(found, [1 * 12 / 6, 2 * 10 / 5, 4 * 6 / 3, 1 * 10 / 3, 3 * 9 / 1])


def measurement(k: int, kld: float, projections: tuple[int, ...] = (0, 1)) -> Measurement:
    return Measurement(Item(k % 2, k, projections, 2), {"fisher": 2.0 * kld, "other": -kld}, kld, 0.4 * kld + 0.1)


@pytest.mark.usefixtures("few_resamples")
def test_summary_counts_clear_ones_and_sorts() -> None:
    found = [measurement(k, float(k)) for k in range(8)] + [measurement(k, 1.0 + k, (0,)) for k in range(8)]
    experts, matrices = summarise(found)
    assert (experts.kind, experts.level, experts.items, experts.median) == ("experts", 2, 8, 3.5)
    assert experts.ratios == {0: 2.0, 1: 2.0}
    assert experts.clear == 6  # k > 2 (0.4 k + 0.1)
    assert matrices.kind == "matrices"
    assert {r.score for r in experts.rankings[:2]} == {"fisher", "fisher*layer"}
    assert [r.spearman.value for r in experts.rankings] == [pytest.approx(v) for v in (1, 1, -1)]
    assert [r.within.value for r in experts.rankings] == [pytest.approx(v) for v in (1, 1, -1)]
    assert any("8 experts alone at 2 bits: median KLD 3.5, 6 of them above" in line for line in report_lines([experts]))


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sensitivity")
    write_qwen3(folder / "model", num_hidden_layers=2, hidden_size=64, moe_intermediate_size=64, num_experts=4)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    (folder / "calibration.txt").write_text("experts of a layer are chosen by its router for every token. " * 40)
    return {name: str(folder / name) for name in ("model", "text.txt", "calibration.txt")}


SMALL = SensitivityConfig(experts=5, levels=(2, 4), max_tokens=128, calibration_tokens=256, window=64)


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals are not looked at closely."""
    monkeypatch.setattr("mlxmoe.bench.ranking._RESAMPLES", 20)


@pytest.mark.usefixtures("few_resamples")
def test_command(inputs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Also that nothing is drawn anew: the function and the command give the same divergences and scores."""
    sizes = ["--experts", "5", "--level", "4,2", "--max-tokens", "128", "--calibration-tokens", "256", "--window", "64"]
    more = ["--text", inputs["text.txt"], "--calibration", inputs["calibration.txt"], "--json", *sizes]
    assert main(["bench", "sensitivity", inputs["model"], *more]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    rows = result["measurements"]
    again = bench(inputs["model"], [inputs["text.txt"]], inputs["calibration.txt"], SMALL, quiet=True)
    assert [row["kld"] for row in rows] == [m.kld for m in again]
    assert [row["fisher-token"] for row in rows] == [m.scores["fisher-token"] for m in again]
    assert len(rows) == 5 * 2 * 2
    assert {row["layer"] for row in rows} == {0, 1}
    assert {(row["level"], len(row["projections"])) for row in rows} == {(2, 1), (2, 3), (4, 1), (4, 3)}
    by_item = {(r["layer"], r["expert"], tuple(r["projections"]), r["level"]): r for r in rows}
    for (layer, expert, projections, level), row in by_item.items():
        assert row["kld"] > 0
        if level == 2:
            better = by_item[layer, expert, projections, 4]
            assert better["kld"] < row["kld"]
            assert better["fisher"] < row["fisher"]
            assert better["frequency"] == row["frequency"]
            assert better["removal"] == row["removal"] > better["kld"]
    groups = result["groups"]
    assert [(g["kind"], g["level"]) for g in groups] == [(k, n) for n in (2, 4) for k in ("experts", "matrices")]
    names = {r["score"] for r in groups[0]["rankings"]}
    assert names == {
        *("fisher", "fisher-token", "diagonal", "taylor", "output", "weight", "frequency", "frequency*error", "mix"),
        *("mix*error", "reap", "contribution", "ablation", "removal", "contribution*removal", "fisher*layer"),
    }
    for ranking in groups[0]["rankings"]:
        value, low, high = ranking["spearman"]
        assert -1 <= low <= high <= 1
        assert any(line.startswith(f"| {ranking['score']} | {value:.2f} (") for line in lines)


def test_texts_share_the_tokens(inputs: dict[str, str]) -> None:
    tokenizer = read_tokenizer(open_checkpoint(inputs["model"]))
    found = read_tokens([inputs["text.txt"], inputs["calibration.txt"]], tokenizer, 256, 64, 0)
    assert found.shape == (4, 64)
    assert "fox" in tokenizer.decode(found[:2].reshape(-1).tolist())
    assert "router" in tokenizer.decode(found[2:].reshape(-1).tolist())


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--experts", "3"], "--experts 3 are too few to rank"),
        (["--level", "5"], "the levels 5 are not all among"),
        (["--window", "0"], "a window of 0 tokens predicts nothing"),
        (["--seed", "-1"], "--seed -1 is not between 0 and"),
        (["--level", "two"], "--level 'two' is no list of numbers"),
        (["--max-tokens", "10"], "a window takes 256 tokens"),
        (["--max-tokens", "256"], "the text gives one window of 256 tokens"),
        (["--text", "nowhere.txt"], "nowhere.txt cannot be read as text"),
    ],
)
def test_bad_input(more: list[str], expected: str, inputs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["--text", inputs["text.txt"], "--calibration", inputs["calibration.txt"]]
    assert main(["bench-sensitivity", inputs["model"], *texts, *more]) == 2
    assert expected in capsys.readouterr().err


def test_config_is_checked() -> None:
    with pytest.raises(UserError, match="not all among"):
        SensitivityConfig(levels=())
