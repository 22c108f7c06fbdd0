"""Selective classification: risk against coverage."""

from dataclasses import dataclass

import numpy as np

from accent_plugin.errors import ReportError
from accent_plugin.evaluation.bootstrap import bootstrap_interval, grouped_sums
from accent_plugin.evaluation.scores import safe_ratio

SURE = (0.5, 0.8, 0.9)  # shares of clips that are answered, the surest ones


_POINTS = 200  # of a curve that is kept


COVERAGE_TENTHS = 10


# ---- answering only when sure ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """What answering only the surest clips costs and gains, from the surest ones to all.

    Arguments
    ---------
    threshold : tuple of float
        Largest probability from which a clip is answered; falling.
    coverage : tuple of float
        Share of the clips that are answered; rising to 1.
    risk : tuple of float
        Share of these answers that is wrong; the last one is the error rate.
    area : float
        Mean of the risk over the clips, of all points, also those that were thinned out (Geifman and El-Yaniv, 2017).
    """

    threshold: tuple
    coverage: tuple
    risk: tuple
    area: float

    def threshold_for(self, *, max_risk=None, min_coverage=None):
        """Choose a threshold for a wanted risk or coverage.

        What held on these clips need not hold on others: a small risk seen on few clips is no bound.

        Arguments
        ---------
        max_risk : float
            Answer as many clips as possible with at most this share of wrong answers.
        min_coverage : float
            Answer at least this share of clips, and as few as that allows.

        Returns
        -------
        threshold : float

        Raises
        ------
        ReportError
            When not exactly one is given, it is no share, or no threshold reaches that risk.

        Example
        -------
        >>> curve = risk_coverage(np.array([0.9, 0.8, 0.6, 0.5]), np.array([True, True, False, True]))
        >>> curve.threshold_for(max_risk=0.1), curve.threshold_for(min_coverage=0.7)
        (0.8, 0.6)
        """
        given = {k: v for k, v in (("max_risk", max_risk), ("min_coverage", min_coverage)) if v is not None}
        if len(given) != 1:
            raise ReportError(
                f"a threshold is chosen by max_risk or by min_coverage, one of them; got {given or 'none'}"
            )
        ((name, share),) = given.items()
        if not 0 <= share <= 1:
            raise ReportError(f"{name} is {share}; it is a share, from 0 to 1")
        if min_coverage is not None:
            return next(t for t, c in zip(self.threshold, self.coverage, strict=True) if c >= min_coverage)
        reached = [t for t, r in zip(self.threshold, self.risk, strict=True) if r <= max_risk]
        if not reached:
            raise ReportError(
                f"no threshold keeps the share of wrong answers at or below {max_risk}: the lowest is "
                f"{min(self.risk):.3g}, at a probability of {self.threshold[int(np.argmin(self.risk))]:.3g}\n"
                "allow a larger max_risk, or choose by min_coverage"
            )
        return reached[-1]


def risk_coverage(top, right):
    """Trace risk against coverage as the threshold falls.

    Arguments
    ---------
    top : (clips,) np.ndarray
        Largest probability of each clip.
    right : (clips,) np.ndarray of bool
        Whether its answer is right.

    Returns
    -------
    curve : Curve
        At most 200 points, evenly spaced in coverage, with both ends.

    Example
    -------
    >>> risk_coverage(np.array([0.9, 0.6, 0.6]), np.array([True, True, False])).risk
    (0.0, 0.3333333333333333)
    """
    order = np.argsort(top)[::-1]
    top, wrong = top[order], np.cumsum(~right[order])
    last = np.flatnonzero(np.append(top[1:] != top[:-1], True))  # of the clips with the same probability
    count, clips = last + 1, len(top)
    risk = wrong[last] / count
    area = float((np.diff(count, prepend=0) * risk).sum() / clips)
    kept = np.unique(np.searchsorted(count, np.linspace(count[0], clips, _POINTS)))

    def points(values):
        return tuple(values[kept].tolist())

    return Curve(points(top[last]), points(count / clips), points(risk), area)


class CoverageTenths:
    """Tenths of the clips by their largest probability, the surest first: how many, and how many are wrong."""

    def __init__(self, items):
        self.unit, self.right, clips = items.unit, items.right, len(items.top)
        ranked = np.sort(items.top)[::-1]
        # Of each tenth the smallest probability; all clips that share it belong to the same one.
        self.edges = ranked[(np.arange(1, COVERAGE_TENTHS + 1) * clips - 1) // COVERAGE_TENTHS]
        self.tenth = np.searchsorted(-self.edges, -items.top)

    def statistics(self, first, last):
        """(units, 2 * tenths) np.ndarray for units first to last - 1."""
        a, b = np.searchsorted(self.unit, [first, last])
        unit, units, tenth = self.unit[a:b] - first, last - first, self.tenth[a:b]
        wrong = ~self.right[a:b]
        return np.hstack([grouped_sums(unit, units, tenth, COVERAGE_TENTHS, weights) for weights in (None, wrong)])

    def figures(self, totals, curve, n):
        """Make the report's part on risk and coverage of (1 + draws, classes, 2 * tenths) totals."""
        count, wrong = np.cumsum(totals.sum(axis=1).reshape(-1, 2, COVERAGE_TENTHS), axis=-1).swapaxes(0, 1)
        risk = safe_ratio(wrong, count)
        # Within a tenth the risk is taken to change evenly; in the first there is no telling where it began.
        middle = (risk + np.hstack([risk[:, :1], risk[:, :-1]])) / 2
        area = (np.diff(count, prepend=0) * middle).sum(axis=-1) / count[:, -1]
        surest = {}
        for share in SURE:
            k = round(share * COVERAGE_TENTHS) - 1
            surest[str(share)] = {
                "threshold": float(self.edges[k]),
                "coverage": float(count[0, k] / count[0, -1]),
                "accuracy": bootstrap_interval(np.where(count[:, k] > 0, 1 - risk[:, k], np.nan), n),
            }
        return {
            "threshold": list(curve.threshold),
            "coverage": list(curve.coverage),
            "risk": list(curve.risk),
            "area": bootstrap_interval(np.maximum(area - area[0] + curve.area, 0), n),
            "surest": surest,
        }
