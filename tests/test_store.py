"""Records on disk: valid, aligned safetensors that plain readers read, and every damage noticed."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from mlxmoe.convert.write import pack_matrix, pack_record
from mlxmoe.errors import UserError
from mlxmoe.formats import LEVELS, PLANE_WIDTHS, MatrixShape, PackedMatrix, num_planes
from mlxmoe.plan import ExpertEntry, LayerPlan
from mlxmoe.reference import unpack
from mlxmoe.store import (
    PAGE,
    ExpertStore,
    SourceLayer,
    Span,
    encode_header,
    layer_file_nbytes,
    layer_header,
    layer_records,
    read_header,
    record_parts,
)

SHAPES = (
    MatrixShape("gate_proj", 48, 64, 64),
    MatrixShape("up_proj", 48, 64, 64),
    MatrixShape("down_proj", 64, 32, 32),
)


def make_layer(
    folder: Path, levels: list[tuple[int, ...]], layer: int = 3
) -> tuple[LayerPlan, list[list[PackedMatrix]]]:
    """Writes a layer of random experts at these levels. Returns its plan and the matrices that were written."""
    random = np.random.RandomState(1)
    entries, matrices, data = [], [], b""
    plan = LayerPlan(
        layer, "model.layers.3.mlp", "glu", "experts-1.safetensors", SHAPES, ((1.0,) * len(levels),) * 3, ()
    )
    for expert in levels:
        packed = [
            pack_matrix(random.standard_normal((s.rows, s.columns)).astype(np.float32), s, level)
            for s, level in zip(SHAPES, expert, strict=True)
        ]
        entry = ExpertEntry(expert, tuple(e for _, e in packed), ((), (), ()))
        records = [pack_record(plan, entry, [m for m, _ in packed], plane) for plane in range(entry.num_planes)]
        entries.append(entry._replace(crc32=tuple(zlib.crc32(record) for record in records)))
        matrices.append([m for m, _ in packed])
        data += b"".join(records)
    plan = plan._replace(experts=tuple(entries))
    (folder / plan.file).write_bytes(layer_header(plan) + data)
    return plan, matrices


def read_matrix(store: ExpertStore, layer: LayerPlan, expert: int, projection: int) -> PackedMatrix:
    """A matrix put together again from its records."""
    entry, shape = layer.experts[expert], layer.projections[projection]
    planes, scales = [], None
    for plane in range(num_planes(entry.levels[projection])):
        record = store.read(layer.layer, expert, plane)
        for part in record_parts(layer, entry, plane):
            if part.projection == projection:
                raw = record[part.offset : part.offset + part.nbytes]
                if part.field == "words":
                    planes.append(mx.array(raw.view(np.uint32).reshape(shape.rows, -1)))
                else:
                    scales = mx.array(raw.view(np.float16).reshape(shape.rows, -1))
    assert scales is not None
    return PackedMatrix(shape, entry.levels[projection], planes, scales, {})


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from(LEVELS)] * 3), min_size=1, max_size=4))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, levels: list[tuple[int, int, int]]) -> None:
    folder = tmp_path_factory.mktemp("store")
    layer, matrices = make_layer(folder, levels)
    assert (folder / layer.file).stat().st_size == layer_file_nbytes(layer)
    with ExpertStore(folder, (layer,)) as store:
        for e, expert in enumerate(matrices):
            for p, matrix in enumerate(expert):
                found = read_matrix(store, layer, e, p)
                assert mx.array_equal(unpack(found, matrix.level), unpack(matrix, matrix.level))


def test_plain_safetensors_reads_the_records(tmp_path: Path) -> None:
    layer, _ = make_layer(tmp_path, [(2, 3, 4), (8, 2, 6)])
    tensors = load_file(tmp_path / layer.file)
    with safe_open(tmp_path / layer.file, "np") as file, ExpertStore(tmp_path, (layer,)) as store:
        assert sorted(file.keys()) == sorted(tensors)
        for e, plane, name, nbytes in layer_records(layer):
            assert tensors[name].dtype == np.uint8
            assert tensors[name].shape == (nbytes,)
            assert np.array_equal(tensors[name], store.read(layer.layer, e, plane))


def test_every_record_is_aligned(tmp_path: Path) -> None:
    layer, _ = make_layer(tmp_path, [(2, 2, 2), (4, 3, 8)])
    for info in read_header(tmp_path / layer.file).values():
        assert info.offset % PAGE == 0
        assert info.nbytes % PAGE == 0
    assert len(layer_header(layer)) % PAGE == 0


def test_record_holds_only_what_the_levels_need() -> None:
    """Worked by hand: gate 2, up 4, down 3 bits: plane 0 of all and scales; plane 1 of up and down; plane 2 of up."""
    entry = ExpertEntry((2, 4, 3), ((), (), ()), ((), (), ()))
    layer = LayerPlan(0, "m", "glu", "f", SHAPES, ((1.0,),) * 3, (entry,))
    parts = [[(p.projection, p.field, p.nbytes) for p in record_parts(layer, entry, plane)] for plane in range(3)]
    gate, down = 48 * 64, 64 * 32
    words = [(0, "words", gate // 4), (1, "words", gate // 4), (2, "words", down // 4)]
    scales = [(0, "scales", gate // 64 * 2), (1, "scales", gate // 64 * 2), (2, "scales", down // 32 * 2)]
    assert parts[0] == words + scales
    assert parts[1] == [(1, "words", gate // 8), (2, "words", down // 8)]
    assert parts[2] == [(1, "words", gate // 8)]
    assert sum(PLANE_WIDTHS[:3]) == 4


# Spans ----------------------------------------------------------------------------------------------------------------


def content(span: Span) -> bytes:
    data = span.file.path.read_bytes()[span.offset : span.offset + span.nbytes]
    assert len(data) == span.nbytes == sum(part.nbytes for part in span.parts)
    return data


def test_an_expert_is_one_span(tmp_path: Path) -> None:
    """All planes with the padding between them; each part where the records have it; a checksum per record."""
    layer, matrices = make_layer(tmp_path, [(2, 4, 3), (8, 2, 6)])
    with ExpertStore(tmp_path, (layer,)) as store:
        assert store.layers == (SourceLayer(3, "model.layers.3.mlp", 2),)
        for e, (expert, entry) in enumerate(zip(matrices, layer.experts, strict=True)):
            (span,) = store.spans(3, e)
            data = content(span)
            assert data == b"".join(store.read(3, e, plane).tobytes() for plane in range(entry.num_planes))
            assert [zlib.crc32(data[check.start : check.stop]) for check in span.checks] == list(entry.crc32)
            assert span.label == f"layer 3, expert {e}"
            at, found = 0, {}
            for part in span.parts:
                found[part.projection, part.field] = data[at : at + part.nbytes]
                at += part.nbytes
            for p, matrix in enumerate(expert):
                assert found[p, "scales"] == bytes(np.array(matrix.scales))
                for plane, words in enumerate(matrix.planes):
                    assert found[p, f"plane{plane}"] == bytes(np.array(words))
            fields = [(p, ["scales", *(f"plane{i}" for i in range(len(m.planes)))]) for p, m in enumerate(expert)]
            assert found.keys() - {(-1, "padding")} == {(p, field) for p, names in fields for field in names}


def test_some_planes_of_an_expert(tmp_path: Path) -> None:
    layer, _ = make_layer(tmp_path, [(4, 4, 4), (2, 2, 2)])
    with ExpertStore(tmp_path, (layer,)) as store:
        (whole,), (base,), (rest,) = (store.spans(3, 0, planes) for planes in (None, range(1), range(1, 5)))
        assert content(base) + content(rest) == content(whole)
        assert base.offset + base.nbytes == rest.offset
        assert base.label == "layer 3, expert 0, plane 0"
        assert {part.field for part in rest.parts} == {"plane1", "plane2", "padding"}
        assert store.spans(3, 1, range(1, 5)) == ()
        assert store.spans(3, 0, range(1, 5)) is store.spans(3, 0, range(1, 5))


def test_records_in_another_order_are_several_spans(tmp_path: Path) -> None:
    """Whoever rewrites the file may put tensors where he likes: the header says where."""
    layer, _ = make_layer(tmp_path, [(4, 2, 2), (3, 2, 2)])
    records = load_file(tmp_path / layer.file)
    names = ["L3.E0.P1", "L3.E0.P0", "L3.E1.P0", "L3.E1.P1", "L3.E0.P2"]
    header = encode_header({name: ("U8", records[name].shape, records[name].nbytes) for name in names})
    (tmp_path / layer.file).write_bytes(header + b"".join(records[name].tobytes() for name in names))
    with ExpertStore(tmp_path, (layer,)) as store:
        spans = store.spans(3, 0)
        assert [content(span) for span in spans] == [records[f"L3.E0.P{i}"].tobytes() for i in range(3)]
        assert len(store.spans(3, 1)) == 1
        assert np.array_equal(store.read(3, 0, 2), records["L3.E0.P2"])


def test_a_store_that_cannot_be_opened_leaves_nothing_open(tmp_path: Path) -> None:
    layer, _ = make_layer(tmp_path, [(4, 2, 2)])
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(UserError, match="is missing"):
        ExpertStore(tmp_path, (layer, layer._replace(layer=4, file="other.safetensors")))
    assert len(os.listdir("/dev/fd")) == before


def test_a_record_is_verified_again_after_a_change(tmp_path: Path) -> None:
    layer, _ = make_layer(tmp_path, [(4, 2, 2)])
    path = tmp_path / layer.file
    os.utime(path, (1_000_000_000, 1_000_000_000))
    offset = read_header(path)["L3.E0.P0"].offset
    with ExpertStore(tmp_path, (layer,)) as store:
        store.read(3, 0, 0)
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(b"another model")
        with pytest.raises(UserError, match="wrong checksum"):
            store.read(3, 0, 0)


# Faults ---------------------------------------------------------------------------------------------------------------


def damage(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def test_flipped_bit_in_a_record(tmp_path: Path) -> None:
    layer, _ = make_layer(tmp_path, [(4, 2, 2), (4, 4, 4)])
    info = read_header(tmp_path / layer.file)["L3.E1.P2"]
    damage(tmp_path / layer.file, info.offset + 5, b"\x99")
    with ExpertStore(tmp_path, (layer,)) as store:
        store.read(3, 0, 0)
        with pytest.raises(UserError, match="layer 3, expert 1, plane 2 has a wrong checksum") as error:
            store.read(3, 1, 2)
    assert "hint" in str(error.value)


def test_file_cut_while_open(tmp_path: Path) -> None:
    layer, _ = make_layer(tmp_path, [(4, 2, 2), (4, 4, 4)])
    path = tmp_path / layer.file
    with ExpertStore(tmp_path, (layer,)) as store:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - PAGE)
        with pytest.raises(UserError, match="plane 2 ends early"):
            store.read(3, 1, 2)


@pytest.mark.parametrize("keep", [0, 7, 100, -1, -PAGE])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    layer, _ = make_layer(tmp_path, [(4, 2, 2)])
    path = tmp_path / layer.file
    path.write_bytes(path.read_bytes()[: keep if keep >= 0 else path.stat().st_size + keep])
    with pytest.raises(UserError, match=str(path)):
        ExpertStore(tmp_path, (layer,))


def test_missing_file_and_wrong_plan(tmp_path: Path) -> None:
    layer, _ = make_layer(tmp_path, [(4, 2, 2)])
    with pytest.raises(UserError, match="is missing"):
        ExpertStore(tmp_path, (layer._replace(file="other.safetensors"),))
    bigger = layer._replace(experts=(layer.experts[0]._replace(levels=(8, 2, 2)),))
    with pytest.raises(UserError, match=r"has nothing for L3\.E0\.P3"):
        ExpertStore(tmp_path, (bigger,))


@pytest.mark.parametrize(
    ("offset", "data"),
    [(0, struct.pack("<Q", 1 << 40)), (8, b"x"), (9, b"\xff\xfe"), (60, b"\x00\x00")],
    ids=["length", "brace", "not utf-8", "inside"],
)
def test_damaged_header(tmp_path: Path, offset: int, data: bytes) -> None:
    layer, _ = make_layer(tmp_path, [(4, 2, 2)])
    damage(tmp_path / layer.file, offset, data)
    with pytest.raises(UserError, match=r"damaged|says"):
        read_header(tmp_path / layer.file)


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "F99", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": [5], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": [4]},
        {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]},
        [],
    ],
)
def test_header_that_lies(tmp_path: Path, tensor: object) -> None:
    text = json.dumps({"a": tensor}).encode()
    (tmp_path / "f.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"1234")
    with pytest.raises(UserError, match="damaged"):
        read_header(tmp_path / "f.safetensors")


def test_header_of_other_writers_is_read(tmp_path: Path) -> None:
    """Metadata, several dtypes, no alignment: what Hugging Face and MLX write."""
    mx.save_safetensors(
        str(tmp_path / "m.safetensors"),
        {"a": mx.zeros((3, 5), mx.bfloat16), "b": mx.zeros((2,), mx.uint32)},
        {"format": "mlx"},
    )
    tensors = read_header(tmp_path / "m.safetensors")
    assert tensors["a"][:2] == ("BF16", (3, 5))
    assert tensors["b"].nbytes == 8
    header = encode_header({"a": ("U8", (4,), 4)})
    assert len(header) == PAGE
