"""Draw the figures of a report as PNG files, without global matplotlib state, in colours for colour-blind readers."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from accent_plugin.evaluation.evaluate import SMALL
from accent_plugin.evaluation.scores import BINS, calibration_bins

DPI = 150
SCALE = 100 / DPI  # size on a page per pixel of a PNG
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#999999")  # Okabe and Ito
RIGHT, WRONG, GREY = COLOURS[0], COLOURS[3], "#666666"
MOST_SPEAKERS = 180  # rows in the figure of speakers, over all accents


def make_figure(width, height):
    """Make a white figure; width and height are in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure, path):
    """Write a figure as PNG; identical figures give identical bytes."""
    # savefig would draw everything twice. The version is left out, so that the same predictions give the same bytes.
    figure.canvas.print_png(path, metadata={"Software": None})


def strip_axes(ax, grid=None):
    """Hide the top and right spines, and draw the others and the grid in light grey."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#BBBBBB")
    ax.tick_params(color="#BBBBBB", labelsize=9)
    if grid:
        ax.grid(axis=grid, color="#E6E6E6", linewidth=0.8)
        ax.set_axisbelow(True)


def plain_text(text, most=24):
    """Shorten a name, and escape dollar signs, which matplotlib reads as formulas."""
    text = " ".join(str(text).split())
    text = text if len(text) <= most else text[: most - 1] + "…"
    return text.replace("$", r"\$")


def figure_style(index):
    """Return the colour of an accent; from the ninth on, the colours repeat with hatching."""
    return {"facecolor": COLOURS[index % len(COLOURS)], "hatch": ("", "////", "....")[index // len(COLOURS) % 3]}


def confusion(path, labels, matrices):
    """Draw confusion matrices (title -> counts; rows are the true accents) with counts and row percentages."""
    n = len(labels)
    side = max(3.6, 1.2 + 0.62 * n)
    across, size = n <= 6, 11 if n <= 4 else 9 if n <= 10 else 8
    shape = (1, len(matrices)) if across else (len(matrices), 1)
    figure = make_figure(side * shape[1] + 0.5, (side * 0.92 + 0.3) * shape[0])
    for ax, (title, counts) in zip(figure.subplots(*shape, squeeze=False).flat, matrices.items(), strict=True):
        counts = np.asarray(counts)
        total = counts.sum(axis=1, keepdims=True)
        fraction = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
        ax.imshow(fraction, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.ndindex(counts.shape):
            # With many accents most cells are zero, and zeros would hide the others.
            if total[i] and (counts[i, j] or n <= 6):
                colour = "white" if fraction[i, j] > 0.55 else "#222222" if counts[i, j] else "#AAAAAA"
                text = f"{counts[i, j]:,}\n{fraction[i, j]:.0%}"
                ax.text(
                    j, i, text, ha="center", va="center", linespacing=1.4, color=colour, fontsize=size, in_layout=False
                )
        names = [plain_text(label, 14) for label in labels]
        ax.set_xticks(range(n), names, rotation=0 if n <= 4 else 40, ha="center" if n <= 4 else "right")
        ax.set_yticks(range(n), [name if t else f"{name}\n(none)" for name, t in zip(names, total[:, 0], strict=True)])
        ax.set_xticks(np.arange(0.5, n - 1), minor=True)
        ax.set_yticks(np.arange(0.5, n - 1), minor=True)
        ax.grid(which="minor", color="white", linewidth=2)
        ax.tick_params(which="both", length=0, labelsize=10)
        ax.spines[:].set_visible(False)
        ax.set_xlabel("answer", color=GREY)
        ax.set_ylabel("true accent", color=GREY)
        ax.set_title(title, fontsize=12)
    save_figure(figure, path)


def curves(path, rows, selected_epoch=None):
    """Draw losses and scores by epoch, and mark the selected epoch.

    ``rows`` has a dict per epoch: "epoch", and any of "train_loss", "valid_loss", "valid_macro_f1", "valid_uar", ...
    """
    names = list(dict.fromkeys(key for row in rows for key in row))
    panels = {
        "loss": [name for name in names if name.endswith("loss")],
        "score": [name for name in names if any(part in name for part in ("f1", "uar", "recall", "accuracy"))],
    }
    epochs = [row["epoch"] for row in rows]
    figure = make_figure(9, 3.4)
    for ax, (title, chosen) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for i, name in enumerate(chosen):
            values = np.array([np.nan if row.get(name) is None else row[name] for row in rows], dtype=float)
            label = name.replace("_", " ").replace("f1", "F1").replace("uar", "average recall")
            style = {"color": COLOURS[i], "linestyle": ("-", "--", "-.", ":")[i % 4], "marker": "o", "markersize": 4}
            ax.plot(epochs, values, label=label, **style)
        if selected_epoch is not None:
            ax.axvline(selected_epoch, color="#BBBBBB", linewidth=6, alpha=0.5, zorder=0)
            ax.text(selected_epoch, 1.01, "selected", ha="center", va="bottom", fontsize=8, color=GREY,
                    transform=ax.get_xaxis_transform())  # fmt: skip
        ax.set(xlabel="epoch", ylabel=title)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.set_ylim(0, 1.02 if title == "score" else None)
        ax.margins(x=0.04)
        strip_axes(ax, "y")
        if chosen:
            ax.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1.06), ncols=2)
    save_figure(figure, path)


def degradations(path, clean, bands):
    """Draw the unweighted average recall against the strength of each kind of degradation, with its intervals.

    ``clean`` is the figure of the clips as recorded, ``bands`` has that of each degradation, as in metrics.json.
    """
    kinds = {}
    for band in bands.values():
        if band.get("strength") is not None:
            kinds.setdefault((band["kind"], band["unit"]), []).append(band)
    across = min(3, len(kinds))
    down = -(-len(kinds) // across)
    figure = make_figure(3.0 * across, 0.3 + 2.3 * down)
    panels = iter(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for ax, ((kind, unit), points) in zip(panels, kinds.items(), strict=False):
        places = range(len(points))
        recalls = [point["unweighted_average_recall"] for point in points]
        ax.axhline(clean["value"], color=GREY, linewidth=1, linestyle="--", label="as recorded")
        ax.plot(places, [recall["value"] for recall in recalls], "o-", color=RIGHT, markersize=5, label=kind)
        for place, recall in zip(places, recalls, strict=True):
            if recall["low"] is not None:
                ax.plot([place] * 2, [recall["low"], recall["high"]], color=RIGHT, linewidth=2.2, alpha=0.5)
        # From the mildest to the strongest: for some kinds that is from high to low.
        ax.set_xticks(places, [f"{point['strength']:g}" for point in points])
        ax.set(ylim=(0, 1.02), xlim=(-0.4, len(points) - 0.6), xlabel=f"{kind} ({unit})")
        strip_axes(ax, "y")
    for ax in list(panels):
        ax.set_visible(False)
    figure.supylabel("unweighted average recall", fontsize=10)
    save_figure(figure, path)


def reliability(path, predictions, error):
    """Draw a reliability diagram: accuracy by probability, and the number of answers in each bin."""
    count, confidence, accuracy = calibration_bins(predictions.probabilities, predictions.truth)
    some, width = count > 0, 1 / BINS
    centres = (np.arange(BINS) + 0.5) * width
    figure = make_figure(5.6, 5.6)
    ax, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="perfectly calibrated")
    ax.bar(centres[some], accuracy[some], width * 0.92, color=RIGHT, alpha=0.35, label="fraction correct")
    ax.plot(confidence[some], accuracy[some], "o", color=RIGHT, markersize=5, label="at the bin's mean probability")
    ax.set(ylim=(0, 1.02), xlim=(0, 1), ylabel="fraction of correct answers")
    ax.set_title(f"Expected calibration error by clip: {error:.3f}", fontsize=11, loc="left")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    below.bar(centres, count, width * 0.92, color="#999999")
    for centre, number in zip(centres[some], count[some], strict=True):
        below.annotate(f"{number}" if number < 10_000 else f"{number / 1000:.0f}k", (centre, number), (0, 1),
                       textcoords="offset points", ha="center", va="bottom", fontsize=7, color=GREY)  # fmt: skip
    below.margins(y=0.25)
    below.set(xlabel="probability of the answer", ylabel="clips")
    below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    strip_axes(ax, "y")
    strip_axes(below)
    save_figure(figure, path)


def recall(path, metrics):
    """Draw the recall of every accent and group with its interval; hollow markers have few speakers."""
    accents = {
        label: {**cell, "v": cell["recall"], "small": cell["recall"]["n"] < SMALL}
        for label, cell in metrics["per_accent"].items()
    }
    sections = {"accent": accents}
    for kind, cells in metrics["groups"].items():
        if cells:
            sections[kind] = {name: {**cell, "v": cell["unweighted_average_recall"]} for name, cell in cells.items()}
    rows = sum(len(cells) + 1.2 for cells in sections.values())
    figure = make_figure(8.4, 1.1 + 0.27 * rows)
    ax = figure.subplots()
    overall = metrics["clip"]["unweighted_average_recall"]["value"]
    ax.axvline(overall, color="#BBBBBB", linewidth=1, zorder=0)
    y, ticks, names = 0.0, [], []
    for kind, cells in sections.items():
        ticks.append(y)
        names.append((f"by {kind}", True))
        y -= 1
        for name, cell in cells.items():
            v, colour = cell["v"], "#888888" if cell["small"] else RIGHT
            if v["low"] is not None:
                ax.plot([v["low"], v["high"]], [y, y], color=colour, linewidth=2.2, solid_capstyle="round")
            ax.plot(
                v["value"], y, "o", markersize=6, color=colour, markerfacecolor="white" if cell["small"] else colour
            )
            speakers = "" if cell["speakers"] is None else f", {cell['speakers']:,} speakers"
            ax.text(1.02, y, f"{v['value']:.2f}   {cell['clips']:,} clips{speakers}", va="center", fontsize=8.5,
                    color=GREY, transform=ax.get_yaxis_transform())  # fmt: skip
            ticks.append(y)
            names.append((plain_text(name), False))
            y -= 1
        y -= 0.2
    ax.set_yticks(ticks, [name for name, _ in names])
    for label, (_, head) in zip(ax.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if head else "normal")
    ax.set(
        xlim=(-0.01, 1.01),
        ylim=(y + 0.7, 0.6),
        xlabel="recall by clip (groups: averaged over their accents), 95 % interval",
    )
    key = f"Line: unweighted average recall {overall:.3f}.  Hollow: fewer than {SMALL} speakers."
    ax.set_title(key, fontsize=9, loc="left", color=GREY)
    strip_axes(ax, "x")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    save_figure(figure, path)


def grid_axes(count, heights):
    """Lay out panels in rows of at most three; a row is as high as its highest panel (inches)."""
    across = min(3, count)
    rows = [max(heights[i : i + across]) for i in range(0, count, across)]
    figure = make_figure(3.25 * across + 0.4 if across > 1 else 5.5, sum(rows) + 0.6)
    axes = figure.subplots(len(rows), across, squeeze=False, height_ratios=rows)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return figure, axes.flat[:count]


def true_accent_probability(path, predictions):
    """Draw the distribution of the true accent's probability over the clips of each accent."""
    p = predictions
    present = np.unique(p.truth)
    own = p.probabilities[np.arange(len(p.ids)), p.truth]
    right = p.predicted == p.truth
    figure, axes = grid_axes(len(present), [2.2] * len(present))
    for ax, accent in zip(axes, present, strict=True):
        mine = p.truth == accent
        parts = [own[mine & right], own[mine & ~right]]
        ax.hist(
            parts,
            bins=np.linspace(0, 1, 21),
            stacked=True,
            color=(RIGHT, WRONG),
            rwidth=0.9,
            label=("correct", "wrong"),
        )
        ax.set_title(
            f"{plain_text(p.labels[accent])}: {mine.sum():,} clips, {parts[1].size:,} wrong", fontsize=10, loc="left"
        )
        ax.set_xlim(0, 1)
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        strip_axes(ax, "y")
    axes[0].set_ylabel("clips")
    figure.supxlabel("probability given to the true accent", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    save_figure(figure, path)


def coverage(path, part):
    """Draw the risk-coverage curve from "risk_coverage" of `accent_plugin.evaluation.evaluate.evaluate`."""
    figure = make_figure(5.6, 3.9)
    ax = figure.subplots()
    coverage, risk = part["coverage"], part["risk"]
    ax.axhline(risk[-1], color=GREY, linewidth=1, linestyle="--")
    ax.annotate(f"all clips answered: {risk[-1]:.3f}", (0, risk[-1]), (4, 4), textcoords="offset points", color=GREY,
                fontsize=8)  # fmt: skip
    ax.plot(coverage, risk, color=RIGHT, linewidth=1.8, marker="o" if len(coverage) < 20 else None, markersize=3)
    for point in part["surest"].values():
        wrong = 1 - point["accuracy"]["value"]
        ax.plot(point["coverage"], wrong, "o", color=RIGHT, markersize=6, clip_on=False, zorder=3)
        text = f"{wrong:.3f}\np ≥ {point['threshold']:.3f}"
        ax.annotate(text, (point["coverage"], wrong), (-7, 5), textcoords="offset points", ha="right", va="bottom",
                    fontsize=8, linespacing=1.3)  # fmt: skip
    ax.set(xlim=(0, 1), ylim=(0, 1.25 * max(*risk, 0.04)))
    ax.set(xlabel="coverage: fraction of clips answered", ylabel="risk: fraction of wrong answers")
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    area = part["area"]["value"]
    ax.set_title(f"Risk and coverage by clip: area {area:.3f}", fontsize=10, loc="left")
    strip_axes(ax, "y")
    save_figure(figure, path)


def _bar(x, y, width, half=0.41):
    return [(x, y - half), (x + width, y - half), (x + width, y + half), (x, y + half)]


def speakers(path, rows, labels):
    """Draw one bar per speaker with the answers to their clips, the worst speakers first.

    ``rows`` is from `accent_plugin.evaluation.evaluate.speaker_rows`.
    """
    groups = {label: [row for row in rows if row["accent"] == label] for label in labels}
    groups = {label: sorted(g, key=lambda r: (r["share_right"], r["client_id"])) for label, g in groups.items() if g}
    shown = {label: g[: max(12, MOST_SPEAKERS // len(groups))] for label, g in groups.items()}
    figure, axes = grid_axes(len(shown), [0.75 + 0.17 * max(4, len(g)) for g in shown.values()])
    for ax, (label, group) in zip(axes, shown.items(), strict=True):
        left = np.zeros(len(group))
        # The true accent comes first, so that the correct answers are at the start of each bar.
        for index in sorted(range(len(labels)), key=lambda i: labels[i] != label):
            widths = np.array([row["answers"][index] / row["clips"] for row in group])
            bars = [_bar(x, y, width) for y, (x, width) in enumerate(zip(left, widths, strict=True)) if width]
            ax.add_collection(PolyCollection(bars, edgecolor="white", linewidth=0.4, **figure_style(index)))
            left += widths
        wrong = [not row["right"] for row in group]
        ax.set_yticks(range(len(group)), [plain_text(row["client_id"] or "?", 14) for row in group])
        for tick, bad in zip(ax.get_yticklabels(), wrong, strict=True):
            tick.set(fontsize=7, color="black" if bad else GREY, fontweight="bold" if bad else "normal")
        for y, row in enumerate(group):
            # Not in the layout: measuring hundreds of labels is slow.
            ax.text(1.02, y, f"{row['clips']:,}", va="center", fontsize=6.5, color=GREY, in_layout=False)
        ax.set(xlim=(0, 1.13), ylim=(max(4, len(group)) - 0.4, -0.6), xticks=np.linspace(0, 1, 5))
        ax.xaxis.set_major_formatter(PercentFormatter(1))
        total = len(groups[label])
        cut = f" (the worst {len(group)} of {total:,})" if len(group) < total else f": {total} speakers"
        mistaken = sum(not row["right"] for row in groups[label])
        ax.set_title(f"{plain_text(label)}{cut}, {mistaken} wrong", fontsize=10, loc="left")
        strip_axes(ax)
        ax.tick_params(axis="y", length=0, pad=2)
        ax.tick_params(axis="x", labelsize=8)
        ax.spines[["left", "bottom"]].set_visible(False)
    handles = [Patch(**figure_style(i)) for i in range(len(labels))]
    figure.legend(handles, [f"answered {plain_text(label)}" for label in labels], loc="outside upper center",
                  ncols=min(len(labels), 4), frameon=False, fontsize=9)  # fmt: skip
    figure.supxlabel("fraction of the speaker's clips (number on the right); bold: misclassified speaker", fontsize=9)
    save_figure(figure, path)
