"""Selective classification: risk against coverage."""

from dataclasses import dataclass

import numpy as np

from accent_plugin.errors import ReportError
from accent_plugin.evaluation.bootstrap import bootstrap_interval, grouped_sums
from accent_plugin.evaluation.scores import safe_ratio

SURE = (0.5, 0.8, 0.9)  # coverages at which the accuracy is reported
_POINTS = 200  # maximum number of points of a curve
COVERAGE_TENTHS = 10
USUAL_COVERAGE = 0.8  # at the threshold of reports and model cards


@dataclass(frozen=True)
class Curve:
    """Risk-coverage curve: error rate against the fraction of clips answered, as the threshold falls.

    Arguments
    ---------
    threshold : tuple of float
        A clip is answered if its largest probability is at least this; decreasing.
    coverage : tuple of float
        Fraction of the clips that are answered; increasing to 1.
    risk : tuple of float
        Fraction of these answers that are wrong; the last value is the error rate.
    area : float
        Area under the curve, from all points before thinning (AURC of Geifman and El-Yaniv, 2017).
    """

    threshold: tuple
    coverage: tuple
    risk: tuple
    area: float

    def threshold_for(self, *, max_risk=None, min_coverage=None):
        """Choose a threshold for a given risk or coverage.

        On other clips the risk may be higher, especially if the curve was computed from few clips.

        Arguments
        ---------
        max_risk : float
            Answer as many clips as possible with at most this fraction of wrong answers.
        min_coverage : float
            Answer at least this fraction of clips, but as few more as possible.

        Returns
        -------
        threshold : float

        Raises
        ------
        ReportError
            When not exactly one of the two is given, its value is not from 0 to 1, or no threshold reaches the risk.

        Example
        -------
        >>> curve = risk_coverage(np.array([0.9, 0.8, 0.6, 0.5]), np.array([True, True, False, True]))
        >>> curve.threshold_for(max_risk=0.1), curve.threshold_for(min_coverage=0.7)
        (0.8, 0.6)
        """
        given = {k: v for k, v in {"max_risk": max_risk, "min_coverage": min_coverage}.items() if v is not None}
        if len(given) != 1:
            raise ReportError(f"give either max_risk or min_coverage to choose a threshold, not {given or 'neither'}")
        ((name, value),) = given.items()
        if not 0 <= value <= 1:
            raise ReportError(f"{name} is {value}: give a fraction from 0 to 1")
        if min_coverage is not None:
            return next(t for t, c in zip(self.threshold, self.coverage, strict=True) if c >= min_coverage)
        reached = [t for t, r in zip(self.threshold, self.risk, strict=True) if r <= max_risk]
        if not reached:
            raise ReportError(
                f"no threshold keeps the fraction of wrong answers at or below {max_risk}: the lowest is "
                f"{min(self.risk):.3g}, at a probability of {self.threshold[int(np.argmin(self.risk))]:.3g}\n"
                "allow a larger max_risk, or choose by min_coverage"
            )
        return reached[-1]


def risk_coverage(top, right):
    """Compute the risk-coverage curve from each clip's largest probability and whether its answer is right.

    The `Curve` has at most 200 points, evenly spaced in coverage, including both ends.

    Arguments
    ---------
    top : (clips,) np.ndarray
    right : (clips,) np.ndarray of bool

    Example
    -------
    >>> risk_coverage(np.array([0.9, 0.6, 0.6]), np.array([True, True, False])).risk
    (0.0, 0.3333333333333333)
    """
    order = np.argsort(top)[::-1]
    top, wrong = top[order], np.cumsum(~right[order])
    last = np.flatnonzero(np.append(top[1:] != top[:-1], True))  # index of the last clip with each probability
    count, clips = last + 1, len(top)
    risk = wrong[last] / count
    area = float((np.diff(count, prepend=0) * risk).sum() / clips)
    kept = np.unique(np.searchsorted(count, np.linspace(count[0], clips, _POINTS)))

    def points(values):
        return tuple(values[kept].tolist())

    return Curve(points(top[last]), points(count / clips), points(risk), area)


def operating_point(curve):
    """Find the largest threshold of a bundle's curve at which 80 % of the clips are answered, or as many as it has.

    Arguments
    ---------
    curve : dict
        "threshold", "coverage" (increasing) and "risk", as in `accent_plugin.evaluation.calibration`.

    Returns
    -------
    point : dict
        The three values.

    Example
    -------
    >>> operating_point({"threshold": [0.9, 0.6, 0.5], "coverage": [0.5, 0.85, 1.0], "risk": [0.0, 0.1, 0.2]})
    {'threshold': 0.6, 'coverage': 0.85, 'risk': 0.1}
    """
    wanted = min(USUAL_COVERAGE, curve["coverage"][-1])
    place = next(i for i, coverage in enumerate(curve["coverage"]) if coverage >= wanted)
    return {name: curve[name][place] for name in ("threshold", "coverage", "risk")}


class CoverageTenths:
    """Counts of clips and of wrong answers in tenths of the clips, in descending order of probability."""

    def __init__(self, items):
        self.unit, self.right, clips = items.unit, items.right, len(items.top)
        ranked = np.sort(items.top)[::-1]
        # The smallest probability of each tenth. Clips with the same probability are in the same tenth.
        self.edges = ranked[(np.arange(1, COVERAGE_TENTHS + 1) * clips - 1) // COVERAGE_TENTHS]
        self.tenth = np.searchsorted(-self.edges, -items.top)

    def statistics(self, first, last):
        """(units, 2 * tenths) np.ndarray for units first to last - 1."""
        a, b = np.searchsorted(self.unit, [first, last])
        unit, units, tenth = self.unit[a:b] - first, last - first, self.tenth[a:b]
        wrong = ~self.right[a:b]
        return np.hstack([grouped_sums(unit, units, tenth, COVERAGE_TENTHS, weights) for weights in (None, wrong)])

    @staticmethod
    def counts(totals):
        """(2, 1 + draws, tenths) np.ndarray: clips and wrong answers, from (1 + draws, classes, 2 * tenths) totals."""
        return totals.sum(axis=1).reshape(-1, 2, COVERAGE_TENTHS).swapaxes(0, 1)

    def figures(self, totals, curve, n):
        """Make the "risk_coverage" part of a report from (1 + draws, classes, 2 * tenths) totals."""
        count, wrong = np.cumsum(self.counts(totals), axis=-1)
        risk = safe_ratio(wrong, count)
        # The risk is interpolated linearly within a tenth; in the first it is constant, as its start is unknown.
        middle = (risk + np.hstack([risk[:, :1], risk[:, :-1]])) / 2
        area = (np.diff(count, prepend=0) * middle).sum(axis=-1) / count[:, -1]
        surest = {}
        for coverage in SURE:
            k = round(coverage * COVERAGE_TENTHS) - 1
            surest[str(coverage)] = {
                "threshold": float(self.edges[k]),
                "coverage": float(count[0, k] / count[0, -1]),
                "accuracy": bootstrap_interval(np.where(count[:, k] > 0, 1 - risk[:, k], np.nan), n),
            }
        return {
            **{name: list(getattr(curve, name)) for name in ("threshold", "coverage", "risk")},
            "area": bootstrap_interval(np.maximum(area - area[0] + curve.area, 0), n),
            "surest": surest,
        }
