"""The recipe as a user calls it, and its results."""

import json

ACCENTS = ("us", "england", "scotland")


def metrics_of(folder):
    return json.loads((folder / "report/metrics.json").read_text(encoding="utf-8"))
