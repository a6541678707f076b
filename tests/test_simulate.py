"""Fake quantization: coding against formulas written out, bytes against the converter's format, the simulated model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from toy_checkpoints import edit_weights, write_architecture, write_qwen3

from mlxmoe.bench.simulate import (
    Ensemble,
    QuantizedInput,
    Recipe,
    Routing,
    Simulation,
    Variant,
    agreement,
    coded_groups,
    coded_stack,
    grid,
    matrix_nbytes,
    round_to_grid,
)
from mlxmoe.convert.replicas import usual_norm
from mlxmoe.convert.rotate import quantized_activations
from mlxmoe.copies import Selector
from mlxmoe.errors import UserError
from mlxmoe.evaluate import Text
from mlxmoe.formats import MatrixShape
from mlxmoe.rotation import plain_rotation, rotate, unrotate

TEXT = Text("text", ["the quick brown fox jumps over the lazy dog. " * 20, "one two three four five. " * 30])


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def squared(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.square(a - b).sum())


def write_text(folder: Path) -> Path:
    path = folder / "calibration.jsonl"
    lines = [json.dumps({"text": f"{word} and more of it. " * 60, "domain": word}) for word in ("code", "math")]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Simulation:
    """A model with a shared expert and a selection bias: DeepSeek-V3's architecture."""
    folder = tmp_path_factory.mktemp("simulate")
    checkpoint = write_architecture(folder / "model", "deepseek_v3", mx.float32)
    return Simulation(checkpoint, [TEXT], write_text(folder), max_tokens=64, calibration_tokens=128, window=32)


# -- coding -----------------------------------------------------------------------------------------------------------


def test_the_baseline_grid_by_hand() -> None:
    """2 bits, largest value 3: steps of 2 at -3, -1, 1, 3."""
    groups = np.array([[3.0, -0.2, 1.9, -2.5]], np.float32)
    np.testing.assert_array_equal(coded_groups(groups, 2, Recipe()), [[3, -1, 1, -3]])
    np.testing.assert_array_equal(coded_groups(groups, 2, Recipe(shift=0.25)), [[3.5, -0.5, 1.5, -2.5]])


def test_an_affine_grid_meets_both_ends() -> None:
    groups = np.array([[1.0, 4.0, 2.2, 3.4]], np.float32)
    np.testing.assert_allclose(coded_groups(groups, 2, Recipe(affine=True)), [[1, 4, 2, 3]], atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("affine", [False, True])
def test_a_clip_search_and_an_offset_each_lower_the_error(bits: int, affine: bool) -> None:
    groups = gaussian(64, 64)
    plain = squared(groups, coded_groups(groups, bits, Recipe(affine=affine)))
    assert squared(groups, coded_groups(groups, bits, Recipe(affine=affine, clip=True))) < 0.98 * plain
    assert squared(groups, coded_groups(groups, bits, Recipe(affine=affine, offset=True))) < 0.99 * plain


def test_stochastic_rounding_keeps_the_mean_and_costs_error() -> None:
    groups = np.full((1, 40000), 0.25, np.float32)
    scale, bias = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    drawn = round_to_grid(groups, scale, bias, 2, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(0.25, abs=0.01)
    assert set(np.unique(drawn)) == {0.0, 1.0}
    wide = gaussian(64, 64)
    nearest, random = (squared(wide, coded_groups(wide, 3, Recipe(stochastic=s))) for s in (False, True))
    assert random > 1.5 * nearest  # twice, in the middle of the grid


def test_scales_are_what_float16_holds() -> None:
    for recipe in (Recipe(), Recipe(clip=True), Recipe(affine=True), Recipe(affine=True, clip=True)):
        scales, biases = grid(gaussian(8, 32), 3, recipe)
        np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float32))
        if recipe.affine:
            np.testing.assert_array_equal(biases, biases.astype(np.float16).astype(np.float32))


def test_every_expert_has_its_own_width_and_feedback_lowers_the_output_error() -> None:
    stack = gaussian(3, 16, 128)
    mixed = np.stack([m @ m.T for m in gaussian(3, 128, 160, seed=1) @ gaussian(160, 160, seed=2)]).astype(np.float32)
    bits = np.array([2, 4, 2])
    plain = coded_stack(stack, bits, Recipe(clip=True), mixed)
    np.testing.assert_array_equal(plain[1], coded_groups(stack[1], 4, Recipe(clip=True)))
    fed = coded_stack(stack, bits, Recipe(feedback=True), mixed)

    def error(values: np.ndarray) -> float:
        difference = stack - values
        return float(np.einsum("enk,ekl,enl->", difference, mixed, difference))

    assert error(fed) < 0.8 * error(plain)


def test_bytes_by_hand() -> None:
    shape = MatrixShape("up_proj", 64, 256, 128)
    codes, groups = 64 * 256 * 2 // 8, 64 * 2
    assert matrix_nbytes(shape, 2, Recipe()) == codes + 2 * groups == shape.code_nbytes(2) + shape.scales_nbytes
    assert matrix_nbytes(shape, 2, Recipe(affine=True)) == codes + 4 * groups
    assert matrix_nbytes(shape, 2, Recipe(offset=True)) == codes + 2 * groups + groups * 2 // 8
    assert matrix_nbytes(shape, 2, Recipe(group_size=32)) == codes + 2 * 4 * groups


# -- modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "random", "block-hadamard-64"])
def test_quantized_inputs_are_those_behind_the_rotation(name: str) -> None:
    rotation, x, inner = plain_rotation(name, 128, 3), gaussian(16, 128), nn.Linear(128, 7, bias=False)
    found = QuantizedInput(inner, rotation, 8, 0.9)(mx.array(x))
    expected = unrotate(quantized_activations(rotate(x, rotation), 8, 0.9), rotation) @ np.array(inner.weight).T
    # a value that lies between two steps may go either way: that moves one token, so not the median
    assert np.median(np.abs(np.array(found) - expected)) < 1e-5
    unquantized = x @ np.array(inner.weight).T
    assert np.median(np.abs(np.array(found) - unquantized)) > 1e-4


class _Times(nn.Module):
    """An expert module that multiplies by a number, times 1 + the expert's number."""

    def __init__(self, factor: float):
        super().__init__()
        self._factor = factor

    def __call__(self, x: mx.array, *indices: mx.array) -> mx.array:
        if not indices:
            return x * self._factor
        return x[..., None, :] * self._factor * (1 + indices[0].astype(mx.float32))[..., None]


def test_copies_are_summed_with_the_weights_of_the_expert() -> None:
    x, indices = gaussian(4, 3), np.array([[0, 1], [1, 0], [0, 0], [1, 1]], np.uint32)
    weights = np.array([[0.5, 1.0], [0.5, 0.0]])
    found = Ensemble([_Times(1.0), _Times(3.0)], weights, None)(mx.array(x), mx.array(indices))
    factors = np.where(indices == 0, 0.5 * 1 + 0.5 * 3, 2 * 1.0)
    np.testing.assert_allclose(np.array(found), x[:, None] * factors[..., None], rtol=1e-5)
    alone = Ensemble([_Times(1.0), _Times(3.0)], np.array([[0.25], [0.75]]), None)(mx.array(x))
    np.testing.assert_allclose(np.array(alone), 2.5 * x, rtol=1e-5)


def test_a_selector_takes_one_copy_by_the_size_of_the_input() -> None:
    """Predicted log errors log |x| and -log |x|: the first for small inputs; never a copy that the expert lacks."""
    selector = Selector(mx.array([[1.0, 1.0], [-1.0, -1.0]]), mx.zeros((2, 2)))
    x, indices = np.array([[0.1, 0.0], [10.0, 0.0]], np.float32), np.array([[0], [0]], np.uint32)
    weights = np.array([[0.5, 1.0], [0.5, 0.0]])
    copies = Ensemble([_Times(1.0), _Times(3.0)], weights, selector)
    np.testing.assert_allclose(np.array(copies(mx.array(x), mx.array(indices)))[:, 0, 0], [0.1, 30], rtol=1e-5)
    np.testing.assert_allclose(np.array(copies(mx.array(x), mx.array(indices + 1)))[:, 0, 0], [0.2, 20], rtol=1e-5)
    alone = Ensemble([_Times(1.0), _Times(3.0)], np.array([[0.5], [0.5]]), selector)(mx.array(x))
    np.testing.assert_allclose(np.array(alone)[:, 0], [0.1, 30], rtol=1e-5)


def test_the_conservative_mode_takes_the_mean_of_unusual_inputs() -> None:
    """Of ten inputs of one size the next ones are usual within half of it."""
    selector = Selector(mx.zeros((2, 1)), mx.array([[0.0], [1.0]]), mx.log(mx.array([usual_norm(np.full(10, 2.0))])))
    x = np.array([[0.9, 0], [1.1, 0], [0, 2.9], [0, 3.1]], np.float32)
    found = Ensemble([_Times(1.0), _Times(3.0)], np.array([[0.5], [0.5]]), selector)(mx.array(x))
    np.testing.assert_allclose(np.array(found).sum(axis=1), [1.8, 1.1, 2.9, 6.2], rtol=1e-5)


# -- a model ----------------------------------------------------------------------------------------------------------


def test_statistics_are_of_the_routing(simulation: Simulation) -> None:
    shared = [site for site in simulation.sites if site.shared]
    assert shared
    assert {site.path for site in simulation.sites} == set(simulation.statistics)
    for site in simulation.sites:
        found = simulation.statistics[site.path]
        active = 1 if site.shared else simulation.source.checkpoint.config["num_experts_per_tok"]
        assert found.frequency.sum() == pytest.approx(active)
        assert ((found.concentration >= 0.5) | (found.frequency == 0)).all()  # of two domains
        assert ((found.massive >= 0) & (found.massive <= 1)).all()
        for shape in site.shapes:
            assert found.moments[shape.name].hessian.shape == (site.num_experts, shape.columns, shape.columns)
            assert found.inputs[shape.name].shape[1] == shape.columns


def test_the_checkpoint_itself_is_no_error_and_the_model_is_left_as_it_was(simulation: Simulation) -> None:
    untouched = simulation.score(Variant("as it is", experts=False))
    assert untouched.kld < 1e-6
    assert untouched.bpw == 16
    coarse = simulation.score(Variant("2 bits", Recipe(group_size=32)))
    fine = simulation.score(Variant("8 bits", Recipe(bits=8, group_size=32)))
    assert coarse.kld > 10 * fine.kld > 0
    assert simulation.score(Variant("as it is", experts=False)).kld == untouched.kld
    assert coarse.bpw == pytest.approx(2 + 16 / 32)


def test_a_rotation_of_uncoded_weights_changes_nothing(simulation: Simulation) -> None:
    """16-bit-like codes behind a rotation: the values come back."""
    site = simulation.sites[0]
    shape = site.shapes[0]
    recipe = Recipe(bits=8, group_size=32, rotation="random", clip=True)
    values = simulation.values(site, shape, recipe, np.full(site.num_experts, 8))
    original = simulation.weight(site, shape.name)
    assert squared(values, original) < 1e-3 * float(np.square(original).sum())


def test_only_the_layers_asked_for(simulation: Simulation) -> None:
    last = max(site.layer for site in simulation.sites)
    variant = Variant("last layer", layers=frozenset({last}))
    assert {site.layer for site in simulation.touched(variant)} == {last}
    whole, part = simulation.nbytes(Variant("all")), simulation.nbytes(variant)
    assert whole < part < 2 * simulation.num_weights


def test_copies_cost_their_bytes_and_lower_the_error(simulation: Simulation) -> None:
    recipe = Recipe(rotation="random", group_size=32, clip=True)
    twice = {site.path: np.full(site.num_experts, 2) for site in simulation.sites}
    one, two = Variant("one", recipe), Variant("two", recipe, copies=twice)
    assert [r.seed for r in two.recipes(3)] == [0, 1, 2]
    assert simulation.nbytes(two) == 2 * simulation.nbytes(one)
    assert simulation.output_error(two) < 0.75 * simulation.output_error(one)
    for combine in ("variance", "learned", "selective"):
        variant = Variant(combine, recipe, copies=twice, combine=combine)
        assert simulation.output_error(variant) < 1.05 * simulation.output_error(one)
    assert simulation.output_error(one, rows=lambda x: np.zeros(len(x), bool)) != simulation.output_error(one)


def test_learned_weights_are_the_least_squares_of_the_outputs(simulation: Simulation) -> None:
    """On the inputs that they were fitted to nothing weighted by two numbers is nearer."""
    site = next(s for s in simulation.sites if s.shared)
    recipe, bits = Recipe(group_size=32), np.full(1, 2)
    copies = [simulation._copy(site, r, bits) for r in Variant("v", recipe).recipes(2)]
    outputs, target = simulation._outputs(site, [copies[0], simulation._modules[site.path]], 0)
    np.testing.assert_allclose(outputs[1], target)
    weights = simulation._weights(site, "learned", [copies[0], simulation._modules[site.path]], np.zeros(2), 0)
    assert weights[1] > 0.95  # the exact copy gets all of it


def test_a_learned_gain_undoes_a_factor(simulation: Simulation) -> None:
    """One copy whose last matrix is halved: twice its output is the original's."""
    site = simulation.sites[0]
    twin = copy.copy(simulation._modules[site.path])
    last = copy.copy(twin[site.shapes[-1].name])
    last["weight"] = last["weight"] / 2
    twin[site.shapes[-1].name] = last
    expert = int(np.argmax(simulation.statistics[site.path].frequency))
    assert simulation._weights(site, "learned", [twin], np.zeros(1), expert) == pytest.approx([2], rel=0.03)
    recipe = Recipe(clip=True, group_size=32)
    plain, gained = Variant("plain", recipe), Variant("gained", recipe, combine="learned")
    assert simulation.output_error(gained) < simulation.output_error(plain)
    experts = sum(site.num_experts for site in simulation.sites)
    assert simulation.nbytes(gained) == simulation.nbytes(plain) + 2 * experts


def test_quantized_routers(simulation: Simulation) -> None:
    variants = [Variant(f"{bits}", experts=False, router_bits=bits) for bits in (2, 8)]
    original = simulation.routing(Variant("as it is", experts=False))
    coarse, fine = (agreement(original, simulation.routing(v)) for v in variants)
    assert coarse.topk < fine.topk <= 1
    experts, dims = simulation.sites[0].num_experts, simulation.sites[0].shapes[0].columns
    layers = sum(not site.shared for site in simulation.sites)
    assert simulation.router_nbytes(2) == layers * (experts * dims * 2 // 8 + experts * dims // 64 * 4)
    assert coarse.changed > fine.changed
    assert simulation.score(variants[0]).kld > simulation.score(variants[1]).kld
    assert agreement(original, simulation.routing(Variant("again", experts=False))).topk == 1
    now = dict(simulation.loaded.model.named_modules())
    assert all(now[site.path] is simulation._modules[site.path] for site in simulation.sites)


def test_routers_of_the_layers_asked_for(simulation: Simulation) -> None:
    """The others stay as they are, and count two bytes a weight."""
    layers = sorted({site.layer for site in simulation.sites})
    names = [tensor.name for tensor in simulation._routers()]
    weights = {name: np.array(simulation._modules[name.rpartition(".")[0]]["weight"]) for name in names}
    with simulation.applied(Variant("one", experts=False, router_bits=2, layers=frozenset(layers[-1:]))):
        now = {name: np.array(simulation._modules[name.rpartition(".")[0]]["weight"]) for name in names}
    assert [bool((now[name] == weights[name]).all()) for name in names] == [True] * (len(names) - 1) + [False]
    one, all_of_them = simulation.router_nbytes(2, frozenset(layers[-1:])), simulation.router_nbytes(2)
    whole = 2 * weights[names[0]].size
    assert one == all_of_them // len(names) + (len(names) - 1) * whole


def test_agreement_by_hand() -> None:
    first = Routing([np.array([[0, 1], [2, 3]])], [np.array([[0.8, 0.2, 0, 0], [0, 0, 0.5, 0.1]])])
    second = Routing([np.array([[1, 0], [2, 1]])], [np.array([[0.4, 0.5, 0, 0], [0, 0, 0.3, 0.1]])])
    found = agreement(first, second)
    assert found.top1 == 0.5
    assert found.topk == 0.75
    assert found.changed == 0.5
    assert found.confidence == pytest.approx(0.8 / 1.3 - 1)
    unknown = Routing(first.chosen, [None])
    assert np.isnan(agreement(unknown, second).top1)


def test_logits_of_the_scored_windows(simulation: Simulation) -> None:
    logits = simulation.logits(Variant("as it is", experts=False))
    assert len(logits) == sum(map(len, simulation.windows()))


def test_models_without_shared_experts_and_bad_text(tmp_path: Path) -> None:
    checkpoint = write_qwen3(tmp_path / "qwen", num_hidden_layers=1)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(UserError, match="too short"):
        Simulation(checkpoint, [TEXT], short, 32, 64, window=32)

    def spoil(weights: dict[str, mx.array]) -> None:
        name = next(n for n in weights if "experts.0.up_proj" in n)
        weights[name] = mx.full(weights[name].shape, float("nan")).astype(weights[name].dtype)

    edit_weights(checkpoint, spoil)
    with pytest.raises(UserError, match="finite"):
        Simulation(checkpoint, [TEXT], write_text(tmp_path), 32, 64, window=32)
