"""How a conversion shares out bytes: every method and score at the same size, on a toy model with shared experts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from toy_checkpoints import convert, folder_nbytes, load_plan, write_architecture, write_qwen3

from mlxmoe.convert.allocate import Decision
from mlxmoe.convert.calibrate import Calibration
from mlxmoe.convert.config import SENSITIVITIES, TRUNK_BITS, Allocation, ConvertConfig
from mlxmoe.convert.job import Job
from mlxmoe.convert.measure import ExpertErrors, ExpertScores, TrunkErrors, candidate_formats
from mlxmoe.convert.refine import Losses
from mlxmoe.convert.sensitivity import expert_benefits, score_losses
from mlxmoe.convert.source import Source

pytestmark = pytest.mark.usefixtures("short_windows")

SIZE = 640_000
LEVELS = (2, 3, 4, 6)
SMALL = {"num_hidden_layers": 3, "n_routed_experts": 8, "hidden_size": 128, "moe_intermediate_size": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with shared experts, and a text that is never read."""
    path = tmp_path_factory.mktemp("allocation")
    write_architecture(path / "source", "deepseek_v3", **SMALL)
    (path / "text.txt").write_text("the experts of a layer are chosen by its router for every token. " * 60)
    return path


def measurements(source: Source, seed: int = 0) -> Losses:
    """As if measured: losses that fall by a factor of four per bit and spread over two orders of magnitude from expert to
    expert, those of experts a hundred times those of the trunk; scores that have nothing to do with them."""
    random = np.random.RandomState(seed)
    steps = 0.2 * 4.0 ** (2 - np.array(LEVELS))
    layers = {}
    for site in source.sites:
        shape = (3, site.num_experts)
        norms = 10 ** random.uniform(-1, 1, shape)
        scores = ExpertScores(
            output=random.uniform(0.1, 1, shape)[..., None] * steps,
            outputs=random.uniform(1, 2, site.num_experts),
            weight=random.uniform(0.1, 1, shape)[..., None] * steps,
            energy=random.uniform(1, 2, shape),
            frequency=random.uniform(0.01, 0.5, site.num_experts),
            contribution=random.uniform(0.1, 1, site.num_experts),
            massive=random.uniform(0, 0.5, site.num_experts),
        )
        layers[site.layer] = ExpertErrors(norms, norms[..., None] * steps, norms, scores)
    trunk = [tensor for tensor in source.trunk if tensor.tensor_class]
    errors = np.zeros((len(trunk), 2 * len(TRUNK_BITS)))
    for t, tensor in enumerate(trunk):
        for j, stored in enumerate(candidate_formats(tensor)):
            errors[t, j] = 0.01 * 4.0 ** (2 - stored.bits)
    return Losses(layers, TrunkErrors(np.full(len(trunk), 0.05), errors, np.full(len(trunk), 0.05)))


def job(folder: Path, how: Allocation, size: int = SIZE, mu: float = 0.0) -> Job:
    calibration = Calibration(str(folder / "text.txt"), "0" * 64, tokens=512, mu=mu)
    config = ConvertConfig(size, expert_levels=LEVELS, calibration=calibration, allocation=how)
    return Job(folder / "source", folder / "out", config, quiet=True)


@pytest.fixture(scope="module")
def measured(folder: Path) -> Losses:
    return measurements(job(folder, Allocation()).source)


def decide(folder: Path, measured: Losses, how: Allocation, size: int = SIZE, mu: float = 0.0) -> Decision:
    return job(folder, how, size, mu)._allocator(measured).decide()


def levels(decision: Decision) -> np.ndarray:
    """[layers, E, P]."""
    return np.array([[expert.levels for expert in layer.experts] for layer in decision.plan.layers])


def test_measured_is_best_by_the_loss(folder: Path, measured: Losses) -> None:
    """What is chosen by something else at the same bytes loses more than a tenth, by the loss."""
    best = decide(folder, measured, Allocation())
    others = {name: decide(folder, measured, Allocation(sensitivity=name)) for name in SENSITIVITIES[1:]}
    others |= {method: decide(folder, measured, Allocation(method)) for method in ("uniform", "benefit")}
    for name, other in others.items():
        assert 0.985 * SIZE < other.nbytes <= SIZE, name
        assert other.plan.expected_loss > 1.1 * best.plan.expected_loss, name
        assert len(np.unique(levels(other))) > 1, name


@pytest.mark.parametrize("mu", [1.0, 0.5])
def test_a_nested_file_has_the_trunk_of_a_smaller_one(folder: Path, measured: Losses, mu: float) -> None:
    """Of one with 1 / (1 + mu) of what it has above the smallest, where the trunk costs as much as the experts do."""
    trunk = measured.trunk
    dear = measured._replace(trunk=trunk._replace(errors=100 * trunk.errors, weights=100 * trunk.norms))
    allocator = job(folder, Allocation())._allocator(dear)
    least = allocator._smallest(allocator._lowered()).nbytes
    nested, alone, half = (
        decide(folder, dear, Allocation(), size, mu)
        for size, mu in ((SIZE, mu), (SIZE, 0.0), (least + int((SIZE - least) / (1 + mu)), 0.0))
    )
    assert 0.985 * SIZE < nested.nbytes <= SIZE
    steps = [np.array([TRUNK_BITS.index(e.bits) for e in d.plan.trunk.values()]) for d in (nested, alone, half)]
    assert np.abs(steps[0] - steps[2]).max() <= 1, "what one step more or less leaves over"
    assert abs(steps[0].mean() - steps[2].mean()) < 0.25
    assert steps[0].mean() < steps[1].mean() - 0.5 * mu
    assert levels(nested).mean() > levels(alone).mean()


def test_even_levels(folder: Path, measured: Losses) -> None:
    found = levels(decide(folder, measured, Allocation("uniform")))
    assert (found == found[:, :1]).all()
    assert len(np.unique(found)) > 1


def test_benefit_puts_shared_experts_first_and_serves_in_order(folder: Path, measured: Losses) -> None:
    how = Allocation("benefit")
    decision = decide(folder, measured, how)
    shared = {entry.bits for entry in decision.plan.trunk.values() if entry.tensor_class == "shared"}
    assert shared == {8}
    found = levels(decision)
    assert (found == found[..., :1]).all(), "all matrices of an expert together"
    order = np.argsort(-np.concatenate(expert_benefits(how, list(measured.experts.values()))))
    served = found[..., 0].reshape(-1)[order]
    assert (np.diff(served) <= 0).all()
    assert served[0] > served[-1]


def test_a_score_decides_between_experts(folder: Path, measured: Losses) -> None:
    """Those that gain most by the score have the most bits: within a layer and projection, at equal sizes."""
    how = Allocation(sensitivity="frequency")
    found = levels(decide(folder, measured, how))
    scores = score_losses(how, list(measured.experts.values()))
    for layer, score in zip(found, scores, strict=True):
        for p in range(layer.shape[1]):
            order = np.argsort(-score[p, :, 0])
            assert np.corrcoef(layer[order, p], -np.arange(len(order)))[0, 1] > 0 or len(set(layer[:, p])) == 1


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores are measured, kept by the work folder, and the plan says what was asked."""
    small = {"num_hidden_layers": 2, "hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 4}
    source = write_qwen3(tmp_path / "source", **small)
    arguments = ["--bpw", "6", "--calibration", str(folder / "text.txt"), "--calibration-tokens", "256"]
    arguments += ["--sensitivity", "mix=1,1,2", "--expert-bits", "2,4", "--json"]
    assert convert(source, tmp_path / "out", *arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bytes"] == folder_nbytes(tmp_path / "out")
    assert load_plan(tmp_path / "out").settings["allocation"] == {
        "method": "measured",
        "sensitivity": "mix",
        "shares": [0.25, 0.25, 0.5],
        "refine": 0,
    }


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--sensitivity", "guess"], "--sensitivity guess is not one of"),
        (["--sensitivity", "mix=1,2"], "--sensitivity 'mix=1,2' is not understood"),
        (["--refine", "-1"], "--refine -1 is not a number of rounds"),
        (["--allocation", "benefit"], "measure on text"),
        (["--allocation", "uniform", "--sensitivity", "output"], "uniform does not go by --sensitivity output"),
        (["--allocation", "benefit", "--sensitivity", "ablation"], "benefit does not go by --sensitivity ablation"),
    ],
)
def test_bad_settings(
    more: list[str], expected: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = [] if expected == "measure on text" else ["--calibration", str(folder / "text.txt")]
    arguments = ["--size", str(SIZE), *text, *more]
    assert convert(folder / "source", tmp_path / "out", *arguments) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_even_levels_without_text(folder: Path, tmp_path: Path) -> None:
    assert convert(folder / "source", tmp_path / "out", "--size", str(SIZE), "--allocation", "uniform") == 0
    for layer in load_plan(tmp_path / "out").layers:
        assert len({expert.levels for expert in layer.experts}) == 1
