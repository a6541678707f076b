"""Products of the plane format: reference against dequantized weights, the fast path against the reference, and
ExpertLayer against mlx-lm's SwitchGLU and SwitchMLP."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from mlxmoe.banks import MergedBank
from mlxmoe.convert.write import pack_matrix
from mlxmoe.experts import SORT_FROM, Bucket, ExpertLayer, PlaneLinear
from mlxmoe.formats import (
    LEVELS,
    PLANE_WIDTHS,
    MatrixShape,
    PackedMatrix,
    field_width,
    join_planes,
    level_scale,
    num_planes,
    pack_codes,
    unpack_codes,
)
from mlxmoe.reference import mixed_product, plane_product, truncation_levels, unpack
from mlxmoe.residency import merged_storage

# float32 sums of K products in another order: error per output against the largest output
TOLERANCE = 2e-5


def make_matrix(rows: int, columns: int, group_size: int, level: int, seed: int) -> PackedMatrix:
    weight = np.random.RandomState(seed).standard_normal((rows, columns)).astype(np.float32)
    return pack_matrix(weight, MatrixShape("w", rows, columns, group_size), level)[0]


def inputs(rows: int, columns: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.RandomState(100 + seed).standard_normal((rows, columns)).astype(np.float32))


def fill(linear: PlaneLinear, matrices: list[PackedMatrix], levels: list[int], width: int) -> None:
    """Merged codes as the loader makes them: one bucket of `width`-bit fields, or (0) one bucket per width of a level."""
    buckets = []
    widths = [width or field_width(level) for level in levels]
    for bits in sorted(set(widths)):
        experts = [e for e, w in enumerate(widths) if w == bits]
        fields = [merged(matrices[e], levels[e], bits) for e in experts]
        buckets.append((experts, Bucket(bits, *(mx.stack(arrays) for arrays in zip(*fields, strict=True)))))
    linear.fill(buckets)


def merged(matrix: PackedMatrix, level: int, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    """Words, scales and biases of one matrix in fields of `bits`, 16 as two of 8 in rows one below the other."""
    planes = [
        unpack_codes(words, w, matrix.shape.columns)
        for words, w in zip(matrix.planes[: num_planes(level)], PLANE_WIDTHS, strict=False)
    ]
    codes = join_planes(planes)
    scales = matrix.scales.astype(mx.float32) * level_scale(matrix.level, level, matrix.gains.get(level, 1.0))
    if bits <= 8:
        return pack_codes(codes, bits), scales, -scales * ((1 << level) - 1) / 2
    low = max(level - 8, 0)
    words = [pack_codes(codes >> low, 8), pack_codes(codes & ((1 << low) - 1), 8)]
    units = [scales * (1 << low), scales * (low > 0)]
    biases = [-unit * ((1 << width) - 1) / 2 for unit, width in zip(units, (level - low, low), strict=True)]
    return tuple(mx.concatenate(parts) for parts in (words, units, biases))  # type: ignore[return-value]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from((1, 31, 32, 33)),
    groups=st.integers(1, 3),
    group_size=st.sampled_from((32, 64, 128)),
    level=st.sampled_from(LEVELS),
    tokens=st.sampled_from((1, 3)),
    data=st.data(),
)
def test_plane_sum_is_the_product(
    rows: int, groups: int, group_size: int, level: int, tokens: int, data: st.DataObject
) -> None:
    """The sum of MLX products over planes equals x @ dequantized weights, at every level of the code."""
    lower = data.draw(st.sampled_from(truncation_levels(level)))
    matrix = make_matrix(rows, groups * group_size, group_size, level, seed=rows)
    x = inputs(tokens, groups * group_size)
    wanted = x @ unpack(matrix, lower).T
    found = plane_product(x, matrix, lower)
    assert mx.abs(found - wanted).max() < TOLERANCE * max(1.0, float(mx.abs(wanted).max()))


@pytest.mark.parametrize("width", [0, 16], ids=["a bucket per width", "one width"])
@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_mixed_levels_in_one_call(width: int, tokens: int, group_size: int) -> None:
    """Experts of all levels, some truncated, in one call of the layer: equal to the reference row by row."""
    written, levels = [2, 3, 4, 6, 8, 8, 4, 16, 16, 16], [2, 3, 4, 6, 8, 2, 3, 16, 12, 4]
    matrices = [make_matrix(40, 256, group_size, level, seed=e) for e, level in enumerate(written)]
    linear = PlaneLinear(matrices[0].shape, len(matrices), has_bias=False)
    fill(linear, matrices, levels, width)
    chosen = np.random.RandomState(tokens).randint(0, len(matrices), tokens)
    x = inputs(tokens, 256)
    found = linear(x[:, None, :], mx.array(chosen))[:, 0]
    wanted = mixed_product(x, chosen.tolist(), matrices, levels)
    assert mx.abs(found - wanted).max() < TOLERANCE * float(mx.abs(wanted).max())


def test_wider_fields_change_no_bit() -> None:
    """Widening is free of error: the same codes in wider fields give bit-identical products."""
    levels = [2, 3, 4, 2]
    matrices = [make_matrix(48, 128, 64, level, seed=e) for e, level in enumerate(levels)]
    results = []
    for width in (0, 4, 6, 8, 16):
        linear = PlaneLinear(matrices[0].shape, 4, has_bias=False)
        fill(linear, matrices, levels, width)
        results.append(linear(inputs(6, 128)[:, None], mx.array([0, 1, 2, 3, 2, 0])))
    assert all(mx.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("width", [0, 16])
def test_2_4_and_16_bits_in_one_call_against_dequantized_weights(width: int) -> None:
    """The banks that the loader fills, against the weights that the codes stand for; 16 bits are those of the source."""
    source = [np.random.RandomState(e).standard_normal((40, 128)).astype(np.float32) for e in range(3)]
    levels = [2, 4, 16]
    packed = [pack_matrix(w, MatrixShape("w", 40, 128, 64), level)[0] for w, level in zip(source, levels, strict=True)]
    linear = PlaneLinear(packed[0].shape, 3, has_bias=False)
    buckets = []
    for bits in sorted({width or level for level in levels}):
        experts = [e for e, level in enumerate(levels) if (width or level) == bits]
        bank = MergedBank(packed[0].shape, bits, len(experts), mx.float32)
        for row, e in enumerate(experts):
            planes = [np.array(words).view(np.uint8).reshape(-1) for words in packed[e].planes]
            bank.write(row, planes, np.array(packed[e].scales), 1.0)
        buckets.append((experts, bank.arrays))
    linear.fill(buckets)
    assert linear.nbytes == sum(merged_storage(mx.float32).nbytes(packed[0].shape, width or level) for level in levels)
    x, chosen = inputs(9, 128), [0, 2, 1, 2, 2, 0, 1, 0, 2]
    found = linear(x[:, None], mx.array(chosen))[:, 0]
    values = [np.array(unpack(matrix, level)) for matrix, level in zip(packed, levels, strict=True)]
    wanted = np.stack([values[e] @ np.array(x[t]) for t, e in enumerate(chosen)])
    np.testing.assert_allclose(np.array(found), wanted, atol=TOLERANCE * np.abs(wanted).max())
    original = source[2] @ np.array(x[1])
    np.testing.assert_allclose(np.array(found[1]), original, atol=1e-3 * np.abs(original).max())


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("level", [10, 12, 14, 16])
def test_a_bank_loses_nothing_above_8_bits(level: int, dtype: mx.Dtype) -> None:
    """What the two fields stand for is the code's value, to the last bit, also where scales and biases have 16 bits."""
    matrix = make_matrix(24, 128, 32, 16, seed=level)
    bank = MergedBank(matrix.shape, 16, 1, dtype)
    planes = [np.array(words).view(np.uint8).reshape(-1) for words in matrix.planes[: num_planes(level)]]
    bank.write(0, planes, np.array(matrix.scales), level_scale(16, level, matrix.gains.get(level, 1.0)))
    codes = unpack_codes(bank.arrays.words[0], 8, 128).astype(mx.float32).reshape(48, 4, 32)
    scales, biases = (array[0].astype(mx.float32)[..., None] for array in bank.arrays[2:])
    fields = np.array(codes * scales + biases, np.float64).reshape(2, 24, 128)
    joined = join_planes(
        [unpack_codes(p, w, 128) for p, w in zip(matrix.planes[: num_planes(level)], PLANE_WIDTHS, strict=False)]
    )
    wanted = np.array(joined, np.float64) - (2**level - 1) / 2
    wanted *= np.repeat(np.array(matrix.scales, np.float64) * 2.0 ** (16 - level), 32, axis=1)
    assert (fields.sum(axis=0) == wanted).all()


def test_resident_bytes_and_shape_without_experts() -> None:
    matrices = [make_matrix(32, 64, 64, level, seed=level) for level in (2, 4)]
    linear = PlaneLinear(matrices[0].shape, 2, has_bias=True)
    assert linear.nbytes == 0
    assert linear(mx.zeros((3, 5, 1, 64)), mx.zeros((3, 5), mx.int32)).shape == (3, 5, 1, 32)
    fill(linear, matrices, [2, 4], 0)
    assert linear.nbytes == 32 * 64 * (2 + 4) // 8 + 2 * 2 * 32 * 4
    assert sorted(linear.parameters()) == ["bias"]
    with pytest.raises(AssertionError):
        linear.fill([([0], Bucket(2, mx.zeros((1,)), mx.zeros((1,)), mx.zeros((1,))))])


def layer_pair(kind: str, bias: bool) -> tuple[Any, ExpertLayer]:
    """An mlx-lm layer and ours over the same weights; ours takes over the projections."""
    mx.random.seed(0)
    if kind == "glu":
        switch: Any = SwitchGLU(64, 96, 7, bias=bias)
    else:
        switch = SwitchMLP(64, 96, 7, activation=nn.relu2 if hasattr(nn, "relu2") else nn.relu, bias=bias)
    if bias:
        switch.update(
            {name: {"bias": mx.random.normal(m.bias.shape)} for name, m in switch.children().items() if "bias" in m}
        )
    return switch, ExpertLayer.from_switch(switch)


@pytest.mark.parametrize("kind", ["glu", "mlp"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(1, 1), (2, 3), (4, SORT_FROM), (5,)], ids=str)
def test_same_outputs_as_mlx_lm(kind: str, bias: bool, lead: tuple[int, ...]) -> None:
    switch, layer = layer_pair(kind, bias)
    x = mx.random.normal((*lead, 64))
    indices = mx.array(np.random.RandomState(1).randint(0, 7, (*lead, 3)))
    wanted, found = switch(x, indices), layer(x, indices)
    assert found.shape == wanted.shape == (*lead, 3, 64)
    assert mx.abs(found - wanted).max() < 1e-5


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stock_quantized_experts(bits: int) -> None:
    """A stock MLX checkpoint's experts (affine) run in our layer as they are, and its bytes are counted."""
    switch, _ = layer_pair("glu", bias=False)
    nn.quantize(switch, group_size=32, bits=bits)
    layer = ExpertLayer.from_switch(switch)
    x, indices = mx.random.normal((2, 64)), mx.array([[0, 6], [3, 3]])
    assert mx.abs(layer(x, indices) - switch(x, indices)).max() < 1e-5
    assert layer.nbytes == 7 * 3 * 64 * 96 * bits // 8 + 7 * 3 * 64 * 96 // 32 * 8
    assert layer.num_experts == 7


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """Above SORT_FROM pairs are sorted by expert and back: every row as if it were alone."""
    _, layer = layer_pair("glu", bias=False)
    x = mx.random.normal((40, 64))
    indices = mx.array(np.random.RandomState(2).randint(0, 7, (40, 2)))
    together = layer(x, indices)
    alone = mx.concatenate([layer(x[t : t + 1], indices[t : t + 1]) for t in range(40)])
    assert mx.abs(together - alone).max() < 1e-5


def test_activation_gets_up_then_gate() -> None:
    """mlx-lm calls the activation as (up, gate); swapping them would still give plausible numbers."""
    seen: list[mx.array] = []

    def spy(up: mx.array, gate: mx.array) -> mx.array:
        seen.extend([up, gate])
        return up * gate

    switch = SwitchGLU(64, 96, 3, activation=spy)
    layer = ExpertLayer.from_switch(switch)
    x, indices = mx.random.normal((1, 64)), mx.array([[1]])
    layer(x, indices)
    wanted_up = x @ switch.up_proj.weight[1].T
    assert mx.abs(seen[0].reshape(-1) - wanted_up.reshape(-1)).max() < 1e-5


@pytest.mark.parametrize("levels", [[2, 2], [2, 4]])
def test_the_product_with_an_expert_that_is_nowhere_is_zero(levels: list[int]) -> None:
    """One bucket without all experts, and two."""
    shape = MatrixShape("w", 8, 64, 64)
    matrices = [make_matrix(8, 64, 64, level, e) for e, level in enumerate(levels)]
    linear = PlaneLinear(shape, 4, has_bias=False, partial=True)
    fill(linear, matrices, levels, 0)
    x = inputs(4, 64)[:, None]
    indices = mx.array([0, 1, 2, 3])
    y = linear(x, indices)
    full = PlaneLinear(shape, 2, has_bias=False)
    fill(full, matrices, levels, 0)
    assert mx.array_equal(y[:2], full(x[:2], indices[:2]))
    assert not y[2:].any().item()
