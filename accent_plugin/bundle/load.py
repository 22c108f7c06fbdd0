"""A trained classifier as one folder that travels: no paths, no code, no base checkpoint.

::

    config.json        the source of truth: labels, architecture, calibration, size and digest of the weights
    model.ckpt         the weights, as safetensors under the name that SpeechBrain's Pretrainer looks for
    hyperparams.yaml   generated from config.json, for SpeechBrain's `EncoderClassifier.from_hparams`
    README.md          the model card

`load` reads config.json and the weights, runs no YAML and unpickles nothing, and refuses what is not whole: so a bundle
of unknown origin is safe to open with it. `from_hparams` runs hyperparams.yaml, as SpeechBrain does with every model.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from speechbrain.dataio.encoder import CategoricalEncoder

from accent_plugin.bundle import config as bundle_config
from accent_plugin.bundle.config import CONFIG_FILE, WEIGHTS_FILE, YAML_FILE
from accent_plugin.bundle.modules import (
    AsIs,
    BundledModel,
    Embedding,
    Head,
    Normalizer,
    read_tensor_shapes,
    require_tensors,
)
from accent_plugin.encoder.factory import build_encoder
from accent_plugin.errors import AccentPluginError, BundleError
from accent_plugin.model import AccentModel


@dataclass(frozen=True)
class Bundle:
    """What a bundle holds, ready for SpeechBrain's `EncoderClassifier`.

    Arguments
    ---------
    modules : dict
        "compute_features", "mean_var_norm", "embedding_model" and "classifier".
    hparams : dict
        "label_encoder", "sample_rate", "audio_normalizer", "mean_var_norm_emb" and "bundle_config".
    model : AccentModel
        Its weights have the temperature folded in.
    config : dict
        The content of config.json.
    """

    modules: dict
    hparams: dict
    model: AccentModel
    config: dict


def load_bundle(folder):
    """Load a bundle; nothing in it is run, and every doubt is an error.

    Raises
    ------
    BundleError
        When a file is missing, damaged, of another size or digest than config.json says, of an unknown
        format_version, or does not fit the others.
    """
    folder = Path(folder).absolute()
    config = bundle_config.read(folder)
    weights = folder / WEIGHTS_FILE
    if config["weights"]["file"] != WEIGHTS_FILE:
        raise BundleError(
            f"{folder} was exported to ONNX: accent_plugin.exchange.onnx_classifier.OnnxAccentClassifier loads it"
        )
    bundle_config.require_size(weights, config)
    # On this device tensors have shapes and no memory, so that a configuration of any size can be compared first.
    with torch.device("meta"):
        expected = _build_model(config, folder / CONFIG_FILE)
    require_tensors(weights, read_tensor_shapes(weights), expected)
    bundle_config.require_identity(weights, config)
    model = _build_model(config, folder / CONFIG_FILE)
    model.load_weights(weights)
    return make_bundle(model.eval(), config)


def check_bundle(folder):
    """Refuse a folder that is no whole bundle; see `load`."""
    load_bundle(folder)


def build(config):
    """Build the model that a bundle's hyperparams.yaml asks for, to be filled by SpeechBrain's Pretrainer.

    Arguments
    ---------
    config : str
        The content of config.json.
    """
    config = json.loads(config)
    return _build_model(config, YAML_FILE)


def make_label_encoder(config):
    """SpeechBrain's label encoder with the labels of a bundle, in their order; ``config`` as in `build`."""
    labels = json.loads(config)["labels"]
    encoder = CategoricalEncoder()
    encoder.update_from_iterable(labels, sequence_input=False)
    encoder.expect_len(len(labels))
    return encoder


def make_bundle(model, config):
    """Make the `Bundle` of a model in evaluation mode and the content of its config.json."""
    text = json.dumps(config)
    modules = {
        "compute_features": AsIs(),
        "mean_var_norm": AsIs(),
        "embedding_model": Embedding(model, config["model"]["speeds"]),
        "classifier": Head(model),
    }
    hparams = {
        "label_encoder": make_label_encoder(text),
        "sample_rate": config["sample_rate"],
        "audio_normalizer": Normalizer(),
        "mean_var_norm_emb": AsIs(),
        "bundle_config": config,
    }
    return Bundle(modules, hparams, model, config)


def _build_model(config, where):
    described = config["model"]
    try:
        model = BundledModel(
            build_encoder(described["encoder"]),
            config["labels"],
            pooling=described["pooling"],
            projector_size=described["projector_size"],
            projector_activation=described["projector_activation"],
            whitening=described["whitening"],
        )
    except AccentPluginError as error:
        raise BundleError(f"{where}: {error}") from None
    except Exception as error:
        # Whatever a stranger's numbers make torch say.
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BundleError(f"{where} describes no model: {problem}") from error
    return model
