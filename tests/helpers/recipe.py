"""The recipe as a user calls it, and its results."""

import json

ACCENTS = ("us", "england", "scotland")
# SpeechBrain starts pip for the env.log of each run, which takes as long as the training of a tiny encoder.
NO_PIP_FREEZE = ("speechbrain.utils.logger.get_environment_description", lambda: "not described in tests")


def metrics_of(folder):
    return json.loads((folder / "report/metrics.json").read_text(encoding="utf-8"))
