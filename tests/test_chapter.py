"""The chapter's tables: all of them on a toy checkpoint, equal bytes, verdicts, the command."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from toy_checkpoints import write_qwen3

from mlxmoe.bench import chapter
from mlxmoe.bench.chapter import NOT_TESTABLE, TABLES, Bench, Table, cell, claim, falls, markdown
from mlxmoe.bench.simulate import Recipe, Score, Site, Variant
from mlxmoe.errors import UserError
from mlxmoe.formats import MatrixShape

VERDICTS = {"held", "did not hold", "not testable here"}


def score(name: str, kld: float) -> Score:
    return Score(name, 1000, 2.0, kld, 0.001, 10.0, 0.9)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, a text to score and calibration text of two domains."""
    folder = tmp_path_factory.mktemp("chapter")
    model = write_qwen3(
        folder / "model", num_hidden_layers=2, hidden_size=64, moe_intermediate_size=64, num_experts=5, seed=3
    )
    text, calibration = folder / "text.txt", folder / "calibration.jsonl"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    rows = [{"text": f"{domain} and more of the same. " * 40, "domain": domain} for domain in ("code", "math")]
    calibration.write_text("\n".join(map(json.dumps, rows)))
    return {"model": model, "text": text, "calibration": calibration}


def run(inputs: dict[str, Path], *extra: str) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    chapter.add_arguments(parser)
    texts = ["--text", str(inputs["text"]), "--calibration", str(inputs["calibration"])]
    return chapter.run(parser.parse_args([str(inputs["model"]), *texts, *extra]))


def test_quick_makes_every_table(inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "chapter.md"
    assert run(inputs, "--quick", "--output", str(output), "--json") == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [table["name"] for table in printed["tables"]] == list(TABLES)
    assert printed["settings"]["max_tokens"] == 64
    page = output.read_text(encoding="utf-8")
    for table in printed["tables"]:
        assert table["title"] in page
        assert len(table["rows"]) >= 2
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
        assert table["claims"]
        for found in table["claims"]:
            assert found["verdict"] in VERDICTS
            assert f"**{found['verdict']}**: {found['text']}" in page
        if "bits a weight" in table["columns"]:
            by_name = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
            assert all(row["expert bytes"] > 0 for row in by_name.values())
    check_equal_bytes(printed["tables"])


def check_equal_bytes(tables: list[dict[str, Any]]) -> None:
    """What stands against copies is no larger than they are, and hardly smaller."""
    sized = [table for table in tables if table["columns"][1] == "expert bytes"]
    size = {str(row[0]): int(row[1]) for table in sized for row in table["rows"]}
    pairs = [
        ("2 bit, 30 % replicated", "2 bit, the same 30 % at 4"),
        ("2 copies of 2 bit, mean", "1 copy of 4 bit"),
        ("3 copies of 2 bit, mean", "1 copy of 6 bit"),
        *((f"2 bit, replicas by {s}", f"2 bit, bits by {s}") for s in ("random", "frequency", "adaptive", "groups")),
    ]
    for copies, bits in pairs:
        assert 0.9 * size[copies] < size[bits] <= size[copies], (copies, bits)


def test_one_table_to_stdout(inputs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(inputs, "--quick", "--tables", "router") == 0
    printed = capsys.readouterr().out
    assert "### Router at fewer bits" in printed
    assert "### Perplexity" not in printed
    assert "### Not here" in printed


def test_bad_input(inputs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="no table rotation"):
        run(inputs, "--quick", "--tables", "rotation")
    with pytest.raises(UserError, match="no table asked for"):
        run(inputs, "--quick", "--tables", "")
    with pytest.raises(UserError, match="no calibration file"):
        run({**inputs, "calibration": Path("nowhere")}, "--quick")
    with pytest.raises(UserError, match="--calibration-tokens is 0, expected 1 or more"):
        run(inputs, "--calibration-tokens", "0")
    with pytest.raises(UserError, match="--max-tokens is -1"):
        run(inputs, "--quick", "--max-tokens", "-1")
    with pytest.raises(UserError, match="there is no folder nowhere"):
        run(inputs, "--quick", "--output", "nowhere/chapter.md")
    with pytest.raises(UserError, match="--resume needs a file"):
        run(inputs, "--quick", "--resume")


def test_goes_on_where_it_was_stopped(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tables that are done are not made again; the page that was there stays until the new one is whole."""
    given = ["--quick", "--tables", "classes,router", "--output", str(tmp_path / "c.md")]
    assert run(inputs, *given) == 0
    whole = (tmp_path / "c.md").read_bytes()
    (tmp_path / "c.md").write_text("older")

    def stop(bench: Bench) -> Table:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setitem(TABLES, "router", stop)
        with pytest.raises(KeyboardInterrupt):
            run(inputs, *given)
    assert "c.md.partial keeps what is done" in capsys.readouterr().err
    assert (tmp_path / "c.md").read_text() == "older"
    with pytest.raises(UserError, match="started with other max_tokens"):
        run(inputs, *given, "--max-tokens", "32", "--resume")
    monkeypatch.setitem(TABLES, "classes", stop)  # nothing is done again
    assert run(inputs, *given, "--resume") == 0
    assert (tmp_path / "c.md").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["c.md"]


def test_verdicts() -> None:
    assert falls("it helps", score("a", 0.3), score("b", 0.2), score("c", 0.1)).verdict == "held"
    assert falls("it helps", score("a", 0.3), score("b", 0.3)).verdict == "did not hold"
    assert falls("it helps", score("a", 0.3), score("b", 0.2), score("c", 0.25)).verdict == "did not hold"
    assert claim("it helps", None, "nothing to see").verdict == "not testable here"
    assert "KLD a 0.3000, b 0.2000" in falls("it helps", score("a", 0.3), score("b", 0.2)).evidence


def test_the_page() -> None:
    assert [cell(v) for v in (1234567, 0.25, 4321.5, float("nan"), "x")] == ["1,234,567", "0.2500", "4321.5", "-", "x"]
    page = markdown([Table("t", "A title", ("a", "b"), [("x", 1)], [claim("it holds", True, "1 > 0")])])
    assert page.startswith("### A title\n\n| a | b |\n|---|---|\n| x | 1 |\n\n- **held**: it holds. 1 > 0.\n")
    assert all(found.text in page for found in NOT_TESTABLE)


# -- which experts ----------------------------------------------------------------------------------------------------


def simulation_of(layers: int, experts: int, columns: int = 64) -> SimpleNamespace:
    """Sites and statistics with frequencies that rise with the expert's number; one shared expert a layer."""
    shapes = tuple(MatrixShape(name, columns, columns, 64) for name in ("gate_proj", "up_proj", "down_proj"))
    sites, statistics = [], {}
    for layer in range(layers):
        for shared in (False, True):
            count = 1 if shared else experts
            site = Site(f"layers.{layer}.{'shared' if shared else 'experts'}", layer, count, shared, shapes)
            sites.append(site)
            frequency = np.ones(1) if shared else np.arange(experts) / experts
            statistics[site.path] = SimpleNamespace(
                frequency=frequency,
                massive=np.zeros(count),
                concentration=np.linspace(1, 0, count),
                moments={
                    s.name: SimpleNamespace(
                        hessian=np.stack([np.eye(columns)] * count), row_weights=np.ones((count, columns))
                    )
                    for s in shapes
                },
            )
    weights = np.random.default_rng(0).standard_normal((experts, columns, columns)).astype(np.float32)
    return SimpleNamespace(
        sites=sites,
        statistics=statistics,
        weight=lambda site, name: weights[: site.num_experts],
        values=lambda site, shape, recipe, bits: np.round(weights[: site.num_experts]),
    )


def test_replication_keeps_its_budget_and_its_groups() -> None:
    simulation = simulation_of(2, 10)
    for strategy in ("random", "frequency", "sensitivity", "mixed"):
        copies = chapter.replication(simulation, strategy)  # type: ignore[arg-type]
        assert [int(copies[s.path].sum()) for s in simulation.sites] == [13, 3, 13, 3]
    by_frequency = chapter.replication(simulation, "frequency")  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.flatnonzero(by_frequency["layers.0.experts"] == 2), [7, 8, 9])
    adaptive = chapter.replication(simulation, "adaptive")  # type: ignore[arg-type]
    assert all(11 <= adaptive[f"layers.{i}.experts"].sum() <= 14 for i in range(2))
    # frequencies 0, 0.1 ... 0.9: above 0.1 frequent; the first two have domains above 0.7
    groups = chapter.replication(simulation, "groups")  # type: ignore[arg-type]
    np.testing.assert_array_equal(groups["layers.0.experts"], [2] * 10)
    simulation.statistics["layers.0.experts"].concentration[:] = 0.5
    groups = chapter.replication(simulation, "groups")  # type: ignore[arg-type]
    np.testing.assert_array_equal(groups["layers.0.experts"], [1, 1, *[2] * 8])


def test_the_same_bytes_as_bits() -> None:
    variant = chapter.same_bytes("v", {"a": np.array([1, 2, 3])})
    np.testing.assert_array_equal(variant.bits["a"], [2, 4, 6])


def test_replicas_differ_in_rotation_or_in_their_grids() -> None:
    plain = chapter.replicated("v", {})
    assert [r.shift for r in plain.recipes(3)] == [0, 0.5, -0.5]
    turned = chapter.replicated("v", {}, ("random",))
    assert [(r.rotation, r.seed) for r in turned.recipes(3)] == [("random", 0), ("random", 1), ("random", 2)]
    named = chapter.replicated("v", {}, ("dfrot-200", "dfrot-100", "dfrot-50"))
    assert [r.rotation for r in named.recipes(3)] == ["dfrot-200", "dfrot-100", "dfrot-50"]


def test_a_variant_is_scored_once() -> None:
    calls = []

    def scored(variant: Variant) -> Score:
        calls.append(variant.name)
        return score(variant.name, 0.1)

    bench = Bench(SimpleNamespace(score=scored))  # type: ignore[arg-type]
    assert bench.score(Variant("a")) is bench.score(Variant("a", Recipe()))
    assert list(bench.rows([Variant("a"), Variant("b")])) == ["a", "b"]
    assert calls == ["a", "b"]


@pytest.mark.parametrize(("columns", "expected"), [(64, "dfrot-200"), (192, "block-hadamard-64"), (96, "random")])
def test_widths_that_a_rotation_does_not_fit(columns: int, expected: str) -> None:
    bench = Bench(simulation_of(1, 2, columns))  # type: ignore[arg-type]
    assert chapter.best_rotation(bench) == expected


def test_classes_of_experts() -> None:
    simulation = simulation_of(1, 11)
    routed, shared = simulation.sites
    counts = [
        int(chapter._in_class(simulation, routed, name).sum()) for name in ("shared", "frequent", "other", "rare")
    ]  # type: ignore[arg-type]
    assert counts == [0, 3, 5, 3]
    assert chapter._in_class(simulation, shared, "shared").tolist() == [True]  # type: ignore[arg-type]
    assert chapter._in_class(simulation, routed, "frequent").tolist() == [False] * 8 + [True] * 3  # type: ignore[arg-type]
