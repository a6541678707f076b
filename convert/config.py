"""What a conversion is asked to do: one frozen value whose defaults are those of the command line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mlxmoe.convert.calibrate import Calibration
from mlxmoe.errors import UserError
from mlxmoe.formats import GROUP_SIZES, WRITTEN_LEVELS
from mlxmoe.plan import SELECTIVE
from mlxmoe.rotation import PLAIN

Rule = tuple[int, int]  # lowest and highest bits of a class

TRUNK_BITS = (2, 3, 4, 5, 6, 8)  # widths that tensors outside the experts are quantized at
AS_IS_BITS = 16  # stands for one that is written as the source has it
DEFAULT_RULES: dict[str, Rule] = dict.fromkeys(("embedding", "head", "attention", "shared", "dense"), (6, 8))
LOWEST_TRUNK_BITS = 3  # where the rules do not fit the size, unpinned classes may go down to this
LOWEST_CALIBRATED_BITS = 2  # with calibration every class starts here: what its errors cost is measured


SEEDS = 1 << 32  # of which MLX's generator takes one together with the number of a batch
SENSITIVITIES = ("fisher", "output", "weight", "mix", "frequency", "ablation")
MIX_SHARES = (0.5, 0.3, 0.2)  # of output error, gradient and frequency: the chapter's 7.2.2
POLISHES = ("none", "factors", "layer", "model")
ROUTERS = ("none", "bias", "temperature", "topk-mse")
ALLOCATIONS = ("measured", "benefit", "uniform")
REPLICATED_BY = ("sensitivity", "adaptive", "random")
COMBINED_BY = ("mean", "variance", "learned", SELECTIVE)
SEEDED = ("randomised-hadamard", "block-hadamard-64", "block-hadamard-128")  # rotations of which there are many


@dataclass(frozen=True)
class Allocation:
    """How bytes are shared out. method: strategies.py. sensitivity: the losses that experts' levels are chosen by
    (sensitivity.py). shares: of output error, gradient and frequency in `mix`. refine: rounds in which the losses of every
    part of the model are scaled to the divergence that is measured (refine.py)."""

    method: str = "measured"
    sensitivity: str = "fisher"
    shares: tuple[float, ...] = MIX_SHARES
    refine: int = 0

    def __post_init__(self) -> None:
        if self.method not in ALLOCATIONS:
            raise UserError(
                f"--allocation {self.method} is not one of {', '.join(ALLOCATIONS)}", "measured is the default"
            )
        if self.sensitivity not in SENSITIVITIES:
            raise UserError(
                f"--sensitivity {self.sensitivity} is not one of {', '.join(SENSITIVITIES)}",
                "fisher is the default; the shares of a mix are given as mix=50,30,20",
            )
        ignored = {
            "measured": (),
            "benefit": ("output", "weight", "frequency", "ablation"),
            "uniform": SENSITIVITIES[1:],
        }
        if self.sensitivity in ignored[self.method]:
            raise UserError(
                f"--allocation {self.method} does not go by --sensitivity {self.sensitivity}", "leave one of them out"
            )
        if not 0 <= self.refine <= 10:
            raise UserError(f"--refine {self.refine} is not a number of rounds from 0 to 10", "0 is the default")

    @property
    def needs_scores(self) -> bool:
        """Whether more than the losses has to be measured."""
        return self.method == "benefit" or self.sensitivity != "fisher"

    @property
    def needs_text(self) -> bool:
        return self.needs_scores or self.refine > 0


@dataclass(frozen=True)
class Replication:
    """Which experts are written as several copies, each behind a rotation of its own, and how their outputs are put
    together (replicas.py). by: what chooses them; share: of a layer's experts, on average over the layers for `adaptive`;
    conservative: the mean in place of a selected copy where the input is unusual."""

    by: str = "sensitivity"
    share: float = 0.30
    copies: int = 2
    combine: str = "mean"
    conservative: bool = False

    def __post_init__(self) -> None:
        if self.by not in REPLICATED_BY or not 0 < self.share <= 1 or not 2 <= self.copies <= 3:
            raise UserError(
                f"--replicas {self.by}:{self.share:g}:{self.copies} is not understood",
                f"{', '.join(REPLICATED_BY)}, a share of the experts up to 1, 2 or 3 copies: --replicas sensitivity:0.30:2",
            )
        if self.combine not in COMBINED_BY:
            raise UserError(f"--combine {self.combine} is not one of {', '.join(COMBINED_BY)}", "mean is the default")
        if self.conservative and self.combine != SELECTIVE:
            raise UserError(
                f"--conservative takes the mean where no copy shall be selected, and --combine {self.combine} selects none",
                f"leave it out, or give --combine {SELECTIVE}",
            )

    @property
    def needs_text(self) -> bool:
        return self.combine in ("learned", SELECTIVE)

    def as_settings(self) -> dict[str, Any]:
        settings = asdict(self)
        if not self.conservative:
            del settings["conservative"]  # as it was before there was such a mode
        return settings


@dataclass(frozen=True)
class ConvertConfig:
    """`target_nbytes` of all files together. `rules`: bits of trunk classes that the user set; the rest is default."""

    target_nbytes: int | None = None
    bpw: float | None = None
    group_size: int = 128
    expert_levels: tuple[int, ...] = WRITTEN_LEVELS
    rules: dict[str, Rule] = field(default_factory=dict)
    seed: int = 0
    calibration: Calibration | None = None  # None: least squares on the weights, without any text
    allocation: Allocation = Allocation()
    rotation: str = "none"  # of rotate.CHOICES
    replicas: Replication | None = None
    polish: str = "none"  # of POLISHES: what refines scales after the codes (polish.py)
    router: str = "none"  # of ROUTERS: how routers are adapted to what is coded (route.py)

    def __post_init__(self) -> None:
        if (self.target_nbytes is None) == (self.bpw is None):
            raise UserError("a conversion needs a size", "give --bpw 3 or --size 9GB")
        if self.bpw is not None and not 1 <= self.bpw <= 32:
            raise UserError(f"--bpw {self.bpw} is not between 1 and 32", "bits per weight, all files counted: try 3")
        if self.group_size not in GROUP_SIZES:
            raise UserError(f"group size {self.group_size} is not one of 32, 64, 128", "128 is the default")
        unknown = set(self.expert_levels) - set(WRITTEN_LEVELS)
        if unknown or not self.expert_levels:
            known = ", ".join(map(str, WRITTEN_LEVELS))
            raise UserError(f"expert levels {sorted(unknown)} are not among {known}", "try --expert-bits 2,3,4")
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"--seed {self.seed} is not between 0 and {SEEDS - 1}", "0 is the default")
        if self.rotation not in PLAIN and self.calibration is None:
            raise UserError(
                f"--rotation {self.rotation} goes by text", f"give --calibration FILE, or one of {', '.join(PLAIN)}"
            )
        if self.calibration is not None and self.calibration.method == "awq" and self.rotation != "none":
            raise UserError(
                "--method awq and --rotation do not go together: a rotation mixes the columns that AWQ scales",
                "leave one of them out",
            )
        if self.replicas is not None:
            self._check_replicas(self.replicas)
        for name, value, choices in (("polish", self.polish, POLISHES), ("router", self.router, ROUTERS)):
            if value not in choices:
                raise UserError(f"--{name} {value} is not one of {', '.join(choices)}", "none is the default")
            if value != "none" and self.calibration is None:
                raise UserError(f"--{name} {value} goes by text", "give --calibration FILE as well")
        if self.polish in ("factors", "model") and self.calibration is not None and self.calibration.mu > 0:
            raise UserError(
                f"--polish {self.polish} refines the level that is written, at the cost of those below that --nested counts",
                "--polish layer refines them all",
            )
        if self.allocation.needs_text and self.calibration is None:
            raise UserError(
                "--sensitivity, --allocation benefit and --refine measure on text", "give --calibration FILE as well"
            )

    def _check_replicas(self, how: Replication) -> None:
        if self.rotation not in SEEDED:
            raise UserError(
                f"--replicas needs rotations of which there are many, and --rotation {self.rotation} is not such a one",
                f"give --rotation {' or '.join(SEEDED)}",
            )
        for name, value in (("polish", self.polish), ("router", self.router), ("refine", self.allocation.refine)):
            if value not in ("none", 0):
                raise UserError(f"--{name} knows one copy of an expert", f"leave out --replicas or --{name}")
        if how.needs_text and self.calibration is None:
            raise UserError(f"--combine {how.combine} goes by text", "give --calibration FILE, or --combine variance")

    def for_model(self, num_parameters: int) -> ConvertConfig:
        """The same with what depends on the model's size decided."""
        text = None if self.calibration is None else self.calibration.for_model(num_parameters)
        return replace(self, calibration=text)

    def nbytes(self, num_parameters: int) -> int:
        """The budget in bytes."""
        return self.target_nbytes if self.target_nbytes is not None else int(self.bpw * num_parameters / 8)  # type: ignore[operator]

    def as_settings(self) -> dict[str, Any]:
        """For the plan, and to tell whether a resumed conversion is the same one."""
        settings = asdict(self)
        settings["expert_levels"] = list(self.expert_levels)
        settings["allocation"] = {**settings["allocation"], "shares": list(self.allocation.shares)}
        if self.allocation == Allocation():
            del settings["allocation"]
        if self.replicas is not None:
            settings["replicas"] = self.replicas.as_settings()
        settings["rules"] = {name: list(rule) for name, rule in sorted(self.rules.items())}
        if self.calibration is not None:
            settings["calibration"]["file"] = Path(
                self.calibration.file
            ).name  # the hash says which; folders are private
        return {name: value for name, value in settings.items() if value is not None}


def default_rotation(calibration: Calibration | None, replicas: Replication | None) -> str:
    """`auto` wherever it can be done: it keeps none where none is better."""
    return "auto" if calibration is not None and calibration.method == "gptq" and replicas is None else "none"


def default_polish(calibration: Calibration | None, replicas: Replication | None) -> str:
    """`layer` wherever it can be done; the windows that it holds back see to it that it does no harm."""
    return "layer" if calibration is not None and replicas is None else "none"


def parse_rule(text: str) -> tuple[str, Rule]:
    """`attention=8` or `embedding=4-6` -> class and lowest, highest bits. Raises UserError."""
    name, _, bits = text.partition("=")
    low, _, high = bits.partition("-")
    if name not in DEFAULT_RULES or not low.isdecimal() or (high and not high.isdecimal()):
        raise UserError(
            f"--bits {text!r} is not CLASS=BITS", f"classes: {', '.join(DEFAULT_RULES)}; example: --bits attention=8"
        )
    rule = int(low), int(high or low)
    widths = (*TRUNK_BITS, AS_IS_BITS)
    if rule[0] > rule[1] or not any(rule[0] <= b <= rule[1] for b in widths):
        raise UserError(
            f"--bits {text!r}: no width among {', '.join(map(str, widths))} fits", "example: --bits head=6-8"
        )
    return name, rule


def parse_rules(texts: Sequence[str]) -> dict[str, Rule]:
    """Every class once. Raises UserError."""
    rules = [parse_rule(text) for text in texts]
    twice = [name for name, count in Counter(name for name, _ in rules).items() if count > 1]
    if twice:
        raise UserError(f"--bits is given twice for {twice[0]}", f"one range holds both ends: --bits {twice[0]}=4-8")
    return dict(rules)


def parse_replicas(text: str, combine: str, conservative: bool = False) -> Replication:
    """`sensitivity`, `adaptive:0.25` or `random:0.3:3`: what chooses the experts, their share, copies. Raises UserError."""
    by, _, rest = text.partition(":")
    share, _, copies = rest.partition(":")
    try:
        values = float(share or Replication.share), int(copies or Replication.copies)
    except ValueError:
        raise UserError(f"--replicas {text!r} is not understood", "example: --replicas sensitivity:0.30:2") from None
    return Replication(by, *values, combine, conservative)


def parse_sensitivity(text: str) -> tuple[str, tuple[float, ...]]:
    """`output`, or `mix=50,30,20` with shares of output error, gradient and frequency -> name and shares, of a sum of 1.
    Raises UserError."""
    name, equals, shares = text.partition("=")
    if not equals:
        return name, MIX_SHARES
    try:
        values = [float(share) for share in shares.split(",")]
    except ValueError:
        values = []
    if name != "mix" or len(values) != len(MIX_SHARES) or not 0 < sum(values) < float("inf") or min(values) < 0:
        raise UserError(
            f"--sensitivity {text!r} is not understood",
            "mix=50,30,20 are the shares of output error, gradient and frequency; the others take none",
        )
    return name, tuple(value / sum(values) for value in values)
