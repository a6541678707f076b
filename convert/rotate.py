"""Which rotation of a matrix's input side pays, and those that are fitted to activations. What they are: mlxmoe/rotation.py.

A rotation spreads what stands out in few columns over all of them. For weights that are near Gaussian there is nothing to
spread, and weights with lighter tails than that get worse, so `choose_rotation` measures with the real quantizer and keeps
"none" unless the weighted error of the outputs falls by more than 0.3 dB.

Where R can be had for nothing: before gate and up it may be fused offline into everything that reads and writes the
residual stream (embedding, attention, router, shared and routed experts, head), once the gains of the norms are folded
into what follows them; one R then serves all experts. Before down, behind the activation, it must be applied online; the
block forms cost 6 or 7 additions a value. A rotation of its own per replica always costs one online transform per replica.

Shapes: K columns, N rows, E experts, T tokens, B block.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mlxmoe.convert.gptq import curvature, decoded, output_errors, quantize, symmetric_code
from mlxmoe.convert.quantize import clip_search
from mlxmoe.errors import UserError
from mlxmoe.formats import MatrixShape
from mlxmoe.rotation import (
    FITTED,
    GAMMAS,
    IDENTITY,
    NAMES,
    PLAIN,
    STORED,
    LayerRotations,
    Rotation,
    RotationRule,
    dense,
    fits,
    plain_rotation,
    rotate,
    rotate_moments,
    rotation_signs,
)

AUTO = "auto"
CHOICES = (AUTO, *NAMES)
# Of AUTO: they cost no bytes
CANDIDATES = ("hadamard", "randomised-hadamard", "block-hadamard-64", "block-hadamard-128")

WORTHWHILE_DB = 0.3  # less is within what another seed changes
MASSIVE_SHARE = 0.25  # a Gaussian token of 64 values or more stays far below
_ACTIVATION_BITS = 4  # what DFRot's objective quantizes activations to
_ITERATIONS = 20
_LEAST_DROP = 1e-3  # relative: a step that gains less ends the fit


class Choice(NamedTuple):
    """The rotation chosen by name, and what every candidate gains on none, in dB of weighted output error."""

    name: str
    gains: dict[str, float]


# ---------------------------------------------------------------------------------------------------------------------
# DFRot
# ---------------------------------------------------------------------------------------------------------------------


def quantized_activations(x: np.ndarray, bits: int, clip: float = 1.0) -> np.ndarray:
    """float32 [..., K]: every token rounded to 2^bits - 1 even steps about zero, the last at its largest value * `clip`."""
    top = (1 << (bits - 1)) - 1
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.finfo(np.float32).tiny) * np.float32(clip / top)
    return (np.clip(np.rint(x / scale), -top, top) * scale).astype(np.float32, copy=False)


def token_errors(x: np.ndarray, bits: int = _ACTIVATION_BITS) -> np.ndarray:
    """float64 [T]: ||x_t - Q(x_t)||^2."""
    return np.square(x - quantized_activations(x, bits)).sum(axis=-1, dtype=np.float64)


def massive_tokens(x: np.ndarray) -> np.ndarray:
    """bool [T] of activations [T, K]: tokens whose largest value holds more than MASSIVE_SHARE of their energy.

    DFRot, section 3: with a few huge values most others are rounded to nothing, which costs such a token little, and a
    rotation spreads the huge values over all. The published code finds them by a 4-bit error below a number fitted to each
    model; the share of energy needs none.
    """
    squares = np.square(x.astype(np.float64))
    return squares.max(axis=-1) > MASSIVE_SHARE * squares.sum(axis=-1)


def dfrot_loss(x: np.ndarray, massive: np.ndarray, gamma: float) -> float:
    """sum over ordinary t of ||x_t - Q(x_t)||^2 + gamma * the same over massive t, of rotated activations [T, K]."""
    errors = token_errors(x)
    return float(errors[~massive].sum() + gamma * errors[massive].sum())


def dfrot(inputs: np.ndarray, gamma: float, seed: int = 0, iterations: int = _ITERATIONS) -> Rotation:
    """The rotation that DFRot fits to activations [T, K] (arXiv 2412.00648, eq. 6 and algorithm 1).

    From a randomised Hadamard matrix R: with A = D X R', D = sqrt(gamma) on massive tokens and 1 elsewhere, and
    B = D Q(X R'), the orthogonal P that takes A nearest to B is U V' of the SVD A' B = U S V' (Procrustes); R <- P' R while
    the loss falls.
    (The published code has gamma in D, hence gamma^2 in the loss; here gamma is the paper's.) Its objective is the error of
    4-bit activations. K must be a power of two.
    """
    start = plain_rotation("randomised-hadamard", inputs.shape[-1], seed)
    massive = massive_tokens(inputs)
    weight = np.where(massive, np.float32(gamma), np.float32(1.0))[:, None]
    matrix, x = dense(start), rotate(inputs, start)
    least = dfrot_loss(x, massive, gamma)
    for _ in range(iterations):
        u, _, v = np.linalg.svd((x * weight).T.astype(np.float64) @ quantized_activations(x, _ACTIVATION_BITS))
        turn = (u @ v).astype(np.float32)
        turned = x @ turn
        loss = dfrot_loss(turned, massive, gamma)
        if not loss < least * (1 - _LEAST_DROP):
            break
        matrix, x, least = turn.T @ matrix, turned, loss
    return Rotation(f"dfrot-{gamma:g}", np.ones(inputs.shape[-1], np.float32), matrix)


# ---------------------------------------------------------------------------------------------------------------------
# What pays
# ---------------------------------------------------------------------------------------------------------------------


def rotated_error(
    weights: np.ndarray, second_moments: np.ndarray, rotation: Rotation, bits: int, group_size: int
) -> float:
    """Weighted error of the outputs, sum over experts of tr(D H D'), that the converter's own coding leaves.

    weights float32 [E, N, K], second_moments float32 [E or 1, K, K]. GPTQ feedback and one sweep of coordinate descent.
    """
    stack = rotate(weights, rotation)
    curved = curvature(
        np.broadcast_to(rotate_moments(second_moments, rotation), (len(stack), *second_moments.shape[1:]))
    )
    scales, _ = clip_search(stack.reshape(-1, group_size), bits)
    start = scales.astype(np.float32).reshape(*stack.shape[:2], -1)
    code = symmetric_code(bits)
    coded = quantize(stack, curved, start, np.zeros_like(start), code, sweeps=1)
    errors = output_errors(stack - decoded(coded, code), curved.hessian, np.ones(stack.shape[:2]))
    return float(errors.sum())


def make_rotation(
    name: str,
    columns: int,
    seed: int = 0,
    inputs: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    second_moments: np.ndarray | None = None,
    bits: int = 2,
    group_size: int = 128,
) -> Rotation:
    """Any rotation of NAMES. The fitted ones need `inputs` [T, K], the adaptive one what `rotated_error` does as well.

    Raises UserError for an unknown name, unfit columns and missing activations.
    """
    if name not in FITTED:
        return plain_rotation(name, columns, seed)
    if inputs is None or not len(inputs):
        raise UserError(f"{name} is fitted to activations and there are none", "give calibration text")
    if name != "dfrot-adaptive":
        return dfrot(inputs, float(name.rpartition("-")[2]), seed)
    assert weights is not None
    assert second_moments is not None
    return adaptive([dfrot(inputs, gamma, seed) for gamma in GAMMAS], weights, second_moments, bits, group_size)


def adaptive(
    fitted: Sequence[Rotation], weights: np.ndarray, second_moments: np.ndarray, bits: int, group_size: int
) -> Rotation:
    """Of rotations fitted with several gammas the one with the least weighted error, as "dfrot-adaptive"."""
    losses = [rotated_error(weights, second_moments, rotation, bits, group_size) for rotation in fitted]
    return fitted[int(np.argmin(losses))]._replace(name="dfrot-adaptive")


def choose_rotation(
    weights: np.ndarray,
    second_moments: np.ndarray,
    names: Sequence[str] = PLAIN,
    inputs: np.ndarray | None = None,
    bits: int = 2,
    group_size: int = 128,
    seed: int = 0,
) -> Choice:
    """The rotation that one class of matrices [E, N, K] is better off with, by measurement on it; names that do not fit K
    are left out. "none" unless the best gains more than WORTHWHILE_DB. second_moments [E or 1, K, K], inputs [T, K]."""
    columns = weights.shape[-1]

    def error(name: str) -> float:
        rotation = make_rotation(name, columns, seed, inputs, weights, second_moments, bits, group_size)
        return rotated_error(weights, second_moments, rotation, bits, group_size)

    base = error("none")
    gains = {"none": 0.0}
    for name in names:
        if name != "none" and fits(name, columns):
            gains[name] = float(10 * np.log10(max(base, 1e-300) / max(error(name), 1e-300)))
    best = max(gains, key=lambda name: gains[name])
    return Choice(best if gains[best] > WORTHWHILE_DB else "none", gains)


# ---------------------------------------------------------------------------------------------------------------------
# Of a layer
# ---------------------------------------------------------------------------------------------------------------------


class Rotated(NamedTuple):
    """The rotations of one layer's experts: of the input, which all projections but the last read, and of the hidden
    values, the last one's input."""

    inputs: Rotation
    hidden: Rotation

    def of(self, projection: int, count: int) -> Rotation:
        """What the columns of one of `count` projections are rotated by."""
        return self.hidden if projection == count - 1 else self.inputs

    def rules(self, seed: int) -> LayerRotations:
        """For the plan."""
        return LayerRotations(*(RotationRule(r.name, 0 if r.name == "none" else seed, _crc32(r)) for r in self))

    def arrays(self) -> dict[str, np.ndarray]:
        """An artefact that `from_arrays` reads: names, and the matrices that no rule gives."""
        stored = {place: matrix_of(rotation) for place, rotation in self._asdict().items() if rotation.name in STORED}
        return {"names": np.array([rotation.name for rotation in self]), **stored}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], shapes: Sequence[MatrixShape], seed: int) -> Rotated:
        names = [str(name) for name in arrays["names"]]
        return cls(
            *(
                Rotation(name, rotation_signs(name, shape.columns, seed), arrays[place].astype(np.float32))
                if name in STORED
                else plain_rotation(name, shape.columns, seed)
                for place, name, shape in zip(cls._fields, names, (shapes[0], shapes[-1]), strict=True)
            )
        )


UNTURNED = Rotated(IDENTITY, IDENTITY)


def longest_rules(name: str, seed: int) -> LayerRotations:
    """What the plan will say of a layer, at its longest: AUTO has not chosen yet, checksums are not known."""
    longest = max(CANDIDATES, key=len) if name == AUTO else name
    rule = RotationRule(longest, 0 if longest == "none" else seed, 2**32 - 1 if longest in STORED else 0)
    return LayerRotations(rule, rule)


def matrix_of(rotation: Rotation) -> np.ndarray:
    """float16 [K, K]: the matrix of a rotation as a file holds it."""
    return rotation.block.astype(np.float16)


def _crc32(rotation: Rotation) -> int:
    return zlib.crc32(matrix_of(rotation).tobytes()) if rotation.name in STORED else 0


def as_stored(rotation: Rotation) -> Rotation:
    """With the matrix that the file will hold: weights are coded for that one."""
    if rotation.name not in STORED:
        return rotation
    return rotation._replace(block=matrix_of(rotation).astype(np.float32))


class Sample(NamedTuple):
    """What a rotation is chosen by, of matrices that read the same values: weights float32 [E, N, K], second moments of
    their inputs [E, K, K], and inputs [T, K] for rotations that are fitted to them."""

    weights: np.ndarray
    second_moments: np.ndarray
    inputs: np.ndarray | None = None


def unsampled_rotation(name: str, shapes: Sequence[MatrixShape], seed: int) -> Rotated:
    """A layer's rotations by a name of PLAIN, without any text."""
    return Rotated(*(as_stored(plain_rotation(name, shape.columns, seed)) for shape in (shapes[0], shapes[-1])))


def sampled_rotation(
    name: str, shapes: Sequence[MatrixShape], samples: tuple[Sample, Sample], bits: int, seed: int
) -> Rotated:
    """A layer's rotations by any name, or by what pays among CANDIDATES for codes of `bits` (AUTO). `samples`: of the
    input's matrices and of the hidden values'."""

    def made(shape: MatrixShape, sample: Sample) -> Rotation:
        chosen = name
        if name == AUTO:
            chosen = choose_rotation(
                *(sample.weights, sample.second_moments, CANDIDATES), bits=bits, group_size=shape.group_size, seed=seed
            ).name
        return as_stored(
            make_rotation(
                *(chosen, shape.columns, seed, sample.inputs, sample.weights, sample.second_moments),
                bits=bits,
                group_size=shape.group_size,
            )
        )

    return Rotated(made(shapes[0], samples[0]), made(shapes[-1], samples[1]))


def chosen_rotations(layers: Sequence[LayerRotations]) -> str:
    """What AUTO has chosen, for people."""
    parts = []
    for what, rules in zip(("input", "hidden values"), zip(*layers, strict=True), strict=True):
        counts = Counter(rule.name for rule in rules).most_common()
        parts.append(f"{what} {', '.join(f'{name} in {count}' for name, count in counts)}")
    return f"rotations, by layers: {'; '.join(parts)}"


def check_rotation(name: str, shapes: Sequence[MatrixShape]) -> None:
    """Raises UserError for a name that does not fit the matrices of a layer."""
    for shape in (shapes[0], shapes[-1]):
        if name != AUTO and not fits(name, shape.columns):
            wants = "a multiple of the block" if name.startswith("block-") else "a power of two"
            raise UserError(
                f"--rotation {name} does not fit the {shape.columns} columns of {shape.name}, which are not {wants}",
                "try --rotation block-hadamard-64, random or auto",
            )
