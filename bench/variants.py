"""`mlxmoe bench variants MODEL --config F.toml`: variants of a model's experts from a small file, each measured.

The file names variants with the fields of simulate.py's Recipe and Variant; docs/options.md lists them. A variant with
copies stands beside one code of no more bytes. Everything wrong in the file is found before a token is run, what only the
model can tell (layers, rotations, activations) before one is scored.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
from tqdm import tqdm

from mlxmoe.arguments import note, print_json
from mlxmoe.bench.arguments import add_size_arguments, add_study_arguments
from mlxmoe.bench.chapter import ORIGINAL, SCORE_COLUMNS, Bench, ChapterConfig, Value, cell, replication, score_rows
from mlxmoe.bench.simulate import Recipe, Simulation, Site, Variant, agreement, progressing
from mlxmoe.convert.calibrate import file_sha256
from mlxmoe.convert.quantize import WIDTHS
from mlxmoe.convert.replicas import BUDGET, STRATEGIES
from mlxmoe.errors import UserError
from mlxmoe.evaluate import read_text
from mlxmoe.formats import NARROW_LEVELS

KINDS = ("routed", "shared")
CHOICES = ("random", "frequency", "sensitivity", "mixed", "adaptive", "groups")  # of the experts that get copies
MOST_COPIES = 8
AGREEMENT_COLUMNS = ("best expert kept", "chosen experts kept", "tokens changed", "confidence")
_NAMES_OF_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Entry:
    """One variant as the file has it. bits and copies: by kind of expert. copies may be one of CHOICES instead; budget is
    then the share of the routed experts. settings, one of replicas.STRATEGIES, gives the copies' recipes instead of extra.
    """

    name: str
    recipe: Recipe = field(default_factory=Recipe)
    extra: tuple[Recipe, ...] = ()
    bits: Mapping[str, int] = field(default_factory=dict)
    copies: Mapping[str, int] | str = field(default_factory=dict)
    budget: float = BUDGET
    settings: str = ""
    combine: str = "mean"
    conservative: bool = False
    layers: frozenset[int] | None = None
    experts: bool = True
    router_bits: int | None = None
    same_bytes: bool = True


class Table(NamedTuple):
    """One row for the original and every variant; numbers that are not there are NaN."""

    columns: list[str]
    rows: list[list[Value]]


_RECIPE_TYPES = get_type_hints(Recipe)
_ENTRY_TYPES = {
    "budget": float,
    "settings": str,
    "combine": str,
    "conservative": bool,
    "experts": bool,
    "same_bytes": bool,
}
_ENTRY_TYPES["router_bits"] = int
_KEYS = (*_RECIPE_TYPES, "extra", "copies", "layers", *_ENTRY_TYPES)


# ---------------------------------------------------------------------------------------------------------------------
# Reading the file
# ---------------------------------------------------------------------------------------------------------------------


def read_config(path: str | Path) -> list[Entry]:
    """The variants of a file. Raises UserError naming the file, the variant and the key of what is wrong."""
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"there is no config file {path} ({error.strerror})", "docs/options.md has an example"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}", "docs/options.md has an example") from None
    with _saying(str(path)):
        _only_known(found, ("defaults", "variant"))
        defaults, tables = _table("defaults", found.get("defaults", {})), found.get("variant", [])
        if not isinstance(tables, list) or not tables:
            raise UserError("there is no variant", "start each with a line [[variant]] and give it a name")
    entries: list[Entry] = []
    for number, table in enumerate(tables, 1):
        name = table.get("name") if isinstance(table, dict) else None
        with _saying(f"{path}: variant {name!r}" if isinstance(name, str) else f"{path}: variant {number}"):
            if not isinstance(name, str) or not name.strip():
                raise UserError("it has no name", "give every variant a line such as name = '2 bit'")
            if name in (ORIGINAL.name, *(entry.name for entry in entries)):
                raise UserError("the name is taken", "give every variant a name of its own")
            entries.append(_entry(name, {**defaults, **{k: v for k, v in table.items() if k != "name"}}))
    return entries


@contextmanager
def _saying(where: str) -> Iterator[None]:
    """Puts where it happened before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error.message}", error.hint) from None


def _entry(name: str, table: dict[str, Any]) -> Entry:
    _only_known(table, _KEYS)
    bits, copies = table.pop("bits", Recipe.bits), table.pop("copies", 1)
    extra, layers = table.pop("extra", []), table.pop("layers", None)
    by_kind = _by_kind("bits", bits, 1, 16)
    recipe = _recipe({k: v for k, v in table.items() if k in _RECIPE_TYPES} | {"bits": by_kind["routed"]})
    replace(recipe, bits=by_kind["shared"])  # is refused where that width cannot be had
    values = {key: _typed(key, table[key], wanted) for key, wanted in _ENTRY_TYPES.items() if key in table}
    entry = Entry(
        name,
        recipe,
        extra=_extra(recipe, extra),
        bits=by_kind,
        copies=_copies(copies),
        layers=None if layers is None else _layers(layers),
        **values,
    )
    _check(entry)
    return entry


def _recipe(table: dict[str, Any]) -> Recipe:
    return Recipe(**{key: _typed(key, value, _RECIPE_TYPES[key]) for key, value in table.items()})


def _extra(recipe: Recipe, tables: Any) -> tuple[Recipe, ...]:
    """Further copies: the first one's recipe with what their tables change."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError("extra is not a list of tables", "write extra = [{ seed = 1 }], one for every further copy")
    changes = tuple(key for key in _RECIPE_TYPES if key != "bits")
    made = []
    for table in tables:
        _only_known(table, changes, "extra.")
        made.append(replace(recipe, **{k: _typed(f"extra.{k}", v, _RECIPE_TYPES[k]) for k, v in table.items()}))
    return tuple(made)


def _check(entry: Entry) -> None:
    """Refuses what only several keys together make impossible."""
    Variant(
        entry.name, entry.recipe, combine=entry.combine, conservative=entry.conservative, router_bits=entry.router_bits
    )
    if not 0 < entry.budget <= 1:
        raise UserError(f"budget = {entry.budget!r} is not a share", "give a number above 0 and up to 1")
    if entry.settings and entry.settings not in STRATEGIES:
        listed = ", ".join(STRATEGIES)
        raise UserError(f"settings = {entry.settings!r} is not one of {listed}", "choose one of them for settings")
    if entry.settings and entry.extra:
        raise UserError("settings and extra do not go together", "leave one of them out")
    if entry.settings or entry.extra:
        several = isinstance(entry.copies, str) or max(entry.copies.values()) > 1
        if not several:
            raise UserError(f"{'settings' if entry.settings else 'extra'} needs copies", "give copies = 2")


def _copies(value: Any) -> Mapping[str, int] | str:
    if not isinstance(value, str):
        return _by_kind("copies", value, 1, MOST_COPIES)
    if value not in CHOICES:
        listed = ", ".join(CHOICES)
        raise UserError(f"copies = {value!r} is neither a number nor one of {listed}", "choose one of them for copies")
    return value


def _by_kind(key: str, value: Any, low: int, high: int) -> dict[str, int]:
    """One number for all experts, or a table with one for `routed` and one for `shared`."""
    if isinstance(value, dict):
        _only_known(value, KINDS, f"{key}.")
        if set(value) != set(KINDS):
            raise UserError(
                f"{key} lacks {', '.join(set(KINDS) - set(value))}", f"give {key} for routed and shared experts"
            )
    given = value if isinstance(value, dict) else dict.fromkeys(KINDS, value)
    for number in given.values():
        if not low <= _typed(key, number, int) <= high:
            raise UserError(f"{key} = {number!r} is not between {low} and {high}", f"give a whole number for {key}")
    return given


def _layers(value: Any) -> frozenset[int]:
    if not isinstance(value, list) or not value:
        raise UserError("layers is not a list of layers", "write layers = [1, 2], or leave it out for all")
    return frozenset(_typed("layers", layer, int) for layer in value)


def _typed(key: str, value: Any, wanted: type) -> Any:
    """The value; a whole number for a number that need not be one. Raises UserError for another type."""
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not wanted:
        raise UserError(
            f"{key} = {value!r} is not {_NAMES_OF_TYPES[wanted]}", f"give {_NAMES_OF_TYPES[wanted]} for {key}"
        )
    return value


def _table(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{key} is not a table", f"start it with a line [{key}]")
    return value


def _only_known(table: Mapping[str, Any], known: Sequence[str], prefix: str = "") -> None:
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise UserError(f"there is no key {prefix}{unknown[0]}", f"the keys are {', '.join(known)}")


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def build(entry: Entry, simulation: Simulation) -> list[Variant]:
    """The variant of an entry, and behind it, where it has copies, one code an expert of no more bytes.

    Raises UserError for what this model does not have.
    """
    layers = {site.layer for site in simulation.sites}
    missing = sorted((entry.layers or set()) - layers)
    if missing:
        raise UserError(
            f"layers: there are no experts in layer {missing[0]}",
            f"layers {min(layers)} to {max(layers)} may have some",
        )
    bits = {site.path: np.full(site.num_experts, entry.bits[_kind(site)]) for site in simulation.sites}
    copies = _counts(entry, simulation)
    most = max(int(counts.max()) for counts in copies.values())
    first, *others = progressing(entry.recipe, most, entry.settings) if entry.settings else (entry.recipe, *entry.extra)
    whole = Variant(
        entry.name,
        first,
        copies,
        bits,
        tuple(others),
        entry.combine,
        entry.conservative,
        entry.layers,
        entry.experts,
        entry.router_bits,
    )
    simulation.check(whole)
    if most == 1 or not entry.same_bytes or not entry.experts:
        return [whole]
    wider = {path: _same_bytes(bits[path] * counts, first) for path, counts in copies.items()}
    single = Variant(f"{entry.name}: one copy of the same bytes", first, bits=wider, layers=entry.layers)
    return [whole, replace(single, router_bits=entry.router_bits)]


def _kind(site: Site) -> str:
    return "shared" if site.shared else "routed"


def _counts(entry: Entry, simulation: Simulation) -> dict[str, np.ndarray]:
    if isinstance(entry.copies, str):
        return replication(simulation, entry.copies, entry.budget)
    return {site.path: np.full(site.num_experts, entry.copies[_kind(site)]) for site in simulation.sites}


def _same_bytes(bits: np.ndarray, recipe: Recipe) -> np.ndarray:
    """For every sum of bits the widest code that is no wider."""
    widths = np.array(NARROW_LEVELS if recipe.feedback else WIDTHS)
    return widths[np.searchsorted(widths, bits, side="right") - 1]


def measure(simulation: Simulation, variants: Sequence[Variant], routing: bool) -> Table:
    """Scores the original and every variant. Shows progress on stderr."""
    variants = [ORIGINAL, *variants]
    router = any(variant.router_bits for variant in variants)
    columns = [*SCORE_COLUMNS, *["router bytes"] * router, *AGREEMENT_COLUMNS * routing]
    original = simulation.routing(ORIGINAL) if routing else None
    rows: list[list[Value]] = []
    with tqdm(variants, unit=" variants", desc="variants", dynamic_ncols=True) as bar:
        bench = Bench(simulation, bar)
        for variant in bar:
            row: list[Value] = [*score_rows([bench.score(variant)])[0]]
            if router:
                bits = variant.router_bits
                row.append(simulation.router_nbytes(bits, variant.layers) if bits else float("nan"))
            if original is not None:
                row += agreement(original, simulation.routing(variant))
            rows.append(row)
    return Table(columns, rows)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_study_arguments(parser)
    config = ChapterConfig()
    add_size_arguments(parser, config.max_tokens, config.calibration_tokens, config.window)
    parser.add_argument("--config", required=True, metavar="F", help="a TOML file of variants, see docs/options.md")
    parser.add_argument("--routing", action="store_true", help="also how much of the routing is kept (default: off)")


def run(args: argparse.Namespace) -> int:
    ChapterConfig(args.max_tokens, args.calibration_tokens, args.window)  # refuses what makes no sense
    entries = read_config(args.config)
    texts, digest = [read_text(path) for path in args.text], file_sha256(args.calibration)
    simulation = Simulation(args.model, texts, args.calibration, args.max_tokens, args.calibration_tokens, args.window)
    variants: list[Variant] = []
    for entry in entries:
        with _saying(f"{args.config}: variant {entry.name!r}"):
            variants += build(entry, simulation)
    table = measure(simulation, variants, args.routing)
    note(
        f"{len(table.rows)} rows; bytes are those of routed and shared experts, everything else is as in the checkpoint"
    )
    print(f"| {' | '.join(table.columns)} |", "|" + "---|" * len(table.columns), sep="\n")
    for row in table.rows:
        print(f"| {' | '.join(map(cell, row))} |")
    if args.json:
        settings = {key: getattr(args, key) for key in ("max_tokens", "calibration_tokens", "window")}
        settings |= {"model": str(args.model), "texts": args.text, "calibration_sha256": digest}
        print_json({"settings": settings, "rows": [_plain(table.columns, row) for row in table.rows]})
    return 0


def _plain(columns: Sequence[str], row: Sequence[Value]) -> dict[str, Value | None]:
    """For JSON, which has no NaN."""
    finite = [None if isinstance(value, float) and not np.isfinite(value) else value for value in row]
    return dict(zip(columns, finite, strict=True))
