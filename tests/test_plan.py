"""plan.json: a round trip without loss, one line per expert, and clear words for what cannot be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxmoe.errors import UserError
from mlxmoe.formats import MatrixShape
from mlxmoe.plan import ExpertEntry, FileEntry, LayerPlan, Plan, TrunkEntry, is_converted

SHAPES = (MatrixShape("fc1", 64, 32, 32), MatrixShape("fc2", 32, 64, 64))


def make_plan() -> Plan:
    experts = (
        ExpertEntry((2, 4), ((0.1125,), (0.1301, 0.03456, 0.009877)), ((), (0.8912, 0.9766)), (1, 2, 4294967295)),
        ExpertEntry((3, 2), ((0.12, 0.034), (0.1099,)), ((0.93,), ()), (5, 6)),
    )
    layer = LayerPlan(
        1, "model.layers.1.mlp", "mlp", "experts-1.safetensors", SHAPES, ((0.25, 0.25), (0.1, 0.4)), experts
    )
    return Plan(
        model_type="nemotron_h",
        source={"name": "model", "files": {"model.safetensors": 123}},
        settings={"bpw": 3.0, "rules": {"head": [6, 8]}},
        num_parameters=1000,
        layers=(layer,),
        trunk={"lm_head.weight": TrunkEntry("head", 6, 64, 0.0004512, 1.3)},
        expected_loss=0.1234,
        seed=7,
        files={"experts-1.safetensors": FileEntry(4096, "ab" * 32)},
    )


def test_round_trip(tmp_path: Path) -> None:
    plan = make_plan()
    assert not is_converted(tmp_path)
    plan.save(tmp_path)
    assert is_converted(tmp_path)
    assert Plan.load(tmp_path) == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_text_is_json_with_a_line_per_expert() -> None:
    plan = make_plan()
    text = plan.dumps()
    assert json.loads(text)["format"] == "mlxmoe-plan"
    lines = text.splitlines()
    assert sum(line.startswith("[[") for line in lines) == 2
    changed = replace(plan, layers=(plan.layers[0]._replace(experts=(plan.layers[0].experts[0],) * 2),))
    assert sum(a != b for a, b in zip(lines, changed.dumps().splitlines(), strict=True)) == 1


def test_a_file_without_wide_levels_says_nothing_of_them() -> None:
    """Older readers take it as it is, and it is to the letter what they wrote themselves."""
    text = make_plan().dumps()
    assert '"version":1,\n"codec":{"name":"planes","levels":[2,3,4,6,8],"plane_widths":[2,1,1,2,2]}' in text


def test_levels_above_8_bits_need_a_newer_reader() -> None:
    plan = make_plan()
    errors, gains = tuple(0.1 / 4**i for i in range(9)), (0.9,) * 5 + (1.0,) * 3
    wide = ExpertEntry((16, 2), (errors, (0.1,)), (gains, ()), tuple(range(9)))
    plan = replace(plan, layers=(plan.layers[0]._replace(experts=(wide, plan.layers[0].experts[1])),))
    text = plan.dumps()
    assert '"version":3,\n"codec":{"name":"planes","levels":[2,3,4,6,8,10,12,14,16]' in text
    again = Plan.loads(text)
    assert again.layers[0].experts[0].num_planes == 9
    assert again.level_histogram() == {2: 2, 3: 1, 16: 1}
    with pytest.raises(UserError, match="levels, errors and gains do not fit together"):
        Plan.loads(text.replace("[16,2]", "[14,2]"))


def test_measured_values_keep_four_digits() -> None:
    plan = replace(make_plan(), expected_loss=0.123456789)
    assert Plan.loads(plan.dumps()).expected_loss == 0.1235


def test_histogram_and_bytes() -> None:
    plan = make_plan()
    assert plan.level_histogram() == {2: 2, 3: 1, 4: 1}
    assert plan.nbytes == 4096
    assert plan.layers[0].experts[0].num_planes == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a plan"),
        ('{"format": "other"}', "is not a plan"),
        (make_plan().dumps().replace('"version":1', '"version":5'), "has format version 5, this mlxmoe reads up to 4"),
        (make_plan().dumps().replace('"seed"', '"sead"'), "is damaged"),
        (make_plan().dumps().replace('"projections":[[', '"projections":[3,['), "is damaged"),
        (make_plan().dumps().replace('"version":1', '"version":"x"'), "is damaged"),
        (make_plan().dumps().replace('"layers":[', '"layers":[4,'), "is damaged"),
    ],
)
def test_bad_plans(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        Plan.loads(text)
    assert error.value.hint


def test_binary_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not text"):
        Plan.load(tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_one_changed_character_is_read_or_refused(data: st.DataObject) -> None:
    """Whatever a flipped byte does to plan.json, it is a plan or a UserError: never another exception."""
    text = make_plan().dumps()
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.sampled_from('0123456789-.,[]{}":aeE \n')) + text[at + 1 :]
    try:
        plan = Plan.loads(changed)
    except UserError:
        return
    plan.dumps()
    plan.level_histogram()
