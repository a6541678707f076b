"""Activation-aware scales: the formula, that no expert gets worse, that the fold is exact, and the converter with them."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.activations import SwigluOAI
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from toy_checkpoints import (
    convert,
    folder_nbytes,
    load_plan,
    open_model,
    stored_matrix,
    write_architecture,
    write_qwen3,
)

from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.convert import awq
from mlxmoe.convert.awq import Balance, Projection, degree, find_balance, rounded, search_scales
from mlxmoe.convert.gptq import decoded, output_errors
from mlxmoe.convert.source import Source
from mlxmoe.convert.stats import Moments
from mlxmoe.errors import UserError


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def projection(experts: int = 3, rows: int = 8, columns: int = 32, seed: int = 0) -> Projection:
    """Inputs of uneven size: second moments of columns whose sizes span two orders of magnitude."""
    x = gaussian(experts, 4 * columns, columns, seed=seed) * np.geomspace(0.1, 10, columns, dtype=np.float32)
    hessian = x.swapaxes(1, 2) @ x / x.shape[1]
    rho = np.random.default_rng(seed).random((experts, rows)) + 0.5
    return Projection(gaussian(experts, rows, columns, seed=seed + 1), Moments(hessian, rho, np.ones(experts), 0.0))


def coarse(matrix: Projection) -> np.ndarray:
    """A code of one step for a whole row: 5 values."""
    step = np.abs(matrix.stack).max(axis=2, keepdims=True) / 2
    return np.rint(matrix.stack / step) * step


# -- the search --------------------------------------------------------------------------------------------------------


def test_scales_are_those_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 3.2, equation 5, with the authors' normalisation, written out for one alpha and one column after another."""
    monkeypatch.setattr(awq, "ALPHAS", (0.5,))
    matrix = projection(experts=2, columns=4)
    found = search_scales(matrix, coarse).scales
    for e in range(2):
        size = [matrix.moments.hessian[e, k, k] ** 0.5 for k in range(4)]
        powers = [a**0.5 for a in size]
        expected = [p / (max(powers) * min(powers)) ** 0.5 for p in powers]
        np.testing.assert_allclose(found[e], expected, rtol=1e-5)


def test_uneven_inputs_are_balanced_and_no_expert_gets_worse() -> None:
    matrix = projection()
    found = search_scales(matrix, coarse)
    hessian, rho = matrix.moments.hessian, matrix.moments.row_weights
    plain = output_errors(matrix.stack - coarse(matrix), hessian, rho)
    assert (found.errors < 0.75 * plain).all()
    assert (found.alphas > 0).all()
    scaled = matrix._replace(stack=matrix.stack * found.scales[:, None])
    left = matrix.stack - coarse(scaled) / found.scales[:, None]
    by_hand = np.einsum("en,enk,ekl,enl->e", rho, left, hessian, left)
    np.testing.assert_allclose(found.errors, by_hand, rtol=1e-4)
    even = matrix._replace(moments=matrix.moments._replace(hessian=np.stack([np.eye(32, dtype=np.float32)] * 3)))
    assert (search_scales(even, coarse).scales == 1).all()
    exact = search_scales(matrix, lambda m: m.stack)
    np.testing.assert_allclose(exact.errors, 0, atol=1e-6)


def test_columns_that_are_always_zero() -> None:
    matrix = projection(experts=2)
    matrix.moments.hessian[0, :3] = matrix.moments.hessian[0, :, :3] = 0
    matrix.moments.hessian[1] = 0
    found = search_scales(matrix, coarse)
    assert np.isfinite(found.scales).all()
    assert (found.scales > 0).all()
    assert (found.scales[1] == 1).all()


def test_every_expert_is_searched_at_its_own_level() -> None:
    matrix = projection(experts=4)
    levels = [2, 3, 2, 8]
    found = find_balance(matrix, levels, 32, 1).scales
    for e, level in enumerate(levels):
        alone = search_scales(
            matrix.some(np.array([e])),
            lambda m, level=level: decoded(*rounded(m.stack, m.moments.hessian, level, 32)),  # type: ignore[misc]
        )
        np.testing.assert_array_equal(found[e], alone.scales[0])


def test_no_scales_are_searched_at_16_bits() -> None:
    found = find_balance(projection(), [16, 2, 16], 32, 1).scales
    assert (found[[0, 2]] == 1).all()
    assert (found[1] != 1).any()


# -- codes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [2, 4, 8])
def test_codes_are_nearest_and_lower_gains_are_least_squares(level: int) -> None:
    matrix = projection(experts=2)
    hessian = matrix.moments.hessian
    coded, code = rounded(matrix.stack, hessian, level, 32)
    values = coded.scales * (np.arange(2**level) - (2**level - 1) / 2)  # [E, N, values]
    nearest = np.abs(matrix.stack[..., None] - values[:, :, None]).min(axis=3)
    np.testing.assert_allclose(np.abs(matrix.stack - decoded(coded, code)), nearest, atol=1e-5)
    for lower in range(1, len(code.tables)):
        unscaled = decoded(coded._replace(gains=np.ones_like(coded.gains)), code, lower)
        for e in range(2):
            half = np.linalg.cholesky(hessian[e].astype(np.float64))
            a, b = (unscaled[e] @ half).reshape(-1, 1), (matrix.stack[e] @ half).reshape(-1)
            assert coded.gains[e, lower - 1] == pytest.approx(np.linalg.lstsq(a, b, rcond=None)[0][0], rel=1e-3)


# -- the fold ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "exponent"),
    [
        (lambda: SwitchGLU(16, 32, 3), 1),
        (lambda: SwitchMLP(16, 32, 3, activation=nn.ReLU2()), 2),
    ],
)
def test_experts_compute_what_they_did(make: type, exponent: int) -> None:
    experts = make()
    x, indices = mx.array(gaussian(5, 16)), mx.array([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]])
    before = np.array(experts(x, indices))
    assert degree(experts) == exponent
    names = ("gate_proj", "up_proj", "down_proj") if exponent == 1 else ("fc1", "fc2")
    scales = np.exp(gaussian(3, 32, seed=4))
    nothing = Moments(np.zeros((3, 1, 1)), np.zeros((3, 1)), np.zeros(3), 0.0)
    for p, name in enumerate(names):
        shape = experts[name].weight.shape
        empty = nothing._replace(hessian=np.zeros((3, shape[2], shape[2])), row_weights=np.zeros((3, shape[1])))
        matrix = Projection(np.array(experts[name].weight), empty)
        done = Balance(scales, exponent).applied(p, len(names), matrix)
        assert (done.stack is matrix.stack) == (name == "gate_proj")
        experts[name].weight = mx.array(done.stack)
    np.testing.assert_allclose(np.array(experts(x, indices)), before, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("exponent", [1, 2])
def test_what_an_error_costs_stays_the_same(exponent: int) -> None:
    """The same relative error of a column, or of a row, costs what it did before the scales."""
    up, down = projection(rows=32, columns=16), projection(rows=8, columns=32)
    balance = Balance(np.exp(gaussian(3, 32, seed=9)), exponent)
    for position, matrix in ((1, up), (2, down)):
        done = balance.applied(position, 3, matrix)
        left = gaussian(*matrix.stack.shape, seed=3) * matrix.stack
        scaled = left * (done.stack / matrix.stack)
        costs = [
            output_errors(d, m.moments.hessian, m.moments.row_weights) for d, m in ((left, matrix), (scaled, done))
        ]
        np.testing.assert_allclose(costs[1], costs[0], rtol=1e-3)


def test_what_lets_no_factor_through_is_refused() -> None:
    for experts in (
        SwitchMLP(16, 32, 3),  # gelu
        SwitchGLU(16, 32, 3, activation=SwigluOAI()),
        SwitchGLU(16, 32, 3, bias=True),
    ):
        with pytest.raises(UserError, match="cannot be folded into experts with"):
            degree(experts)


# -- the converter -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(short_windows: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `source`, whose experts' hidden values differ in size from column to column, and `text.txt`."""
    folder = tmp_path_factory.mktemp("awq")
    write_qwen3(folder / "source", num_hidden_layers=2, hidden_size=64, moe_intermediate_size=64, num_experts=4)
    words = np.random.RandomState(0).choice(("the", "router", "of", "a", "layer", "chooses", "experts"), 700)
    (folder / "text.txt").write_text(" ".join(words))
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--bpw", "6", "--calibration", str(folder / "text.txt"), "--calibration-tokens", "256", *more]


def test_scales_of_down_are_taken_back_in_up(folder: Path, tmp_path: Path) -> None:
    """From the stored bits: columns of down are larger by s where rows of up are smaller by s."""
    given = arguments(folder, "--method", "awq", "--expert-bits", "8")[2:]
    assert convert(folder / "source", tmp_path / "out", "--bpw", "12", *given) == 0
    plan = load_plan(tmp_path / "out")
    assert plan.settings["calibration"]["method"] == "awq"
    tensors = Source(open_checkpoint(folder / "source"), 128).tensors()
    largest = 0.0
    for layer in plan.layers:
        up, down = (np.array(tensors[f"{layer.path}.{n}_proj.weight"].astype(mx.float32)) for n in ("up", "down"))
        for e in range(4):
            stored_up, stored_down = (stored_matrix(tmp_path / "out", layer, e, p, 8) for p in (1, 2))
            divided = (stored_up * up[e]).sum(axis=1) / np.square(up[e]).sum(axis=1)
            scaled = (stored_down * down[e]).sum(axis=0) / np.square(down[e]).sum(axis=0)
            np.testing.assert_allclose(divided * scaled, 1, atol=0.02)
            largest = max(largest, float(np.abs(np.log(scaled)).max()))
    assert largest > 0.05
    tokens = mx.array([[5, 6, 7, 8]])
    converted, original = (np.array(open_model(path).model(tokens)) for path in (tmp_path / "out", folder / "source"))
    assert np.square(converted - original).mean() < 0.01 * np.square(original).mean()


def test_it_keeps_the_size(folder: Path, tmp_path: Path) -> None:
    assert convert(folder / "source", tmp_path / "out", *arguments(folder, "--method", "awq")) == 0
    assert folder_nbytes(tmp_path / "out") <= 6 * load_plan(tmp_path / "out").num_parameters / 8


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--nested", "0.3"], "--nested and --method awq do not go together"),
        (["--rotation", "block-hadamard-64"], "--method awq and --rotation do not go together"),
    ],
)
def test_settings_that_do_not_go_with_it(
    more: list[str], expected: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(folder / "source", tmp_path / "out", *arguments(folder, "--method", "awq", *more)) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_architecture_that_it_does_not_fit(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_architecture(tmp_path / "source", "gpt_oss")
    given = arguments(folder, "--method", "awq")
    assert convert(source, tmp_path / "out", *given) == 2
    assert "cannot be folded into experts with SwigluOAI" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
