"""Rotations of a matrix's input side, W x = (W R') (R x): what they are, how a plan names them, and R on activations.

R = M S: signs S = diag(s), then an orthogonal matrix M [B, B] on each of the K / B blocks of B columns. The signs come
before M because behind it they would only mirror the quantized values: two replicas would then have the same error.

    none                    B = 1, M = 1
    random                  B = K, Q of a QR decomposition of a Gaussian matrix, its columns signed so that diag(R) > 0: then
                            Q is spread evenly over all orthogonal matrices (Mezzadri, math-ph/0609050, section 5)
    hadamard                B = K, a power of two: Sylvester's matrix / sqrt(K)
    randomised-hadamard     the same behind random signs (QuIP#, arXiv 2402.04396, section 3)
    block-hadamard-64, -128 random signs, then Sylvester's matrix on blocks (the runtime's kernel `hadamard_blocks`)
    dfrot-50 ... dfrot-200  fitted to activations, see convert/rotate.py (arXiv 2412.00648)
    dfrot-adaptive          the one of these with the least weighted error of the given weights

The Hadamard ones are known by name and seed. Of the others the matrix is stored: a QR decomposition may differ in its last
bits from machine to machine. Which rotation pays is convert/rotate.py's question.

Shapes: K columns, B block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxmoe.errors import UserError

GAMMAS = (50, 100, 150, 200)
PLAIN = ("none", "random", "hadamard", "randomised-hadamard", "block-hadamard-64", "block-hadamard-128")
FITTED = (*(f"dfrot-{gamma}" for gamma in GAMMAS), "dfrot-adaptive")
NAMES = (*PLAIN, *FITTED)
STORED = ("random", *FITTED)  # no rule gives their matrix
STORED_NBYTES = 2  # float16


class Rotation(NamedTuple):
    """R = M S on rows of K values: signs float32 [K], block float32 [B, B] orthogonal, B dividing K."""

    name: str
    signs: np.ndarray
    block: np.ndarray

    @property
    def nbytes(self) -> int:
        """What a file needs for it: a bit a sign; a block that no rule gives as float16."""
        stored = STORED_NBYTES * self.block.size if self.name in STORED else 0
        return -(-int((self.signs < 0).any()) * len(self.signs) // 8) + stored


IDENTITY = Rotation("none", np.ones(1, np.float32), np.ones((1, 1), np.float32))  # for any number of columns


class RotationRule(NamedTuple):
    """A rotation as a plan has it. crc32: of the stored matrix, 0 where a rule gives it."""

    name: str = "none"
    seed: int = 0
    crc32: int = 0


class LayerRotations(NamedTuple):
    """Of one layer's experts: of their input, which all projections but the last read, and of the hidden values."""

    inputs: RotationRule = RotationRule()
    hidden: RotationRule = RotationRule()


UNROTATED = LayerRotations()


# ---------------------------------------------------------------------------------------------------------------------
# On weights and moments, in numpy
# ---------------------------------------------------------------------------------------------------------------------


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
    """float32 [size] of +1 and -1: the top bits of PCG64's 32-bit halves, low half first.

    NumPy promises the bits of a bit generator for all versions, and none of what is drawn from them: files depend on it.
    """
    words = np.random.PCG64(seed).random_raw(-(-size // 2)).astype("<u8").view("<u4")[:size]
    return np.where(words >> 31, np.float32(1), np.float32(-1))


def rotation_signs(name: str, columns: int, seed: int) -> np.ndarray:
    """float32 [K]: the signs of a rotation of NAMES."""
    signed = name == "randomised-hadamard" or name.startswith("block-")
    return random_signs(columns, seed) if signed else np.ones(columns, np.float32)


def hadamard_size(name: str, columns: int) -> int:
    """Columns B of a block of a Hadamard rotation of NAMES, 0 for the others."""
    if name.startswith("block-"):
        return int(name.rpartition("-")[2])
    return columns if name in ("hadamard", "randomised-hadamard") else 0


def plain_rotation(name: str, columns: int, seed: int = 0) -> Rotation:
    """A rotation of PLAIN for K columns. Raises UserError for another name and for columns that it does not fit."""
    if name not in PLAIN:
        raise UserError(f"{name!r} is no plain rotation", f"choose among {', '.join(PLAIN)}")
    signs, size = rotation_signs(name, columns, seed), hadamard_size(name, columns)
    if name == "none":
        return Rotation(name, signs, np.ones((1, 1), np.float32))
    if name == "random":
        return Rotation(name, signs, random_orthogonal(columns, seed))
    if columns % size:
        raise UserError(f"{name} does not fit {columns} columns", f"{size} must divide them; try block-hadamard-64")
    return Rotation(name, signs, sylvester(size))


def fits(name: str, columns: int) -> bool:
    """Whether a rotation of NAMES can be had for K columns."""
    if name in ("hadamard", "randomised-hadamard") or name.startswith("dfrot"):
        return columns & (columns - 1) == 0
    return not name.startswith("block-") or columns % hadamard_size(name, columns) == 0


# ---------------------------------------------------------------------------------------------------------------------
# On activations, in MLX
# ---------------------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """R on activations: signs float32 [K], then the Hadamard transform of blocks of `block` values, or (block 0) the
    matrix [1, K, K], transposed, in the activations' type."""

    signs: mx.array
    block: int
    matrix: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] -> R x of the same type. A row does not depend on the others, to the last bit."""
        if self.matrix is not None:
            rows = x.reshape(-1, 1, x.shape[-1])
            # gather_mm makes a product of its own of every row; a matrix product rounds differently with their number.
            return mx.gather_mm(rows, self.matrix, rhs_indices=mx.zeros((len(rows),), mx.uint32)).reshape(x.shape)
        blocks = (x.astype(mx.float32) * self.signs).reshape(*x.shape[:-1], -1, self.block)
        return mx.hadamard_transform(blocks, scale=self.block**-0.5).reshape(x.shape).astype(x.dtype)


@dataclass(frozen=True)
class LayerTurns:
    """Of one layer's experts, None where there is nothing to do. (No tuple: a module looks those up through its dict.)"""

    inputs: Turn | None = None
    hidden: Turn | None = None


def make_turn(rule: RotationRule, columns: int, matrix: np.ndarray | None, dtype: mx.Dtype) -> Turn | None:
    """The rotation of a plan for activations of a type; `matrix` [K, K]: the stored one, where no rule gives it."""
    if rule.name == "none":
        return None
    signs = mx.array(rotation_signs(rule.name, columns, rule.seed))
    if rule.name not in STORED:
        return Turn(signs, hadamard_size(rule.name, columns))
    assert matrix is not None
    return Turn(signs, 0, mx.array(matrix.astype(np.float32).T[None]).astype(dtype))


def turn_nbytes(rule: RotationRule, columns: int, dtype: mx.Dtype) -> int:
    """Bytes of memory of a Turn."""
    if rule.name == "none":
        return 0
    return 4 * columns + (columns * columns * dtype.size if rule.name in STORED else 0)


NO_TURNS = LayerTurns()


def turned(x: mx.array, turn: Turn | None) -> mx.array:
    """R x, or x where there is no rotation."""
    return x if turn is None else turn(x)
