"""What experts' levels are chosen by: every score worked out by hand for two layers of two experts."""

from __future__ import annotations

import numpy as np
import pytest

from mlxmoe.convert.config import Allocation, ConvertConfig, parse_sensitivity
from mlxmoe.convert.measure import ExpertErrors, ExpertScores
from mlxmoe.convert.sensitivity import expert_benefits, importance, mixed, score_losses
from mlxmoe.errors import UserError


def layer(scale: float) -> ExpertErrors:
    """One projection and a last one, two experts, levels of which the second has a quarter of the error."""
    steps = np.array([1.0, 0.25])
    norms = np.array([[4.0, 8.0], [2.0, 6.0]])
    scores = ExpertScores(
        output=np.array([[1.0, 3.0], [2.0, 1.0]])[..., None] * steps,
        outputs=np.array([10.0, 20.0]),
        weight=np.array([[0.5, 1.0], [0.5, 1.5]])[..., None] * steps,
        energy=np.array([[5.0, 5.0], [10.0, 10.0]]),
        frequency=np.array([0.5, 0.25]) * scale,
        contribution=np.array([3.0, 2.0]),
        massive=np.array([0.0, 0.5]),
    )
    return ExpertErrors(norms, scale * np.array([[0.4, 0.8], [0.2, 0.6]])[..., None] * steps, norms, scores)


LAYERS = [layer(1.0), layer(0.5)]


def losses(sensitivity: str) -> np.ndarray:
    """[P, E] of the first layer, at the first level; the second level has a quarter."""
    found = score_losses(Allocation(sensitivity=sensitivity), LAYERS)
    assert [part.shape for part in found] == [(2, 2, 2)] * 2
    np.testing.assert_allclose(found[0][..., 1], found[0][..., 0] / 4)
    return found[0][..., 0]


def test_losses_that_are_measured() -> None:
    np.testing.assert_array_equal(losses("fisher"), [[0.4, 0.8], [0.2, 0.6]])
    np.testing.assert_array_equal(losses("output"), [[1.0, 3.0], [2.0, 1.0]])
    np.testing.assert_allclose(losses("weight"), [[0.05, 0.1], [0.025, 0.075]])


def test_losses_that_are_one_number_times_the_error() -> None:
    error = np.array([[0.1, 0.2], [0.05, 0.15]])
    np.testing.assert_allclose(losses("frequency"), [0.5, 0.25] * error)
    np.testing.assert_allclose(importance(LAYERS[0]), [6.0, 12.0])
    np.testing.assert_allclose(losses("ablation"), [6.0, 12.0] * error)
    # the largest in the model: relative output error 0.2 (expert 0, last), loss 0.8, frequency 0.5
    mix = np.array(
        [[0.5 * 0.5 + 0.3 * 0.5 + 0.2, 0.5 * 0.75 + 0.3 + 0.1], [0.5 + 0.3 * 0.25 + 0.2, 0.5 * 0.25 + 0.3 * 0.75 + 0.1]]
    )
    np.testing.assert_allclose(losses("mix"), mix * error)
    np.testing.assert_allclose(mixed((1, 0, 0), LAYERS)[1], [[0.5, 0.75], [1.0, 0.25]])
    np.testing.assert_allclose(mixed((0, 1, 0), LAYERS)[1], np.array([[0.5, 1.0], [0.25, 0.75]]) / 2)


def test_benefit_is_of_whole_experts() -> None:
    """Sums over projections: outputs 0.3 and 0.2, loss 0.6 and 1.4, of the first layer; the second has half the loss."""
    first, second = expert_benefits(Allocation(), LAYERS)
    np.testing.assert_allclose(first[0], (0.5 + 0.3 * 0.6 / 1.4 + 0.2) * 0.5)
    np.testing.assert_allclose(first[1], (0.5 * 2 / 3 + 0.3 + 0.1) * 0.25 * 1.5)
    np.testing.assert_allclose(second[0], (0.5 + 0.3 * 0.3 / 1.4 + 0.1) * 0.25)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("output", ("output", (0.5, 0.3, 0.2))),
        ("mix", ("mix", (0.5, 0.3, 0.2))),
        ("mix=2,1,1", ("mix", (0.5, 0.25, 0.25))),
        ("mix=0,0,7", ("mix", (0.0, 0.0, 1.0))),
    ],
)
def test_shares_are_read(text: str, wanted: tuple[str, tuple[float, ...]]) -> None:
    assert parse_sensitivity(text) == wanted


@pytest.mark.parametrize(
    "text", ["mix=", "mix=1,2", "mix=a,b,c", "mix=1,-1,1", "mix=0,0,0", "mix=nan,1,1", "output=1,2,3"]
)
def test_shares_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="is not understood"):
        parse_sensitivity(text)


def test_settings_are_checked_and_need_text() -> None:
    for wrong in ({"method": "best"}, {"sensitivity": "guess"}, {"refine": -1}):
        with pytest.raises(UserError):
            Allocation(**wrong)  # type: ignore[arg-type]
    for more in ({"sensitivity": "output"}, {"method": "benefit"}, {"refine": 1}):
        with pytest.raises(UserError, match="measure on text"):
            ConvertConfig(bpw=3, allocation=Allocation(**more))  # type: ignore[arg-type]
    assert ConvertConfig(bpw=3, allocation=Allocation("uniform")).as_settings()["allocation"]["method"] == "uniform"
    assert "allocation" not in ConvertConfig(bpw=3).as_settings()
