"""The pages of `mlxmoe stats --report` and `mlxmoe report`: pictures and tables of what the commands have measured.

Draws plain data (the JSON of the commands) and computes nothing but shares and orders. Every number in a picture is in that
data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from mlxmoe.pictures import COLOURS, Part, heat_map, new_figure

Json = Mapping[str, Any]
_KIND_COLOURS = {"general": COLOURS[0], "domain": COLOURS[4], "specialised": COLOURS[1], "never": COLOURS[7]}


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


def stats_parts(result: Json) -> list[Part]:
    """Of what bench/stats.py describes."""
    routed = [layer for layer in result["layers"] if layer["routed"] is not None]
    tokens = f"{result['tokens']} tokens"
    parts = [
        Part(
            "How often experts are chosen",
            f"{tokens}; 1 is an even load. Blank: no such expert.",
            "frequency",
            heat_map(
                _even_shares(routed),
                _numbers(routed),
                title=f"choices of each expert over {tokens}",
                x="expert",
                y="layer",
                unit="times the even share",
            ),
        ),
        Part(
            "Classes of experts",
            "General: chosen for more than a tenth of all tokens. Domain: not that, and more than 70 % of its tokens are of "
            "one domain. Specialised: the others.",
            "classes",
            _classes_figure(routed),
        ),
        Part("Over the layers", "", "layers", _layers_figure(result["layers"])),
        Part("What comes out of experts", "", "largest", _largest_figure(result)),
        Part(
            "REAP score",
            "The mean over its tokens of gate weight times norm of the output.",
            "reap",
            _reap_figure(routed),
        ),
    ]
    if len(result["domains"]) > 1:
        parts.append(_domains_part(routed, result["domains"]))
    if result["lift"] is not None:
        parts.append(_lift_part(result["lift"]))
    return [*parts, _triggers_part(result["layers"])]


def _numbers(layers: Sequence[Json]) -> list[int]:
    return [layer["layer"] for layer in layers]


def _table(routed: Sequence[Json], name: str) -> np.ndarray:
    """float64 [L, E] of a number of all experts, NaN where there is none."""
    rows = [[np.nan if value is None else value for value in layer["routed"]["experts"][name]] for layer in routed]
    width = max(map(len, rows))
    return np.array([[*row, *[np.nan] * (width - len(row))] for row in rows], np.float64)


def _even_shares(routed: Sequence[Json]) -> np.ndarray:
    tokens = _table(routed, "tokens")
    return tokens / np.nanmean(tokens, axis=1, keepdims=True)


def _reap_figure(routed: Sequence[Json]) -> Any:
    return heat_map(
        _table(routed, "reap"), _numbers(routed), title="REAP score", x="expert", y="layer", unit="gate weight x norm"
    )


def _classes_figure(routed: Sequence[Json]) -> Any:
    figure, axes = new_figure(height=3.6)
    bottom = np.zeros(len(routed))
    names = [str(number) for number in _numbers(routed)]
    for kind, colour in _KIND_COLOURS.items():
        counts = np.array([layer["routed"]["kinds"][kind] for layer in routed])
        if counts.any():
            axes.bar(names, counts, bottom=bottom, color=colour, label=kind, width=0.8)
            bottom = bottom + counts
    axes.set(xlabel="layer", ylabel="experts", ylim=(0, 1.02 * bottom.max()))
    _thin_ticks(axes, names)
    axes.set_title("classes of experts", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _layers_figure(layers: Sequence[Json]) -> Any:
    """How routing and activations change over the layers: four panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    panels = figure.subplots(2, 2)
    routed = [layer for layer in layers if layer["routed"] is not None]
    own, numbers = _numbers(routed), _numbers(layers)

    def of(name: str) -> list[float]:
        return [layer["routed"][name] for layer in routed]

    def behind(name: str) -> list[float]:
        return [layer["stream"][name] for layer in layers]

    panels[0, 0].plot(own, of("specialisation"), "o-", color=COLOURS[0], ms=4)
    panels[0, 0].set(ylabel="bits", title="what an expert says of the domain")
    panels[0, 1].plot(own, of("load_variation"), "o-", color=COLOURS[0], ms=4, label="load: deviation / mean")
    panels[0, 1].plot(own, of("confidence"), "s--", color=COLOURS[1], ms=4, label="share of the best gate weight")
    panels[0, 1].set(ylabel="share", title="balance and confidence of the router")
    panels[0, 1].legend(fontsize=8)
    panels[1, 0].plot(numbers, behind("rms"), "o-", color=COLOURS[0], ms=4, label="root mean square")
    panels[1, 0].plot(numbers, behind("median"), "s--", color=COLOURS[2], ms=4, label="median")
    panels[1, 0].plot(numbers, behind("largest"), "^:", color=COLOURS[1], ms=4, label="largest")
    panels[1, 0].set(ylabel="magnitude (log)", yscale="log", title="hidden states behind the layer")
    panels[1, 0].legend(fontsize=8)
    hidden = [100 * layer["routed"]["hidden"]["share"] for layer in routed]
    panels[1, 1].plot(own, hidden, "o-", color=COLOURS[0], ms=4, label="inside experts")
    panels[1, 1].plot(
        numbers, [100 * v for v in behind("share")], "s--", color=COLOURS[1], ms=4, label="behind the layer"
    )
    panels[1, 1].set(ylabel="% of the values", title="massive activations")
    panels[1, 1].legend(fontsize=8)
    for axes in panels.flat:
        axes.set_xlabel("layer")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=None if axes.get_yscale() == "log" else 0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _largest_figure(result: Json) -> Any:
    """The largest output of every expert, and the bounds of the super-expert test."""
    figure, axes = new_figure(height=4.2)
    routed = [layer for layer in result["layers"] if layer["routed"] is not None]
    largest = _table(routed, "largest")
    places = np.repeat(_numbers(routed), largest.shape[1])
    axes.plot(places, largest.reshape(-1), ".", color=COLOURS[0], alpha=0.6, label="an expert")
    known = largest[np.isfinite(largest)]
    axes.axhline(np.percentile(known, 99.5), color=COLOURS[1], ls="--", label="99.5th percentile")
    axes.axhline(known.max() / 10, color=COLOURS[2], ls=":", label="a tenth of the largest")
    found = result["super_experts"]
    if found:
        axes.plot(
            *zip(*((e["layer"], e["largest"]) for e in found), strict=True),
            "*",
            color=COLOURS[7],
            ms=12,
            label="super expert",
        )
    axes.set(xlabel="layer", ylabel="largest |output| (log)", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("largest output of each expert", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _domains_part(routed: Sequence[Json], domains: Sequence[Json]) -> Part:
    """The layer whose experts tell most about the domain; its experts in the order of their main domain."""
    layer = max(routed, key=lambda layer: layer["routed"]["specialisation"])
    shares = layer["routed"]["experts"]["domains"]
    chosen = [e for e, row in enumerate(shares) if row[0] is not None]
    order = sorted(chosen, key=lambda e: (int(np.argmax(shares[e])), -max(shares[e])))
    figure = heat_map(
        100 * np.array([shares[e] for e in order]).T,
        [domain["name"] for domain in domains],
        title=f"layer {layer['layer']}: whose tokens each expert gets",
        x="expert, in the order of its main domain",
        y="",
        unit="% of the expert's tokens",
        columns=order,
    )
    return Part("Domains", "As if every domain had the same number of tokens.", "domains", figure)


def _lift_part(lift: Json) -> Part:
    values = np.array([[np.nan if v is None else v for v in row] for row in lift["values"]], np.float64)
    logs = np.log2(np.where(values > 0, values, np.nan))
    bound = float(np.nanmax(np.abs(logs))) if np.isfinite(logs).any() else 1.0
    figure = heat_map(
        logs,
        range(len(logs)),
        title=f"layer {lift['layer']}: experts that are chosen together",
        x="expert",
        y="expert",
        unit="log2 of how much more often than by chance",
        colours="PuOr_r",
        low=-bound,
        high=bound,
    )
    return Part("Chosen together", "0 is chance. Blank: never together.", "together", figure)


def _triggers_part(layers: Sequence[Json]) -> Part:
    rows: list[list[str]] = [["layer", "where", "magnitude", "domain", "position", "token", "behind"]]
    for layer in layers:
        places = [("stream", layer["stream"])] + ([("hidden", layer["routed"]["hidden"])] if layer["routed"] else [])
        for name, massive in places:
            for t in massive["triggers"][:3]:
                where = name if t["expert"] is None else f"expert {t['expert']}"
                rows.append(
                    [
                        *(str(layer["layer"]), where, f"{t['magnitude']:.4g}", t["domain"], str(t["position"])),
                        *(repr(t["token"]), repr(t["before"])),
                    ]
                )
    return Part("What triggers the largest values", "Three of each layer; position: in the window.", table=rows)


# ---------------------------------------------------------------------------------------------------------------------
# A conversion
# ---------------------------------------------------------------------------------------------------------------------


def report_parts(result: Json) -> list[Part]:
    """Of what bench/report.py describes."""
    parts = [
        Part(
            "Bytes",
            f"{result['model']}, converted from {result['converted_from']}: {result['bytes']} bytes, "
            f"{result['bpw']:.3f} bits per weight, expected loss {result['expected_loss']:.3g}.",
            "bytes",
            _bytes_figure(result["bytes_by_class"]),
            bytes_rows(result),
        ),
        Part(
            "Levels",
            "Bits that are written of every expert's matrices. Blank: no such copy.",
            "levels",
            _levels_figure(result["layers"]),
        ),
        Part(
            "Expected loss",
            "What the plan expects the errors of each part to cost, in the scale of a KL divergence in nats.",
            "expected-loss",
            _loss_figure(result["loss_by_place"]),
            [["class", "expected loss"], *([name, f"{loss:.3g}"] for name, loss in result["loss_by_class"].items())],
        ),
    ]
    parts.append(
        Part(
            "Sensitivity over the layers",
            "What each part would lose, to second order, if its weights had a relative squared error of 1: how much it "
            "matters, whatever width it got. "
            + (
                "By calibration text."
                if result["calibrated"]
                else "Without calibration text: by fixed weights per class."
            ),
            "sensitivity",
            _sensitivity_figure(result["sensitivity_by_place"]),
        )
    )
    if "curve" in result:
        parts += _measured_parts(result)
    return parts


def _measured_parts(result: Json) -> list[Part]:
    curve, profile = result["curve"], result["profile"]
    routed = [row for row in profile if row["routing"] is not None]
    against = f"against {result['reference']} on {', '.join(result['text'])}"
    return [
        Part(
            "KLD against size",
            f"One point per memory budget, {curve[-1]['tokens']} predictions each, {against}. Bars: two standard errors.",
            "curve",
            _curve_figure(curve),
            curve_rows(curve),
        ),
        Part(
            "KLD by domain",
            "With all that is written. Bars: two standard errors.",
            "domains-kld",
            _domain_figure(curve),
        ),
        Part(
            "Errors by layer",
            "Squared errors, relative. Of one layer alone: of what the layer adds, on the reference's hidden states. "
            "Accumulated: of the hidden states behind it.",
            "errors",
            _errors_figure(profile),
            profile_rows(profile),
        ),
        Part("Routing", "", "routing", _routing_figure(routed)),
        Part(
            "Errors of experts",
            "On the inputs that the reference sends to each.",
            "experts",
            _expert_errors_figure(routed),
        ),
        Part("Errors by class of expert", "Over all layers.", table=kind_rows(profile)),
    ]


def bytes_rows(result: Json) -> list[list[str]]:
    total = result["bytes"]
    rows = [[name, str(nbytes), f"{nbytes / total:.1%}"] for name, nbytes in result["bytes_by_class"].items()]
    return [["class", "bytes", "share"], *rows, ["all files", str(total), "100.0%"]]


def curve_rows(curve: Sequence[Json]) -> list[list[str]]:
    rows = [["memory", "bytes of weights", "expected loss", "KLD", "standard error", "top-1", "PPL"]]
    for row in curve:
        error = "-" if row["kld_stderr"] is None else f"{row['kld_stderr']:.5f}"
        sizes = [str(row["memory"]), str(row["bytes_weights"]), f"{row['expected_loss']:.3g}"]
        rows.append([*sizes, f"{row['kld_mean']:.5f}", error, f"{row['top1_agreement']:.2%}", f"{row['ppl']:.3f}"])
    return rows


def profile_rows(profile: Sequence[Json]) -> list[list[str]]:
    rows = [["layer", "alone", "accumulated", "experts", "shared", "top-1", "top-k", "changed", "confidence", "before"]]
    for row in profile:
        cells = ["-"] * 7
        if row["routing"] is not None:
            routing, shared = row["routing"], row["shared_error"]
            cells = [
                _number(row["experts"]["error_of_all"]),
                "-" if shared is None else _number(shared),
                *(f"{routing[name]:.2%}" for name in ("top1", "topk", "changed")),
                *(f"{routing[name]:.4f}" for name in ("confidence", "confidence_reference")),
            ]
        rows.append([str(row["layer"]), _number(row["own_error"]), _number(row["stream_error"]), *cells])
    return rows


def kind_rows(profile: Sequence[Json]) -> list[list[str]]:
    """Of every class of experts: how many, their share of the choices, and the mean error of their outputs over layers."""
    rows = [["class", "experts", "share of the choices", "mean error over layers"]]
    layers = [row["experts"]["by_kind"] for row in profile if row["experts"] is not None]
    total = sum(kind["tokens"] for layer in layers for kind in layer.values())
    for name in _KIND_COLOURS:
        own = [layer[name] for layer in layers if name in layer]
        errors = [kind["error"] for kind in own if kind["error"] is not None]
        if own:
            share = sum(kind["tokens"] for kind in own) / total
            rows.append([name, str(sum(kind["experts"] for kind in own)), f"{share:.1%}", _mean(errors)])
    shared = [row["shared_error"] for row in profile if row["shared_error"] is not None]
    return rows + ([["shared", str(len(shared)), "every token", _mean(shared)]] if shared else [])


def _mean(values: Sequence[float]) -> str:
    return _number(float(np.mean(values))) if len(values) else "-"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _bytes_figure(by_class: Mapping[str, int]) -> Any:
    figure, axes = new_figure(height=0.9 + 0.32 * len(by_class))
    total = sum(by_class.values())
    names = list(by_class)[::-1]
    sizes = [by_class[name] / 1e6 for name in names]
    axes.barh(names, sizes, color=COLOURS[0])
    for place, (name, size) in enumerate(zip(names, sizes, strict=True)):
        axes.text(size + 0.01 * max(sizes), place, f"{by_class[name] / total:.1%}", va="center", fontsize=8)
    axes.set(xlabel="MB (10^6 bytes)", xlim=(0, 1.12 * max(sizes)))
    axes.set_title("bytes of all files", fontsize=10)
    return figure


def _levels_figure(layers: Sequence[Json]) -> Any:
    """A map of layers and experts per projection, one scale of colours for all."""
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure

    names = layers[0]["projections"]
    figure = Figure(figsize=(8, len(names) * (1.1 + 0.09 * min(40, max(6, len(layers))))), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    written = {level for layer in layers for levels in layer["levels"] for level in levels if level}
    known = sorted({2, 3, 4, 6, 8, *written})
    edges = [1.5, *((a + b) / 2 for a, b in pairwise(known)), known[-1] + 0.5]
    norm = BoundaryNorm(edges, 256)
    width = max(len(layer["levels"][0]) for layer in layers)
    for p, (axes, name) in enumerate(zip(panels, names, strict=True)):
        levels = [[level or np.nan for level in layer["levels"][p]] for layer in layers]  # blank: no such copy
        rows = [[*row, *[np.nan] * (width - len(row))] for row in levels]
        image = axes.imshow(np.array(rows, float), aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
        step = -(-len(layers) // 24)
        axes.set_yticks(range(0, len(layers), step), [str(layer["layer"]) for layer in layers[::step]], fontsize=8)
        axes.set_ylabel("layer")
        axes.set_title(name, fontsize=10)
    panels[-1].set_xlabel("expert")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    bar = figure.colorbar(image, ax=panels, label="bits written", ticks=[(a + b) / 2 for a, b in pairwise(edges)])
    bar.ax.set_yticklabels([str(level) for level in known])
    return figure


def _loss_figure(places: Sequence[Json]) -> Any:
    figure, axes = new_figure(height=4.4)
    classes = list(dict.fromkeys(name for row in places for name in row["losses"]))
    names, bottom = [row["place"] for row in places], np.zeros(len(places))
    for i, name in enumerate(classes):
        losses = np.array([row["losses"].get(name, 0.0) for row in places])
        hatch = "//" if i >= len(COLOURS) else None
        axes.bar(names, losses, bottom=bottom, color=COLOURS[i % len(COLOURS)], label=name, width=0.8, hatch=hatch)
        bottom = bottom + losses
    axes.set(xlabel="layer", ylabel="expected loss (nats)", ylim=(0, 1.05 * bottom.max()))
    _thin_ticks(axes, names)
    axes.set_title("where the expected loss comes from", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _sensitivity_figure(places: Sequence[Json]) -> Any:
    """A line per class over the places; a point where it is in one only."""
    figure, axes = new_figure(height=4.4)
    names = [row["place"] for row in places]
    for i, name in enumerate(dict.fromkeys(name for row in places for name in row["losses"])):
        losses = [row["losses"].get(name) or np.nan for row in places]  # nothing has no place on a log scale
        axes.plot(range(len(names)), losses, "os^vDP*X"[i % 8] + "-", color=COLOURS[i % len(COLOURS)], label=name, ms=5)
    axes.set(xlabel="layer", ylabel="loss at a relative error of 1 (nats, log)", yscale="log")
    _thin_ticks(axes, names)
    axes.set_title("sensitivity over the layers", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _curve_figure(curve: Sequence[Json]) -> Any:
    figure, axes = new_figure()
    sizes = [row["bytes_weights"] / 1e6 for row in curve]
    klds = [row["kld_mean"] for row in curve]
    bars = [2 * (row["kld_stderr"] or 0.0) for row in curve]
    axes.errorbar(sizes, klds, yerr=bars, fmt="o-", color=COLOURS[0], capsize=3, label="measured KLD")
    axes.plot(sizes, [row["expected_loss"] for row in curve], "s--", color=COLOURS[1], ms=4, label="expected loss")
    if curve[0]["forecast"] is not None:
        axes.plot(
            sizes, [row["forecast"] for row in curve], "^:", color=COLOURS[2], ms=4, label="forecast in the folder"
        )
    axes.set(xlabel="weights in memory (MB, 10^6 bytes)", ylabel="nats (log)", yscale="log")
    axes.set_title("KLD against size", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=9)
    return figure


def _domain_figure(curve: Sequence[Json]) -> Any:
    rows = sorted(curve[-1]["domains"], key=lambda row: row["kld_mean"])
    figure, axes = new_figure(height=1.2 + 0.32 * max(3, len(rows)))
    bars = [2 * (row["kld_stderr"] or 0.0) for row in rows]
    axes.barh([row["name"] for row in rows], [row["kld_mean"] for row in rows], xerr=bars, color=COLOURS[0], capsize=3)
    axes.axvline(curve[-1]["kld_mean"], color=COLOURS[1], ls="--", label="all")
    axes.set(xlabel="KLD (nats)")
    axes.set_xlim(left=0)
    axes.set_title("KLD by domain", fontsize=10)
    axes.legend(fontsize=9)
    return figure


def _errors_figure(profile: Sequence[Json]) -> Any:
    figure, axes = new_figure()
    numbers = _numbers(profile)
    axes.plot(numbers, [row["own_error"] for row in profile], "o-", color=COLOURS[0], label="of one layer alone")
    axes.plot(numbers, [row["stream_error"] for row in profile], "s--", color=COLOURS[1], label="accumulated")
    routed = [row for row in profile if row["experts"] is not None]
    axes.plot(
        _numbers(routed),
        [row["experts"]["error_of_all"] for row in routed],
        "^:",
        color=COLOURS[2],
        label="routed experts",
    )
    shared = [row for row in routed if row["shared_error"] is not None]
    if shared:
        errors = [row["shared_error"] for row in shared]
        axes.plot(_numbers(shared), errors, "v-.", color=COLOURS[3], label="shared expert")
    axes.set(xlabel="layer", ylabel="relative squared error (log)", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("errors by layer", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _routing_figure(routed: Sequence[Json]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers, of = _numbers(routed), lambda name: np.array([row["routing"][name] for row in routed])
    left.plot(numbers, 100 * of("top1"), "o-", color=COLOURS[0], ms=4, label="best expert the same")
    left.plot(numbers, 100 * of("topk"), "s--", color=COLOURS[1], ms=4, label="chosen experts the same")
    left.plot(numbers, 100 - 100 * of("changed"), "^:", color=COLOURS[2], ms=4, label="whole set the same")
    left.set(xlabel="layer", ylabel="% of the tokens, or of the choices", title="routing agreement")
    right.plot(numbers, of("confidence_reference"), "o-", color=COLOURS[0], ms=4, label="reference")
    right.plot(numbers, of("confidence"), "s--", color=COLOURS[1], ms=4, label="converted")
    right.set(xlabel="layer", ylabel="share of the best gate weight", title="router confidence")
    for axes in (left, right):
        axes.title.set_fontsize(10)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _expert_errors_figure(routed: Sequence[Json]) -> Any:
    rows = [[np.nan if e is None else e for e in row["experts"]["error"]] for row in routed]
    width = max(map(len, rows))
    errors = np.array([[*row, *[np.nan] * (width - len(row))] for row in rows], np.float64)
    return heat_map(
        np.log10(np.where(errors > 0, errors, np.nan)),
        _numbers(routed),
        title="errors of the experts' outputs",
        x="expert",
        y="layer",
        unit="log10 of the relative squared error",
        low=None,
    )


def _thin_ticks(axes: Any, names: Sequence[str]) -> None:
    step = -(-len(names) // 24)
    crowded = step > 1 and max(map(len, names)) > 3
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=90 if crowded else 0)
