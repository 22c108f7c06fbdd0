"""The frozen baseline: validation chooses the layer, and what is fitted is what is reported."""

import numpy as np

from accent_plugin.experiment.baseline import STRENGTHS, fit


def examples(count, seed):
    """Three states of which the second alone tells the classes apart."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    features = rng.standard_normal((count, 3, 4))
    features[:, 1] += 4 * np.eye(3, 4)[labels]
    return features, labels


def test_validation_chooses_the_layer_that_tells():
    model, layer, trials = fit(*examples(90, 0), *examples(30, 1), classes=3)
    assert layer == 1 and len(trials) == 3 * len(STRENGTHS)
    features, labels = examples(60, 2)
    assert (model.predict(features[:, layer]) == labels).mean() > 0.9


def test_only_the_layers_that_are_asked_for_are_tried():
    _, layer, trials = fit(*examples(90, 0), *examples(30, 1), classes=3, layers=[0, 2])
    assert layer in (0, 2) and {trial["layer"] for trial in trials} == {0, 2}


def test_the_choice_is_fitted_on_training_and_validation_together():
    (train, labels), (valid, valid_labels) = examples(90, 0), examples(30, 1)
    model, layer, _ = fit(train, labels, valid, valid_labels, classes=3)
    both = np.concatenate([train[:, layer], valid[:, layer]])
    assert np.allclose(model[0].mean_, both.mean(axis=0))
