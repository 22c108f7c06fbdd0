"""Figures of an audit: composition of the data, recording conditions, and the permutation test."""

import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from accent_plugin.report import figures


def _height(rows):
    return 0.9 + 0.3 * max(3, rows)


def composition(path, counts):
    """Draw the clips, speakers and hours of each accent in each split.

    Arguments
    ---------
    path : Path
    counts : dict
        Split -> accent -> {"clips", "clients", "seconds"}; quantities that are None everywhere are omitted.
    """
    accents = sorted({accent for cells in counts.values() for accent in cells})
    sizes = {accent: sum(cells[accent]["clips"] for cells in counts.values() if accent in cells) for accent in accents}
    accents.sort(key=lambda accent: (-sizes[accent], accent))
    kinds = {"clips": ("clips", 1), "speakers": ("clients", 1), "hours": ("seconds", 3600)}
    kinds = {
        title: (key, unit)
        for title, (key, unit) in kinds.items()
        if any(cell[key] is not None for cells in counts.values() for cell in cells.values())
    }
    figure = figures.make_figure(3 * len(kinds) + 1.2, 0.5 + _height(len(accents) * max(1, 0.4 * len(counts))))
    height = 0.8 / len(counts)
    for ax, (title, (key, unit)) in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds.items(),
                                        strict=True):  # fmt: skip
        for i, cells in enumerate(counts.values()):
            values = np.array([(cells[a][key] or 0) / unit if a in cells else 0 for a in accents])
            places = np.arange(len(accents)) + (i - (len(counts) - 1) / 2) * height
            ax.barh(places, values, height * 0.92, **figures.figure_style(i))
            for place, value in zip(places, values, strict=True):
                number = f"{value:,.2f}" if unit > 1 else f"{value:,.0f}"
                ax.annotate(number, (value, place), (3, 0), textcoords="offset points", va="center", fontsize=7,
                            color=figures.GREY if value else figures.WRONG)  # fmt: skip
        ax.set_title(title, fontsize=10, loc="left")
        ax.margins(x=0.2)
        ax.xaxis.set_major_locator(MaxNLocator(3, integer=unit == 1, prune="upper"))
        figures.strip_axes(ax, "x")
        ax.tick_params(axis="y", length=0)
        ax.set_yticks(range(len(accents)), [figures.plain_text(accent) for accent in accents])
        ax.set_ylim(len(accents) - 0.5, -0.5)
    handles = [Patch(**figures.figure_style(i)) for i in range(len(counts))]
    names = [figures.plain_text(split) for split in counts]
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(counts), 5), frameon=False, fontsize=9)
    figures.save_figure(figure, path)


def recording_conditions(path, values, units):
    """Draw the recording conditions of each accent: box plots of measurements, fractions of categories.

    Arguments
    ---------
    path : Path
    values : dict
        Feature -> accent -> list of floats, or of integers or strings for categories.
    units : dict
        Feature -> unit, or "".
    """
    accents = sorted({accent for cells in values.values() for accent in cells})
    figure, axes = figures.grid_axes(len(values), [0.55 + _height(len(accents))] * len(values))
    for place, (ax, (name, cells)) in enumerate(zip(axes, values.items(), strict=True)):
        unit = units[name]
        title = name.replace("_", " ") + (f" ({unit})" if unit else "")
        seen = sorted({value for cell in cells.values() for value in cell})
        if not isinstance(seen[0], float):
            _draw_fractions(ax, [cells[accent] for accent in accents], seen)
        else:
            ax.boxplot(
                [cells[accent] for accent in accents],
                orientation="horizontal",
                positions=range(len(accents)),
                widths=0.55,
                patch_artist=True,
                boxprops={"facecolor": figures.RIGHT, "alpha": 0.35, "edgecolor": figures.RIGHT},
                medianprops={"color": "black"},
                whiskerprops={"color": figures.RIGHT},
                capprops={"color": figures.RIGHT},
                flierprops={"marker": ".", "markersize": 3, "markeredgecolor": "#999999"},
            )
            ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.set_title(title, fontsize=10, loc="left")
        figures.strip_axes(ax, "x")
        ax.tick_params(axis="y", length=0)
        ax.set_yticks(
            range(len(accents)), [figures.plain_text(accent, 14) for accent in accents] if place % 3 == 0 else []
        )
        ax.set_ylim(len(accents) - 0.4, -0.6)
    figures.save_figure(figure, path)


def _draw_fractions(ax, cells, seen):
    """Draw a stacked bar for each accent with the fraction of each value; all values beyond seven are "others"."""
    most = sorted(seen, key=lambda value: -sum(cell.count(value) for cell in cells))[:7]
    left = np.zeros(len(cells))
    for i, value in enumerate([*most, None]):
        mine = [v for v in seen if v not in most] if value is None else [value]
        fraction = np.array([sum(map(cell.count, mine)) / len(cell) for cell in cells])
        if fraction.any():
            label = (
                "others" if value is None else figures.plain_text(value if isinstance(value, str) else f"{value:,}", 20)
            )
            style = figures.figure_style(i) | {"edgecolor": "white", "linewidth": 0.4}
            ax.barh(range(len(cells)), fraction, 0.6, left=left, label=label, **style)
            left += fraction
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(frameon=False, fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(-0.03, 0), borderaxespad=3,
              handlelength=1)  # fmt: skip


def permutations(path, permuted, observed, p):
    """Draw the distribution of the scores under permutation, and the observed score.

    Arguments
    ---------
    path : Path
    permuted : sequence of float
    observed : float
    p : float
    """
    figure = figures.make_figure(6.2, 3.2)
    ax = figure.subplots()
    low, high = min(*permuted, observed), max(*permuted, observed)
    step = max((high - low) / 30, 0.005)
    ax.hist(permuted, bins=np.arange(low - step / 2, high + 2 * step, step), color="#999999", rwidth=0.92)
    ax.axvline(observed, color=figures.WRONG, linewidth=2)
    away, side = (-5, "right") if observed > (low + high) / 2 else (5, "left")
    ax.annotate(f"observed {observed:.3f}", (observed, 1), (away, -2), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha=side, va="top", color=figures.WRONG, fontsize=9)  # fmt: skip
    ax.set(xlabel="unweighted average recall from the recording conditions", ylabel="permutations over speakers")
    ax.set_title(f"{len(permuted)} permutations, mean {np.mean(permuted):.3f}; p = {p:.3f}", fontsize=10, loc="left")
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.margins(y=0.25)
    figures.strip_axes(ax, "y")
    figures.save_figure(figure, path)
