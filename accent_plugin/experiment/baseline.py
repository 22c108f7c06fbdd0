"""The frozen baseline: mean-pooled layers of a frozen encoder and scikit-learn's logistic regression.

It needs no GPU, and fine-tuning should beat it. The validation split selects the layer and the regularisation strength.
The selected model is refitted on training and validation together.
"""

import logging

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from accent_plugin.errors import DataError
from accent_plugin.evaluation.scores import confusion_matrix, macro_f1, unweighted_average_recall
from accent_plugin.training import feature_cache

logger = logging.getLogger(__name__)

# Inverse strengths of the L2 penalty, at most scikit-learn's default because there are more features than speakers.
STRENGTHS = (1.0, 0.1, 0.01, 0.001)


def layer_means(encoder, loader, device="cpu", progress=True):
    """Compute the mean over the frames of each hidden state of each clip.

    Arguments
    ---------
    encoder : accent_plugin.encoder.base.InvariantEncoder
    loader, device, progress
        As in `accent_plugin.training.feature_cache.encode`.

    Returns
    -------
    (clips, states, features) np.ndarray of float32
        In the order of the loader's data set.
    """
    found = {}
    for batch, means in feature_cache.encode(encoder, loader, device, every_state=True, progress=progress):
        require_all(dict(batch.lost))
        found.update(zip(batch.ids, means, strict=True))
    return np.concatenate([found[clip.id] for clip in loader.dataset.clips])


def require_all(lost):
    """Raise a DataError if any clip could not be read; `lost` is {id: reason}."""
    if lost:
        raise DataError("; ".join(f"{name}: {why}" for name, why in lost.items()) + "\nprepare the data again")


def fit(train, labels, valid, valid_labels, classes, layers=None, seed=0):
    """Select the layer and the strength on validation, and refit the best on all examples.

    Arguments
    ---------
    train, valid : (clips, states, features) np.ndarray
    labels, valid_labels : (clips,) np.ndarray of int
    classes : int
    layers : list of int
        States to try; None tries all.
    seed : int

    Returns
    -------
    model : sklearn.pipeline.Pipeline
        Standardises and classifies the features of the chosen layer.
    layer : int
    trials : list of dict
        Layer, strength and validation metrics of each trial.
    """
    best, trials = None, []
    for layer in range(train.shape[1]) if layers is None else layers:
        for strength in STRENGTHS:
            model = _make(strength, seed).fit(train[:, layer], labels)
            confusion = confusion_matrix(valid_labels, model.predict(valid[:, layer]), classes)
            # Ties are common on a small validation split; the likelihood breaks them.
            likelihood = model.predict_log_proba(valid[:, layer])[np.arange(len(valid_labels)), valid_labels].mean()
            trial = {
                "layer": layer,
                "strength": strength,
                "valid_macro_f1": float(macro_f1(confusion)),
                "valid_uar": float(unweighted_average_recall(confusion)),
                "valid_loss": float(-likelihood),
            }
            trials.append(trial)
            score = (trial["valid_macro_f1"], likelihood)
            if best is None or score > best[0]:
                best = (score, layer, strength)
    _, layer, strength = best
    logger.info("layer %d of %d and C = %g chosen on validation", layer, train.shape[1] - 1, strength)
    both = np.concatenate([train[:, layer], valid[:, layer]])
    return _make(strength, seed).fit(both, np.concatenate([labels, valid_labels])), layer, trials


def _make(strength, seed):
    classifier = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000, random_state=seed)
    return make_pipeline(StandardScaler(), classifier)
