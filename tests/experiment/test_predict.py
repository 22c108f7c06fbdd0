"""Scores of clips as predictions that are evaluated."""

import numpy as np
import pytest

from accent_plugin.data.manifests import Clip
from accent_plugin.evaluation.evaluate import evaluate
from accent_plugin.experiment.predict import as_predictions


@pytest.mark.parametrize("spellings", [("m", "F"), ("male_masculine", "female_feminine"), ("male", "female")])
def test_groups_by_gender_do_not_depend_on_how_a_manifest_spells_it(spellings):
    clips = [Clip(str(i), 1.0, "", ("us", "wales")[i % 2], "", spellings[i // 2], "") for i in range(4)]
    made = as_predictions(clips, np.log(np.full((4, 2), 0.5)), ["us", "wales"])
    assert list(evaluate(made, draws=2)["groups"]["gender"]) == ["female", "male"]
