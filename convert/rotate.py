"""Rotations of a matrix's input side, W x = (W R') (R x): which there are, and whether one pays.

A rotation spreads what stands out in few columns over all of them. For weights that are near Gaussian there is nothing to
spread, and weights with lighter tails than that get worse, so `choose_rotation` measures with the real quantizer and keeps
"none" unless the weighted error of the outputs falls by more than 0.3 dB.

R = M S: signs S = diag(s), then an orthogonal matrix M [B, B] on each of the K / B blocks of B columns. The signs come
before M because behind it they would only mirror the quantized values: two replicas would then have the same error.

    none                    B = 1, M = 1
    random                  B = K, Q of a QR decomposition of a Gaussian matrix, its columns signed so that diag(R) > 0: then
                            Q is spread evenly over all orthogonal matrices (Mezzadri, math-ph/0609050, section 5)
    hadamard                B = K, a power of two: Sylvester's matrix / sqrt(K)
    randomised-hadamard     the same behind random signs (QuIP#, arXiv 2402.04396, section 3)
    block-hadamard-64, -128 random signs, then Sylvester's matrix on blocks (the runtime's kernel `hadamard_blocks`)
    dfrot-50 ... dfrot-200  fitted to activations, see `dfrot` (arXiv 2412.00648)
    dfrot-adaptive          the one of these with the least weighted error of the given weights

Where R can be had for nothing: before gate and up it may be fused offline into everything that reads and writes the
residual stream (embedding, attention, router, shared and routed experts, head), once the gains of the norms are folded
into what follows them; one R then serves all experts. Before down, behind the activation, it must be applied online; the
block forms cost 6 or 7 additions a value. A rotation of its own per replica always costs one online transform per replica.

Shapes: K columns, N rows, E experts, T tokens, B block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlxmoe.convert.gptq import curvature, decoded, output_errors, quantize, symmetric_code
from mlxmoe.convert.quantize import clip_search
from mlxmoe.errors import UserError

GAMMAS = (50, 100, 150, 200)
PLAIN = ("none", "random", "hadamard", "randomised-hadamard", "block-hadamard-64", "block-hadamard-128")
FITTED = (*(f"dfrot-{gamma}" for gamma in GAMMAS), "dfrot-adaptive")
NAMES = (*PLAIN, *FITTED)
WORTHWHILE_DB = 0.3  # less is within what another seed changes
MASSIVE_SHARE = 0.25  # a Gaussian token of 64 values or more stays far below
_ACTIVATION_BITS = 4  # what DFRot's objective quantizes activations to
_ITERATIONS = 20
_LEAST_DROP = 1e-3  # relative: a step that gains less ends the fit


class Rotation(NamedTuple):
    """R = M S on rows of K values: signs float32 [K], block float32 [B, B] orthogonal, B dividing K."""

    name: str
    signs: np.ndarray
    block: np.ndarray

    @property
    def nbytes(self) -> int:
        """What a file needs for it: a bit a sign; a block that no rule gives as float16."""
        ruled = self.name in PLAIN and self.name != "random"
        return -(-int((self.signs < 0).any()) * len(self.signs) // 8) + (0 if ruled else 2 * self.block.size)


class Choice(NamedTuple):
    """The rotation chosen by name, and what every candidate gains on none, in dB of weighted output error."""

    name: str
    gains: dict[str, float]


def rotate(x: np.ndarray, rotation: Rotation) -> np.ndarray:
    """R applied to rows: x [..., K] -> float32 [..., K]. Activations x become R x, rows of W become those of W R'."""
    if rotation.name == "none":
        return x.astype(np.float32, copy=False)
    blocks = (x * rotation.signs).reshape(*x.shape[:-1], -1, len(rotation.block))
    return (blocks @ rotation.block.T).astype(np.float32, copy=False).reshape(x.shape)


def unrotate(x: np.ndarray, rotation: Rotation) -> np.ndarray:
    """R' applied to rows: the inverse of `rotate`."""
    if rotation.name == "none":
        return x.astype(np.float32, copy=False)
    blocks = x.reshape(*x.shape[:-1], -1, len(rotation.block)) @ rotation.block
    return (blocks.reshape(x.shape) * rotation.signs).astype(np.float32, copy=False)


def dense(rotation: Rotation) -> np.ndarray:
    """R as a float32 matrix [K, K]."""
    return np.ascontiguousarray(rotate(np.eye(len(rotation.signs), dtype=np.float32), rotation).T)


def rotate_moments(moments: np.ndarray, rotation: Rotation) -> np.ndarray:
    """Second moments of the inputs [..., K, K] -> those of the rotated inputs, R H R'."""
    return rotate(rotate(moments, rotation).swapaxes(-1, -2), rotation).swapaxes(-1, -2)


def sylvester(size: int) -> np.ndarray:
    """float32 [size, size]: Sylvester's Hadamard matrix / sqrt(size). Raises UserError unless size is a power of two."""
    if size < 1 or size & (size - 1):
        raise UserError(
            f"there is no Hadamard rotation of {size} columns here: {size} is not a power of two",
            "use block-hadamard-64 or block-hadamard-128",
        )
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(np.sqrt(size))


def random_orthogonal(size: int, seed: int) -> np.ndarray:
    """float32 [size, size], spread evenly over all orthogonal matrices."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    return (q * np.where(np.diag(r) < 0, -1.0, 1.0)).astype(np.float32)


def random_signs(size: int, seed: int) -> np.ndarray:
    """float32 [size] of +1 and -1."""
    return np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), size)


def plain_rotation(name: str, columns: int, seed: int = 0) -> Rotation:
    """A rotation of PLAIN for K columns. Raises UserError for another name and for columns that it does not fit."""
    ones = np.ones(columns, np.float32)
    if name == "none":
        return Rotation(name, ones, np.ones((1, 1), np.float32))
    if name == "random":
        return Rotation(name, ones, random_orthogonal(columns, seed))
    if name == "hadamard":
        return Rotation(name, ones, sylvester(columns))
    if name == "randomised-hadamard":
        return Rotation(name, random_signs(columns, seed), sylvester(columns))
    if name in PLAIN:
        size = int(name.rpartition("-")[2])
        if columns % size:
            raise UserError(f"{name} does not fit {columns} columns", f"{size} must divide them; try block-hadamard-64")
        return Rotation(name, random_signs(columns, seed), sylvester(size))
    raise UserError(f"{name!r} is no plain rotation", f"choose among {', '.join(PLAIN)}")


def fits(name: str, columns: int) -> bool:
    """Whether a rotation of NAMES can be had for K columns."""
    if name in ("hadamard", "randomised-hadamard") or name.startswith("dfrot"):
        return columns & (columns - 1) == 0
    return not name.startswith("block-") or columns % int(name.rpartition("-")[2]) == 0


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
