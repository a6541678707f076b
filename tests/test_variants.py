"""Variants from a file: every field reaches the simulation, everything wrong is named, the example of the docs runs."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from toy_checkpoints import write_architecture

from mlxmoe.bench import variants
from mlxmoe.bench.simulate import Recipe, Simulation, Site, Variant
from mlxmoe.bench.variants import Entry, build, read_config
from mlxmoe.errors import UserError
from mlxmoe.evaluate import Text
from mlxmoe.formats import MatrixShape

DOCS = Path(__file__).resolve().parents[1] / "docs"
SENTENCE = "the quick brown fox jumps over the lazy dog. "


def write_config(folder: Path, text: str) -> Path:
    path = folder / "variants.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model with a shared expert, a text to score and one to calibrate by."""
    folder = tmp_path_factory.mktemp("variants")
    changes = {"hidden_size": 64, "moe_intermediate_size": 64}
    model = write_architecture(folder / "model", "deepseek_v3", mx.float32, **changes)
    text, calibration = folder / "text.txt", folder / "calibration.jsonl"
    text.write_text(SENTENCE * 20)
    rows = [{"text": f"{domain} and more of the same. " * 30, "domain": domain} for domain in ("code", "math")]
    calibration.write_text("\n".join(map(json.dumps, rows)))
    return SimpleNamespace(model=model, text=text, calibration=calibration)


@pytest.fixture(scope="module")
def simulation(inputs: SimpleNamespace) -> Simulation:
    return Simulation(inputs.model, [Text("t", [SENTENCE * 20])], inputs.calibration, 32, 64, window=32)


def run(inputs: SimpleNamespace, config: Path, *more: str) -> int:
    parser = argparse.ArgumentParser()
    variants.add_arguments(parser)
    given = [str(inputs.model), "--config", str(config), "--text", str(inputs.text)]
    given += ["--calibration", str(inputs.calibration), "--max-tokens", "32", "--calibration-tokens", "64"]
    return variants.run(parser.parse_args([*given, "--window", "32", *more]))


# -- the file ----------------------------------------------------------------------------------------------------------


def test_every_field_of_a_recipe_and_a_variant(tmp_path: Path) -> None:
    """The file's keys are the fields: a new field that the file cannot say fails here."""
    known = set(variants._KEYS) | {"name"}
    assert set(Recipe.__dataclass_fields__) <= known
    assert set(Variant.__dataclass_fields__) - {"recipe"} <= known
    config = write_config(
        tmp_path,
        """
        defaults = { group_size = 64 }
        [[variant]]
        name = "all"
        bits = { routed = 3, shared = 4 }
        affine = true
        clip = true
        stochastic = true
        shift = 0.25
        rotation = "random"
        activation_bits = 8
        activation_clip = 1
        seed = 7
        copies = { routed = 2, shared = 3 }
        extra = [{ seed = 8, stochastic = false }]
        combine = "learned"
        conservative = true
        layers = [1, 2]
        router_bits = 4
        same_bytes = false
        [[variant]]
        name = "groups"
        group_size = 32
        copies = "groups"
        settings = "mixed"
        experts = true
        budget = 0.45
        """,
    )
    first, second = read_config(config)
    recipe = Recipe(3, 64, True, True, True, shift=0.25, rotation="random", activation_bits=8, seed=7)
    expected = Entry(
        "all",
        recipe,
        extra=(Recipe(3, 64, True, True, False, shift=0.25, rotation="random", activation_bits=8, seed=8),),
        bits={"routed": 3, "shared": 4},
        copies={"routed": 2, "shared": 3},
        combine="learned",
        conservative=True,
        layers=frozenset({1, 2}),
        router_bits=4,
        same_bytes=False,
    )
    assert first == expected
    assert second.recipe == Recipe(group_size=32)
    assert (second.copies, second.settings, second.budget) == ("groups", "mixed", 0.45)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("name = 'a'\nbit = 2", "variant 'a': there is no key bit"),
        ("name = 'a'\nbits = '2'", "variant 'a': bits = '2' is not a whole number"),
        ("name = 'a'\nbits = true", "variant 'a': bits = True is not a whole number"),
        ("name = 'a'\nbits = 7", "variant 'a': bits = 7 is not one of 2, 3, 4, 5, 6, 8"),
        ("name = 'a'\nbits = {routed = 2}", "variant 'a': bits lacks shared"),
        ("name = 'a'\nbits = {routed = 2, shared = 7}", "variant 'a': bits = 7 is not one of"),
        ("name = 'a'\nbits = {routed = 2, other = 3}", "variant 'a': there is no key bits.other"),
        ("name = 'a'\nbits = 5\nfeedback = true", "variant 'a': bits = 5 is not one of 2, 3, 4, 6, 8"),
        ("name = 'a'\nclip = 1", "variant 'a': clip = 1 is not true or false"),
        ("name = 'a'\ngroup_size = 48", "variant 'a': group_size = 48 is not one of 128, 64, 32"),
        ("name = 'a'\nrotation = 'dfrot-75'", "variant 'a': rotation = 'dfrot-75' is not one of none, random"),
        ("name = 'a'\nshift = 2", "variant 'a': shift = 2.0 is not between -1 and 1"),
        ("name = 'a'\nshift = nan", "variant 'a': shift = nan is not between"),
        ("name = 'a'\nactivation_bits = 1", "variant 'a': activation_bits = 1 is not one of"),
        ("name = 'a'\nactivation_clip = 0", "variant 'a': activation_clip = 0.0 is not between"),
        ("name = 'a'\noffset = true\nshift = 0.5", "variant 'a': offset and shift do not go together"),
        ("name = 'a'\nfeedback = true\naffine = true", "variant 'a': feedback and affine do not go together"),
        ("name = 'a'\nawq = true\nrotation = 'random'", "variant 'a': awq and rotation do not go together"),
        ("name = 'a'\noutput_clip = true\noffset = true", "variant 'a': output_clip and offset do not go"),
        ("name = 'a'\noutput_clip = true\nclip = true", "variant 'a': clip and output_clip do not go together"),
        ("name = 'a'\ncopies = 0", "variant 'a': copies = 0 is not between 1 and 8"),
        ("name = 'a'\ncopies = 'some'", "variant 'a': copies = 'some' is neither a number nor one of random"),
        ("name = 'a'\ncombine = 'sum'", "variant 'a': combine = 'sum' is not one of mean"),
        ("name = 'a'\ncopies = 2\nsettings = 'many'", "variant 'a': settings = 'many' is not one of rotation"),
        ("name = 'a'\nsettings = 'mixed'", "variant 'a': settings needs copies"),
        ("name = 'a'\nextra = [{seed = 1}]", "variant 'a': extra needs copies"),
        ("name = 'a'\ncopies = 2\nextra = 1", "variant 'a': extra is not a list of tables"),
        ("name = 'a'\ncopies = 2\nextra = [{bits = 3}]", "variant 'a': there is no key extra.bits"),
        ("name = 'a'\ncopies = 2\nextra = [{seed = 'x'}]", "variant 'a': extra.seed = 'x' is not a whole number"),
        ("name = 'a'\ncopies = 2\nsettings = 'mixed'\nextra = [{seed = 1}]", "settings and extra do not go together"),
        ("name = 'a'\ncopies = 'mixed'\nbudget = 0", "variant 'a': budget = 0.0 is not a share"),
        ("name = 'a'\nlayers = 1", "variant 'a': layers is not a list"),
        ("name = 'a'\nlayers = ['x']", "variant 'a': layers = 'x' is not a whole number"),
        ("name = 'a'\nrouter_bits = 1", "variant 'a': router_bits = 1 is not one of"),
        ("bits = 2", "variant 1: it has no name"),
        ("name = ' '", "variant ' ': it has no name"),
        ("name = 'original'", "variant 'original': the name is taken"),
        ("name = 'a'\n[[variant]]\nname = 'a'", "variant 'a': the name is taken"),
    ],
)
def test_what_is_wrong_is_named(body: str, expected: str, tmp_path: Path) -> None:
    path = write_config(tmp_path, f"[[variant]]\n{body}\n")
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert expected in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "there is no variant"),
        ("variant = 3", "there is no variant"),
        ("variant = [1]", "variant 1: it has no name"),
        ("defaults = 3\n[[variant]]\nname = 'a'", "defaults is not a table"),
        ("[[variants]]\nname = 'a'", "there is no key variants"),
        ("[[variant]\n", "is not TOML"),
    ],
)
def test_files_that_are_none(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        read_config(write_config(tmp_path, text))
    with pytest.raises(UserError, match="there is no config file"):
        read_config(tmp_path / "nowhere.toml")


# -- what is measured --------------------------------------------------------------------------------------------------


def sites(layers: int, experts: int) -> list[Site]:
    shapes = tuple(MatrixShape(name, 64, 64, 64) for name in ("gate_proj", "up_proj", "down_proj"))
    return [
        Site(f"layers.{i}.{'shared' if shared else 'experts'}", i, 1 if shared else experts, shared, shapes)
        for i in range(layers)
        for shared in (False, True)
    ]


def without_model(layers: int = 2, experts: int = 4) -> Any:
    return SimpleNamespace(sites=sites(layers, experts), check=lambda variant: None)


def test_copies_stand_beside_one_of_the_same_bytes() -> None:
    kinds = {"routed": 2, "shared": 3}
    entry = Entry("pairs", Recipe(bits=2), bits=kinds, copies={"routed": 2, "shared": 3})
    pair, single = build(entry, without_model())
    assert pair.copies["layers.0.experts"].tolist() == [2] * 4
    assert pair.copies["layers.1.shared"].tolist() == [3]
    assert pair.bits["layers.1.shared"].tolist() == [3]
    assert single.name == "pairs: one copy of the same bytes"
    assert single.bits["layers.0.experts"].tolist() == [4] * 4
    assert single.bits["layers.1.shared"].tolist() == [8]  # 9 is no width
    assert not single.copies
    fed = Entry("fed", Recipe(bits=3, feedback=True), bits=dict.fromkeys(kinds, 3), copies=dict.fromkeys(kinds, 2))
    assert build(fed, without_model())[1].bits["layers.0.experts"].tolist() == [6] * 4
    alone = Entry("one", bits=dict.fromkeys(kinds, 2), copies=dict.fromkeys(kinds, 1))
    assert [variant.name for variant in build(alone, without_model())] == ["one"]
    silent = Entry("pairs", bits=kinds, copies=kinds, same_bytes=False)
    assert len(build(silent, without_model())) == 1


def test_settings_of_the_chapter_give_the_copies_recipes() -> None:
    two = dict.fromkeys(("routed", "shared"), 2)
    entry = Entry("mixed", Recipe(clip=True), bits=two, copies=two, settings="mixed")
    first, second = build(entry, without_model())[0].recipes(2)
    assert (first.activation_bits, first.stochastic, first.shift) == (8, False, 0.0)
    assert (second.seed, second.stochastic, second.shift) == (1, True, 0.5)
    assert second.clip


def test_layers_that_have_no_experts() -> None:
    two = dict.fromkeys(("routed", "shared"), 2)
    with pytest.raises(UserError, match="no experts in layer 7"):
        build(Entry("a", bits=two, copies=two, layers=frozenset({1, 7})), without_model())


def test_what_the_model_does_not_have(simulation: Simulation) -> None:
    variant = Variant("v", Recipe(rotation="block-hadamard-128"))
    with pytest.raises(UserError, match="does not fit the 64 columns of gate_proj"):
        simulation.check(variant)
    one = dict.fromkeys(("routed", "shared"), 1)
    with pytest.raises(UserError, match="does not fit the 64 columns"):
        build(Entry("v", variant.recipe, bits=one, copies=one), simulation)


def test_conservative_is_the_mean_where_inputs_are_few(simulation: Simulation) -> None:
    """Of experts with fewer than ten inputs the learned weights are not used."""
    twice = {site.path: np.full(site.num_experts, 2) for site in simulation.sites}
    learned = Variant("learned", Recipe(clip=True), copies=twice, combine="learned")
    careful = Variant("careful", Recipe(clip=True), copies=twice, combine="learned", conservative=True)
    for site in simulation.sites:
        free, mean = (np.array(simulation.module(site, v)._how.weights) for v in (learned, careful))  # type: ignore[attr-defined]
        few = [len(simulation._inputs_of(site, e)) < 10 for e in range(site.num_experts)]
        np.testing.assert_allclose(mean[:, few], 0.5)
        assert np.abs(free - 0.5).max() > 1e-3


def test_conservative_choices_know_the_norms_of_the_inputs(simulation: Simulation) -> None:
    """Their mean for every expert; none where there are fewer than ten or their standard deviation is above half of it."""
    twice = {site.path: np.full(site.num_experts, 2) for site in simulation.sites}
    free = Variant("free", Recipe(clip=True), copies=twice, combine="selective")
    for site in simulation.sites:
        assert simulation.module(site, free)._how.selector.usual is None  # type: ignore[attr-defined]
        careful = simulation.module(site, replace(free, conservative=True))
        norms = [np.sqrt(np.square(simulation._inputs_of(site, e)).sum(axis=1)) for e in range(site.num_experts)]
        usual = [n.mean() if len(n) >= 10 and n.std() <= n.mean() / 2 else 0 for n in norms]
        np.testing.assert_allclose(np.exp(np.array(careful._how.selector.usual)), usual, rtol=1e-5)  # type: ignore[attr-defined]


def test_awq_and_its_clip_lower_the_error_of_the_outputs(simulation: Simulation) -> None:
    site = simulation.sites[0]
    shape, moments = site.shapes[-1], simulation.statistics[site.path].moments[site.shapes[-1].name]
    bits = np.full(site.num_experts, 2)

    def error(recipe: Recipe) -> float:
        left = simulation.weight(site, shape.name) - simulation.values(site, shape, recipe, bits)
        return float(np.einsum("en,enk,ekl,enl->", moments.row_weights, left, moments.hessian, left))

    plain, clip, both = Recipe(clip=True), Recipe(output_clip=True), Recipe(output_clip=True, awq=True)
    assert error(both) <= error(clip) < 0.95 * error(plain)
    assert error(Recipe(clip=True, awq=True)) <= error(plain)
    assert error(Recipe(feedback=True, awq=True)) < error(plain)


def example() -> str:
    """The file in docs/options.md."""
    (found,) = re.findall(r"```toml\n(.*?)```", (DOCS / "options.md").read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


def test_the_example_of_the_docs(inputs: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, example())
    entries = read_config(config)
    assert run(inputs, config, "--routing", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["rows"]
    names = [row["variant"] for row in rows]
    assert names[0] == "original"
    assert {entry.name for entry in entries} <= set(names)
    assert len(lines) == len(rows) + 3
    by_name = {row["variant"]: row for row in rows}
    for name in names:
        single = by_name.get(f"{name}: one copy of the same bytes")
        if single is not None:
            assert single["expert bytes"] <= by_name[name]["expert bytes"]
    assert rows[0]["KLD"] < 1e-6 < rows[1]["KLD"]
    assert all(row["chosen experts kept"] <= 1 for row in rows)


def test_errors_before_a_token_is_run(inputs: SimpleNamespace, tmp_path: Path) -> None:
    config = write_config(tmp_path, "[[variant]]\nname = 'a'\nlayers = [99]")
    with pytest.raises(UserError, match=r"variants.toml: variant 'a': layers: there are no experts in layer 99"):
        run(inputs, config)
