"""Scored clips by hand, and simulated ones whose speakers differ."""

import numpy as np

from accent_plugin.evaluation.predictions import ScoredClips

LABELS = ("us", "england", "australia")


def calibrated(temperature, curve=None):
    """What `calibration.describe_calibration` gives, with figures that are made up."""
    return {
        "temperature": temperature,
        "clips": 100,
        "log_loss": {"before": 1.0, "after": 0.9},
        "expected_calibration_error": {"before": 0.2, "after": 0.1},
        "curve": curve or {"threshold": [0.3, 0.9], "coverage": [1.0, 0.1], "risk": [0.5, 0.0]},
    }


def build(probabilities, truth, clients=None, labels=LABELS, **columns):
    n = len(truth)
    with np.errstate(divide="ignore"):
        log_probabilities = np.log(np.asarray(probabilities, dtype=float))
    columns = {"seconds": [5.0] * n, **columns}
    ids = columns.pop("ids", [f"clip{i:04}" for i in range(n)])
    return ScoredClips(ids, clients, np.array(truth), log_probabilities, labels, **columns)


def simulate(speakers=30, clips=4, seed=0, labels=LABELS, skill=1.5, spread=1.0):
    """Clips of speakers who are each easy or hard, so that clips of one speaker hang together."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(speakers) % len(labels), clips)
    hard = np.repeat(rng.normal(scale=spread, size=(speakers, len(labels))), clips, axis=0)
    z = rng.normal(size=(speakers * clips, len(labels))) + hard + skill * np.eye(len(labels))[truth]
    return build(
        np.exp(z) / np.exp(z).sum(axis=1, keepdims=True),
        truth,
        [f"s{i // clips:03}" for i in range(speakers * clips)],
        labels=labels,
        seconds=rng.gamma(5, 1, speakers * clips),
        gender=[("male", "female", "")[i // clips % 3] for i in range(speakers * clips)],
        age=[str(18 + 3 * (i // clips) % 60) for i in range(speakers * clips)],
    )


def permuted(p, order):
    def pick(values):
        return None if values is None else [values[i] for i in order]

    return ScoredClips(
        pick(p.ids), pick(p.client_ids), p.truth[order], p.log_probabilities[order], p.labels, p.seconds[order],
        pick(p.gender), pick(p.age),
    )  # fmt: skip
