"""Convert a bundle to a Hugging Face transformers classifier, and back.

transformers has one architecture of audio classifiers for the wav2vec 2.0 family: encoder (last state, or a weighted
sum of all), linear projector, mean over frames, linear layer. Other parts of a bundle are folded into these if that is
exact (whitening, a sum over some layers, no projector); otherwise the conversion is refused. In both directions the two
models are compared on noise before the result is used: log-probabilities of single clips must agree to 1e-5.

Weights are read from a checkpoint's .safetensors, or else from its .bin files with torch's weights_only loader: no code
of a checkpoint is executed. All weights must be present.
"""

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import yaml
from transformers import AutoFeatureExtractor, Wav2Vec2FeatureExtractor

import accent_plugin
from accent_plugin import files
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.bundle import config as bundle_config
from accent_plugin.bundle.load import load_bundle, make_bundle
from accent_plugin.bundle.modules import Embedding, Head
from accent_plugin.bundle.write import make_config, write_bundle
from accent_plugin.data import labels
from accent_plugin.encoder.base import PREFIX
from accent_plugin.encoder.factory import FAMILIES, build_encoder
from accent_plugin.encoder.sources import (
    NOT_ARCHITECTURE,
    WEIGHTS_FILES,
    local_folder,
    quiet_transformers,
    read_config,
    require_finite,
    weights_files,
)
from accent_plugin.errors import EncoderError, ExchangeError
from accent_plugin.model import AccentModel

logger = logging.getLogger(__name__)

LAYER_WEIGHTS = "wav2vec2.layer_weights"

# Name in an AccentModel -> name in a transformers classifier, for all tensors outside the encoder.
_HEAD = {
    LAYER_WEIGHTS: "layer_weights",
    "projector.0.weight": "projector.weight",
    "projector.0.bias": "projector.bias",
    "classifier.weight": "classifier.weight",
    "classifier.bias": "classifier.bias",
}

# Keys of a classifier's configuration that do not concern its encoder.
_NOT_ENCODER = {
    *NOT_ARCHITECTURE,
    *("id2label", "label2id", "problem_type", "classifier_proj_size", "use_weighted_layer_sum"),
}


# All files of a folder written for transformers.
_FILES = (bundle_config.CONFIG_FILE, "preprocessor_config.json", WEIGHTS_FILES[0], bundle_config.CARD_FILE)

# A softmax gives this exactly 0 if any other number is 0 or more.
_NEVER = -1e4

_TOLERANCE = 1e-5


# ---------------------------------------------------------------------------------------------- from Hugging Face


def from_hugging_face(source, mapping=None):
    """Convert a transformers classifier to a bundle in memory.

    Arguments
    ---------
    source : str or Path
        Folder of a checkpoint (config.json, preprocessor_config.json, weights), or its name on the Hub.
    mapping : dict
        Name of a class in the checkpoint -> label, from `accent_plugin.data.labels.read_mapping`; not needed for known
        accent names.

    Returns
    -------
    accent_plugin.bundle.load.Bundle
        Without calibration; "weights" in its configuration has name, size and SHA-256 of the checkpoint's file.

    Raises
    ------
    EncoderError
        If there is no such checkpoint, or the Hub cannot be reached.
    ExchangeError
        If it is not such a classifier, has missing or unexpected weights, or has classes without distinct labels.
    """
    checkpoint = read_classifier(source)
    found = _labels(source, checkpoint.names, mapping or {})
    name = _short_name(source)
    config = make_config(
        checkpoint.model,
        found,
        encoder_name=name,
        pooling="mean",
        weights=checkpoint_identity(checkpoint.folder),
        imported_from=name,
    )
    return make_bundle(checkpoint.model, config)


def import_hugging_face(source, out, mapping=None):
    """Convert a transformers classifier to a bundle in the folder `out`, and return the folder.

    Arguments and errors as for `from_hugging_face`; `out` is replaced if it holds a bundle.
    """
    found = from_hugging_face(source, mapping)
    name = found.config["imported_from"]
    return write_bundle(out, found.model, found.config["labels"], encoder_name=name, pooling="mean", imported_from=name)


@dataclass(frozen=True)
class _Checkpoint:
    """A transformers classifier as an `AccentModel`, and the names of its classes in order."""

    folder: Path
    model: AccentModel
    names: list


def read_classifier(source):
    """Load a transformers classifier as an `AccentModel`."""
    folder = local_folder(source)
    config = read_config(folder)
    if problems := list(_misfits(config)):
        raise ExchangeError(f"{source} is not a classifier that can be imported:\n" + _lines(problems))
    extractor = _read_extractor(folder)
    classifier = _load_classifier(folder, config)
    try:
        model = _accent_model(classifier, extractor)
    except EncoderError as error:
        raise ExchangeError(f"{source} cannot be imported: {error}") from error
    _compare(model, classifier, extractor)
    return _Checkpoint(folder, model, [str(config.id2label[row]) for row in range(config.num_labels)])


def _classifier_class(family):
    """transformers' audio classifier for a family; looked up late, as each class loads a module of its own."""
    return getattr(transformers, FAMILIES[family].hf_classifier)


def _misfits(config):
    known = [family.hf_classifier for family in FAMILIES.values() if family.hf_classifier]
    wanted = FAMILIES[config.model_type].hf_classifier if config.model_type in FAMILIES else None
    if wanted is None or wanted not in (config.architectures or []):
        found = ", ".join(config.architectures or []) or f"a {config.model_type} without a class"
        yield f"it is {found}; supported are {', '.join(known)}"
    if config.problem_type in ("regression", "multi_label_classification") or config.num_labels < 2:
        yield f"it is not a single-label classifier ({config.problem_type or 'one class'})"
    if sorted(config.id2label) != list(range(config.num_labels)):
        yield f"id2label numbers its classes {sorted(config.id2label)}, not from 0 on"
    if getattr(config, "conv_pos_batch_norm", False):
        yield "its positional convolution has batch normalisation, which is not supported"


def _read_extractor(folder):
    """Read the checkpoint's preprocessing, reduced to the settings that are used."""
    try:
        found = AutoFeatureExtractor.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = str(error).splitlines()[0]
        raise ExchangeError(f"preprocessor_config.json in {folder} cannot be read: {problem}") from error
    if not isinstance(found, Wav2Vec2FeatureExtractor) or (found.sampling_rate, found.feature_size) != (SAMPLE_RATE, 1):
        raise ExchangeError(
            f"preprocessor_config.json in {folder} describes a {type(found).__name__} at {found.sampling_rate} Hz with "
            f"{found.feature_size} feature(s); supported is a Wav2Vec2FeatureExtractor at {SAMPLE_RATE} Hz with 1"
        )
    return _extractor(found.do_normalize, found.return_attention_mask)


def _extractor(do_normalize, return_attention_mask):
    return Wav2Vec2FeatureExtractor(
        feature_size=1,
        sampling_rate=SAMPLE_RATE,
        padding_value=0.0,
        do_normalize=bool(do_normalize),
        return_attention_mask=bool(return_attention_mask),
    )


def _load_classifier(folder, config):
    """Load all weights of a checkpoint; raise for missing and unexpected ones, which transformers itself tolerates."""
    if (folder / "adapter_config.json").is_file():
        raise ExchangeError(f"{folder} holds PEFT adapters beside the model: merge them (merge_and_unload) and save it")
    try:
        with quiet_transformers():
            classifier, info = _classifier_class(config.model_type).from_pretrained(
                str(folder), config=config, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
    except Exception as error:
        # transformers raises OSError, ValueError, RuntimeError, UnpicklingError and others for the same problem.
        problem = next(iter(str(error).splitlines()), type(error).__name__)
        raise ExchangeError(f"the weights in {folder} cannot be loaded: {problem}") from error
    # SpecAugment's vector may be missing if it was never trained. It is not used here either.
    vector = f"{classifier.base_model_prefix}.masked_spec_embed"
    if missing := sorted(set(info["missing_keys"]) - {vector}):
        raise ExchangeError(
            f"the weights in {folder} lack {len(missing)} tensors of the classifier, such as {missing[0]}"
        )
    if extra := sorted(info["unexpected_keys"]):
        raise ExchangeError(f"the weights in {folder} have {len(extra)} unexpected tensors, such as {extra[0]}")
    if vector in info["missing_keys"]:
        # Zeros instead of random numbers, so that the same checkpoint gives the same bundle.
        torch.nn.init.zeros_(classifier.base_model.masked_spec_embed)
    require_finite(classifier.state_dict(), folder, ExchangeError)
    return classifier.eval()


def _accent_model(classifier, extractor):
    config = classifier.config
    # This version of transformers ignores the keys of other versions.
    known = type(config)().to_dict().keys() - _NOT_ENCODER
    layers = list(range(config.num_hidden_layers + 1)) if config.use_weighted_layer_sum else None
    description = {
        "family": config.model_type,
        "config": {key: value for key, value in config.to_dict().items() if key in known},
        "preprocessor": json.loads(extractor.to_json_string()),
        "weighted_layers": layers,
        "standardise_layers": False,
    }
    model = AccentModel(
        build_encoder(description),
        [None] * config.num_labels,
        pooling="mean",
        projector_size=config.classifier_proj_size,
    )
    theirs = classifier.state_dict()
    state = {PREFIX + key: value for key, value in classifier.base_model.state_dict().items()}
    model.load_state_dict(state | {ours: theirs[name] for ours, name in _HEAD.items() if name in theirs})
    return model.eval()


def _labels(source, names, mapping):
    """Map each name to a label; raise an error that shows the mapping to write if that fails."""
    mapping = {labels.normalise(name): label for name, label in mapping.items()}
    found = [mapping.get(labels.normalise(name)) or labels.parse(name, mapping).label for name in names]
    unknown = [name for name, label in zip(names, found, strict=True) if label is None]
    twice = sorted({label for label in found if label is not None and found.count(label) > 1})
    if not unknown and not twice:
        return found
    problems = [f"these are not known accents: {', '.join(unknown)}"] if unknown else []
    problems += [
        f"these would all be {label}: {', '.join(name for name, one in zip(names, found, strict=True) if one == label)}"
        for label in twice
    ]
    wanted = {name: label or "ACCENT" for name, label in zip(names, found, strict=True)}
    table = yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True).strip()
    raise ExchangeError(
        f"{source} has the classes {', '.join(names)}:\n{_lines(problems)}\n"
        f"map each class to an accent of its own in a file, and pass it with --labels map.yaml:\n"
        f"{_lines(table.splitlines())}"
    )


def checkpoint_identity(folder):
    """Name, size in bytes and SHA-256 of a checkpoint's weights; several files are combined."""
    first, *parts = weights_files(folder)
    files = parts or [first]
    if len(files) == 1:
        return bundle_config.weights_identity(files[0])
    parts = [bundle_config.weights_identity(file) for file in files]
    digest = hashlib.sha256("".join(part["sha256"] for part in parts).encode()).hexdigest()
    return {"file": first.name, "bytes": sum(part["bytes"] for part in parts), "sha256": digest}


def _short_name(source):
    # Only the folder's name: a bundle should not contain local paths.
    return Path(source).resolve().name if Path(source).is_dir() else str(source)


# ------------------------------------------------------------------------------------------------ to Hugging Face


def to_hugging_face(folder, out):
    """Convert a bundle to a transformers classifier, load it again, compare the two, and return the written folder.

    Arguments
    ---------
    folder : str or Path
        Folder of the bundle.
    out : str or Path
        Folder to write; replaced if it holds nothing but an earlier export.

    Raises
    ------
    BundleError
        If the bundle is damaged, or `out` holds something else.
    ExchangeError
        If transformers does not support the model, or the written model gives other scores.
    """
    found = load_bundle(folder)
    if problems := list(_obstacles(found.config["model"])):
        raise ExchangeError(
            f"{folder} cannot be converted for transformers:\n{_lines(problems)}\n"
            "train a model without these, or publish the bundle itself: accent-plugin push"
        )
    out = Path(out).absolute()
    bundle_config.require_replaceable(out, _FILES, _is_own)
    with files.atomic_folder(out, _FILES) as temporary:
        _write(temporary, found, Path(folder))
        _compare(found.model, _load_classifier(temporary, read_config(temporary)), _read_extractor(temporary))
    return out


def _obstacles(described):
    family = described["encoder"]["family"]
    if FAMILIES[family].hf_classifier is None:
        yield f"its encoder is of the family {family}, for which transformers has no audio classifier with these scores"
    if described["pooling"] != "mean":
        yield f"its pooling is {described['pooling']}; transformers supports mean"
    if described["projector_activation"]:
        yield "projector_activation is True; transformers has no activation between projector and pooling"
    if described["encoder"]["standardise_layers"]:
        yield "standardise_layers is True; transformers sums layers without normalisation"
    if described["speeds"] != [1.0]:
        yield f"test_speeds is {described['speeds']}; transformers classifies a clip at its original speed only"


def _is_own(folder):
    if not bundle_config.is_hugging_face(folder):
        return False
    config = json.loads((folder / bundle_config.CONFIG_FILE).read_text(encoding="utf-8"))
    return str(config.get("made_by")).startswith("accent_plugin ")


def _write(folder, found, source):
    # Imported late: it imports the report modules, which loading does not need.
    from accent_plugin.bundle import model_card

    model, encoder = found.model, found.model.wav2vec2
    with quiet_transformers():
        _classifier(model, found.config).save_pretrained(folder)
        # As Hugging Face recommends: encoders with group normalisation were trained without a mask.
        has_mask = getattr(encoder.config, "feat_extract_norm", "layer") == "layer"
        _extractor(encoder.normalize_wav, has_mask).save_pretrained(folder)
    # safetensors ignores the umask and makes its files readable for the owner only.
    shutil.copymode(folder / bundle_config.CONFIG_FILE, folder / WEIGHTS_FILES[0])
    card = source / model_card.CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else model_card.render(found.config)
    (folder / model_card.CARD_FILE).write_text(model_card.for_transformers(text), encoding="utf-8")


def _classifier(model, config):
    """Make the transformers classifier that gives the same scores as a model."""
    names, described = config["labels"], config["model"]["encoder"]
    head = _head(model)
    kind = _classifier_class(described["family"])
    values = described["config"] | {
        "id2label": dict(enumerate(names)),
        "label2id": {name: row for row, name in enumerate(names)},
        "classifier_proj_size": len(head["projector.weight"]),
        "use_weighted_layer_sum": "layer_weights" in head,
        "made_by": f"accent_plugin {accent_plugin.__version__}",
    }
    classifier = kind(kind.config_class(**values))
    encoder = model.wav2vec2.model.state_dict()
    prefix = classifier.base_model_prefix
    classifier.load_state_dict({f"{prefix}.{key}": value for key, value in encoder.items()} | head)
    return classifier.eval()


def _head(model):
    """Tensors of a classifier's head by their transformers names; folded in float64."""
    width = model.wav2vec2.width
    weight, bias = torch.eye(width).double(), torch.zeros(width).double()
    if model.projector is not None:
        weight, bias = (value.detach().double() for value in model.projector[0].parameters())
    rows = model.classifier.weight.detach().double()
    if model.whitening is not None:
        # Subtracting a vector commutes with the mean over frames, so the projector's bias can subtract it.
        bias = bias - model.whitening.mean.double()
        rows = rows @ model.whitening.transform.double().T
    head = {
        "projector.weight": weight,
        "projector.bias": bias,
        "classifier.weight": rows,
        "classifier.bias": model.classifier.bias.detach(),
    }
    if model.wav2vec2.weighted_layers is not None:
        head["layer_weights"] = _all_layer_weights(model.wav2vec2)
    return {name: value.float().contiguous() for name, value in head.items()}


def _all_layer_weights(encoder):
    """Weights of all encoder states before the softmax, which is 0 for states that are not in the sum."""
    found = torch.full((len(encoder.layers) + 1,), _NEVER, dtype=torch.double)
    chosen = torch.log_softmax(encoder.layer_weights.detach().double(), dim=0)
    layers = torch.tensor(encoder.weighted_layers)
    for layer in set(encoder.weighted_layers):
        found[layer] = torch.logsumexp(chosen[layers == layer], dim=0)
    return found


# ------------------------------------------------------------------------------------------------------------ both


def _cause_of_difference(encoder):
    """Name what releases of transformers differ in, or ask for a report."""
    last = len(encoder.layers) in (encoder.weighted_layers or ())
    if last and getattr(encoder.config, "do_stable_layer_norm", False):
        return (
            f"transformers {transformers.__version__} may normalise the last state before it sums the states, as 5.4 "
            f"does: upgrade transformers, or leave {len(encoder.layers)} out of weighted_layers"
        )
    return "please report this as a bug"


def _compare(ours, theirs, extractor):
    """Raise if the models give different scores for single clips of noise, each with its own preprocessing."""
    noise = 0.1 * torch.randn(2, 2 * SAMPLE_RATE, generator=torch.Generator().manual_seed(0)) + 0.01
    with torch.inference_mode():
        for wave in noise:
            inputs = extractor(wave.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
            expected = torch.log_softmax(theirs(**inputs).logits, dim=-1)
            found = Head(ours)(Embedding(ours)(wave[None])).squeeze(1)
            # Not "difference > tolerance", which would accept NaN. Relative, because scores may be far from 0.
            if not torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
                raise ExchangeError(
                    "transformers and this package give different scores with the same weights (by "
                    f"{(found - expected).abs().max().item():.1e}): {_cause_of_difference(ours.wav2vec2)}"
                )


def _lines(texts):
    return "\n".join(f"  {text}" for text in texts)
