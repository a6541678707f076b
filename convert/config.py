"""What a conversion is asked to do: one frozen value whose defaults are those of the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlxmoe.convert.calibrate import Calibration
from mlxmoe.errors import UserError
from mlxmoe.formats import GROUP_SIZES, LEVELS

Rule = tuple[int, int]  # lowest and highest bits of a class

TRUNK_BITS = (2, 3, 4, 5, 6, 8)  # widths of tensors outside the experts
DEFAULT_RULES: dict[str, Rule] = dict.fromkeys(("embedding", "head", "attention", "shared", "dense"), (6, 8))
LOWEST_TRUNK_BITS = 3  # where the rules do not fit the size, unpinned classes may go down to this
LOWEST_CALIBRATED_BITS = 2  # with calibration every class starts here: what its errors cost is measured


@dataclass(frozen=True)
class ConvertConfig:
    """`target_nbytes` of all files together. `rules`: bits of trunk classes that the user set; the rest is default."""

    target_nbytes: int | None = None
    bpw: float | None = None
    group_size: int = 128
    expert_levels: tuple[int, ...] = LEVELS
    rules: dict[str, Rule] = field(default_factory=dict)
    seed: int = 0
    calibration: Calibration | None = None  # None: least squares on the weights, without any text

    def __post_init__(self) -> None:
        if (self.target_nbytes is None) == (self.bpw is None):
            raise UserError("a conversion needs a size", "give --bpw 3 or --size 9GB")
        if self.bpw is not None and not 1 <= self.bpw <= 32:
            raise UserError(f"--bpw {self.bpw} is not between 1 and 32", "bits per weight, all files counted: try 3")
        if self.group_size not in GROUP_SIZES:
            raise UserError(f"group size {self.group_size} is not one of 32, 64, 128", "128 is the default")
        unknown = set(self.expert_levels) - set(LEVELS)
        if unknown or not self.expert_levels:
            raise UserError(f"expert levels {sorted(unknown)} are not among 2, 3, 4, 6, 8", "try --expert-bits 2,3,4")

    def nbytes(self, num_parameters: int) -> int:
        """The budget in bytes."""
        return self.target_nbytes if self.target_nbytes is not None else int(self.bpw * num_parameters / 8)  # type: ignore[operator]

    def as_settings(self) -> dict[str, Any]:
        """For the plan, and to tell whether a resumed conversion is the same one."""
        settings = asdict(self)
        settings["expert_levels"] = list(self.expert_levels)
        settings["rules"] = {name: list(rule) for name, rule in sorted(self.rules.items())}
        if self.calibration is not None:
            settings["calibration"]["file"] = Path(
                self.calibration.file
            ).name  # the hash says which; folders are private
        return {name: value for name, value in settings.items() if value is not None}


def parse_rule(text: str) -> tuple[str, Rule]:
    """`attention=8` or `embedding=4-6` -> class and lowest, highest bits. Raises UserError."""
    name, _, bits = text.partition("=")
    low, _, high = bits.partition("-")
    if name not in DEFAULT_RULES or not low.isdecimal() or (high and not high.isdecimal()):
        raise UserError(
            f"--bits {text!r} is not CLASS=BITS", f"classes: {', '.join(DEFAULT_RULES)}; example: --bits attention=8"
        )
    rule = int(low), int(high or low)
    if rule[0] > rule[1] or not any(rule[0] <= b <= rule[1] for b in TRUNK_BITS):
        raise UserError(
            f"--bits {text!r}: no width among {', '.join(map(str, TRUNK_BITS))} fits", "example: --bits head=6-8"
        )
    return name, rule
