"""The recipe as a user calls it, and its results."""

import importlib.util
import json

from helpers import RECIPE

ACCENTS = ("us", "england", "scotland")
# SpeechBrain starts pip for the env.log of each run, which takes as long as the training of a tiny encoder.
NO_PIP_FREEZE = ("speechbrain.utils.logger.get_environment_description", lambda: "not described in tests")


def load_recipe():
    """The module train.py, of which the folder has to be on the path."""
    spec = importlib.util.spec_from_file_location("accent_recipe", RECIPE / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def metrics_of(folder):
    return json.loads((folder / "report/metrics.json").read_text(encoding="utf-8"))
