"""Start training from a trained classifier: a bundle or a Hugging Face classifier.

Models are loaded by modules that import PyTorch and transformers. They are imported where they are used, because the
recipe calls `find_start` before anything else.
"""

from pathlib import Path

from accent_plugin.bundle import config as bundle_config
from accent_plugin.data import labels
from accent_plugin.encoder.sources import find_source, read_config
from accent_plugin.errors import EncoderError


def make_encoder(source, save_path=None, from_bundle=None, **options):
    """Load an encoder with `accent_plugin.encoder.factory.make_encoder`, or from a trained classifier.

    Arguments
    ---------
    source, save_path, **options
        As there.
    from_bundle : str
        Folder of a bundle or a Hugging Face classifier from which the encoder is loaded; None for `source`. Another
        folder raises an EncoderError, and a damaged bundle a BundleError.
    """
    from accent_plugin.encoder import factory

    if from_bundle is None:
        return factory.make_encoder(source, save_path, **options)
    find_start(from_bundle)
    if not bundle_config.is_bundle(from_bundle):
        return factory.make_encoder(from_bundle, save_path, **options)
    folder = Path(from_bundle)
    config, path = bundle_config.read(folder), folder / bundle_config.WEIGHTS_FILE
    bundle_config.require_identity(path, config["weights"])
    return factory.build_from_description(config["model"]["encoder"], weights_file=path, **options)


def find_start(folder):
    """Check that a folder is a bundle or a Hugging Face classifier, without loading it.

    Anything else raises an EncoderError, and a damaged bundle a BundleError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EncoderError(f"there is no folder {folder}; give a bundle, or the folder of a Hugging Face classifier")
    if not bundle_config.is_bundle(folder):
        find_source(folder)
        found = read_config(folder).architectures or ["model without a class"]
        if not found[0].endswith("ForSequenceClassification"):
            raise EncoderError(f"{folder} holds a {found[0]}, which is not a classifier: pass it as wav2vec2_hub")
        return
    config = bundle_config.read(folder)
    if config["weights"]["file"] != bundle_config.WEIGHTS_FILE:
        raise EncoderError(f"{folder} was exported to {config['weights']['file']}, which cannot be trained")
    bundle_config.require_size(folder / bundle_config.WEIGHTS_FILE, config["weights"])


def start_identity(folder):
    """First twelve digits of the SHA-256 of a classifier's weights, as in reports."""
    if bundle_config.is_bundle(folder):
        return bundle_config.read(folder)["weights"]["sha256"][:12]
    from accent_plugin.exchange.hugging_face import checkpoint_identity

    return checkpoint_identity(Path(folder))["sha256"][:12]


def initialise_head(model, accents, folder):
    """Initialise the head of a model from a trained classifier, from which the encoder was already loaded.

    A part is taken if its tensors have the same names and shapes. Rows of the classifier are matched by label. Layer
    weights are only taken for the same layers, a whitening only for the same features, and a classifier only if both
    models use the same whitening or none. The temperature of a bundle is part of its classifier's weights.

    Arguments
    ---------
    model : AccentModel
        Changed in place.
    accents : sequence of str
        Its classes.
    folder : str or Path
        A bundle or a Hugging Face classifier; of the latter, only classes with unique labels are matched.

    Returns
    -------
    taken, new : list of str
        Parts initialised from the trained classifier, and parts that keep their own initialisation.
    """
    import torch

    from accent_plugin.exchange.hugging_face import LAYER_WEIGHTS

    source, known = _trained(folder)
    taken, new = [], []

    def take(part, prefix, allowed=True):
        own = {key: value for key, value in model.state_dict().items() if key.startswith(prefix)}
        other = {key: value for key, value in source.state_dict().items() if key.startswith(prefix)}
        if not own:
            return
        alike = {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in other.items()}
        (taken if allowed and alike else new).append(part)
        if allowed and alike:
            for key, value in own.items():
                value.copy_(other[key])

    with torch.no_grad():
        take("layer weights", LAYER_WEIGHTS, model.wav2vec2.weighted_layers == source.wav2vec2.weighted_layers)
        take("projector", "projector.")
        take("pooling", "pooling.")
        take("whitening", "whitening.", not new and _features(model) == _features(source))
        whitened_alike = "whitening" in taken or (model.whitening is None and source.whitening is None)
        rows = [accent for accent in accents if accent in known]
        if whitened_alike and rows and model.classifier.in_features == source.classifier.in_features:
            for row, accent in enumerate(accents):
                if accent in known:
                    model.classifier.weight[row] = source.classifier.weight[known[accent]]
                    model.classifier.bias[row] = source.classifier.bias[known[accent]]
            taken.append(f"classifier of {', '.join(rows)}")
            accents = [accent for accent in accents if accent not in known]
        if accents:
            new.append(f"classifier of {', '.join(accents)}")
    return taken, new


def _trained(folder):
    """The model of a bundle or a Hugging Face classifier, and label -> row of its classifier."""
    if bundle_config.is_bundle(folder):
        from accent_plugin.bundle.load import load_bundle

        found = load_bundle(folder)
        return found.model, {label: row for row, label in enumerate(found.config["labels"])}
    from accent_plugin.exchange.hugging_face import read_classifier

    checkpoint = read_classifier(folder)
    found = [labels.parse(name).label or name for name in checkpoint.names]
    return checkpoint.model, {label: row for row, label in enumerate(found) if found.count(label) == 1}


def _features(model):
    """Properties that must be equal for the pooled features of two models to be comparable."""
    encoder, projector = model.wav2vec2, model.projector
    shape = None if projector is None else len(projector)
    return len(encoder.layers), encoder.weighted_layers, encoder.standardise_layers, shape, type(model.pooling)
