"""A trained classifier as one portable folder, without paths, code or a base checkpoint.

::

    config.json        labels, architecture, calibration, and the size and digest of the weights
    model.ckpt         the weights, as safetensors under the name that SpeechBrain's Pretrainer looks for
    graph.onnx         the network for ONNX Runtime, which reads the weights from model.ckpt; absent if there is none
    hyperparams.yaml   generated from config.json, for SpeechBrain's `EncoderClassifier.from_hparams`
    README.md          the model card

`load_bundle` reads config.json and the weights. It executes no YAML, unpickles nothing, and raises an error if the
bundle is incomplete or inconsistent, so it can open untrusted bundles safely. `from_hparams` executes hyperparams.yaml,
as SpeechBrain does for every model.
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
    """The content of a bundle, in the form that SpeechBrain's `EncoderClassifier` needs.

    Arguments
    ---------
    modules : dict
        "compute_features", "mean_var_norm", "embedding_model" and "classifier".
    hparams : dict
        "label_encoder", "sample_rate", "audio_normalizer", "mean_var_norm_emb" and "bundle_config".
    model : AccentModel
        The temperature is folded into its weights.
    config : dict
        The content of config.json.
    """

    modules: dict
    hparams: dict
    model: AccentModel
    config: dict


def load_bundle(folder):
    """Load a bundle without executing anything in it; any inconsistency is an error.

    Raises
    ------
    BundleError
        If a file is missing, damaged or inconsistent with the others, its size or digest differs from config.json, or
        the format_version is unknown.
    """
    folder = Path(folder).absolute()
    config = bundle_config.read(folder)
    weights = folder / WEIGHTS_FILE
    if config["weights"]["file"] != WEIGHTS_FILE:
        raise BundleError(
            f"{folder} is an ONNX export: load it with accent_plugin.exchange.onnx_classifier.OnnxAccentClassifier"
        )
    bundle_config.require_size(weights, config["weights"])
    # Tensors on the meta device take no memory, so the shapes can be checked first, however large they are.
    with torch.device("meta"):
        expected = _build_model(config, folder / CONFIG_FILE)
    require_tensors(weights, read_tensor_shapes(weights), expected)
    bundle_config.require_identity(weights, config["weights"])
    model = _build_model(config, folder / CONFIG_FILE)
    model.load_weights(weights)
    return make_bundle(model.eval(), config)


def check_bundle(folder):
    """Raise an error if a folder is not a complete bundle; see `load_bundle`."""
    load_bundle(folder)


def build(config):
    """Build the model without weights, for a bundle's hyperparams.yaml; ``config`` (str) is the text of config.json.

    SpeechBrain's Pretrainer then loads the weights.
    """
    return _build_model(json.loads(config), YAML_FILE)


def make_label_encoder(config):
    """Make SpeechBrain's label encoder with the labels of a bundle, in order; ``config`` as for `build`."""
    labels = json.loads(config)["labels"]
    encoder = CategoricalEncoder()
    encoder.update_from_iterable(labels, sequence_input=False)
    encoder.expect_len(len(labels))
    return encoder


def make_bundle(model, config):
    """Make a `Bundle` from a model in evaluation mode and the content of its config.json."""
    modules = {
        "compute_features": AsIs(),
        "mean_var_norm": AsIs(),
        "embedding_model": Embedding(model, config["model"]["speeds"]),
        "classifier": Head(model),
    }
    hparams = {
        "label_encoder": make_label_encoder(json.dumps(config)),
        "sample_rate": config["sample_rate"],
        "audio_normalizer": Normalizer(),
        "mean_var_norm_emb": AsIs(),
        "bundle_config": config,
    }
    return Bundle(modules, hparams, model, config)


def _build_model(config, where):
    described = config["model"]
    try:
        return BundledModel(
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
        # Untrusted values can cause any error in torch.
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BundleError(f"no model can be built from {where}: {problem}") from error
