"""A trained classifier as one folder that travels: no paths, no code, no base checkpoint.

::

    config.json        the source of truth: labels, architecture, calibration, size and digest of the weights
    model.ckpt         the weights, as safetensors under the name that SpeechBrain's Pretrainer looks for
    hyperparams.yaml   generated from config.json, for SpeechBrain's `EncoderClassifier.from_hparams`
    README.md          the model card

`load` reads config.json and the weights, runs no YAML and unpickles nothing, and refuses what is not whole: so a bundle
of unknown origin is safe to open with it. `from_hparams` runs hyperparams.yaml, as SpeechBrain does with every model.
"""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.utils.checkpoints import mark_as_transfer, register_checkpoint_hooks
from torch import nn

import accent_plugin
from accent_plugin import audio, bundle_config, disk
from accent_plugin.augment import change_speed
from accent_plugin.bundle_config import CONFIG_FILE, FORMAT_VERSION, WEIGHTS_FILE, YAML_FILE
from accent_plugin.encoder import build_encoder
from accent_plugin.errors import AccentPluginError, BundleError
from accent_plugin.model import AccentModel

_TOLERANCE = 1e-4
# As safetensors calls them; a model has no others.
_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}


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


@register_checkpoint_hooks
class BundledModel(AccentModel):
    """An `AccentModel` whose weights come from a bundle, all of them and no others."""

    @mark_as_transfer
    def load_weights(self, path):
        """Take the weights of a safetensors file, whatever its name; SpeechBrain's Pretrainer calls it."""
        _require_tensors(path, _tensors(path), self)
        with torch.no_grad():
            for key, value in self.state_dict().items():
                # Opened for each tensor, since what is mapped stays in memory: never all of them twice.
                with safe_open(path, framework="pt") as file:
                    value.copy_(file.get_tensor(key))
                if not torch.isfinite(value).all():
                    raise BundleError(f"{path} has NaN or infinity in {key}: no answer can come of it")


class AsIs(nn.Module):
    """Gives back its first argument: the model computes features and normalises them, and embeddings, by itself."""

    def forward(self, features, lengths=None):
        """Give back the features."""
        return features


class Embedding(nn.Module):
    """Waveforms -> one vector for each clip and each speed it is played at.

    Arguments
    ---------
    model : AccentModel
    speeds : sequence of float
        1 is the clip as it is.
    """

    def __init__(self, model, speeds=(1.0,)):
        super().__init__()
        self.model, self.speeds = model, tuple(speeds)

    def forward(self, wavs, wav_lens=None):
        """Embed (batch, samples) at 16 kHz; returns (batch, speeds, features)."""
        return torch.stack([self.model.embed(*_played(wavs, wav_lens, speed)) for speed in self.speeds], dim=1)


class Head(nn.Module):
    """Vectors of a clip's copies -> log-probabilities, averaged over the copies and normalised anew.

    Arguments
    ---------
    model : AccentModel
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, embeddings):
        """Classify (batch, speeds, features); returns (batch, 1, classes) log-probabilities in float32."""
        # In float32 whatever the encoder runs in: it costs nothing, and probabilities are made of it.
        with torch.autocast(embeddings.device.type, enabled=False):
            copies = torch.log_softmax(self.model.classifier(embeddings.float()), dim=-1)
        return torch.log_softmax(copies.mean(dim=1, keepdim=True), dim=-1)


class Normalizer:
    """Any waveform -> mono at 16 kHz, resampled as in training; in place of SpeechBrain's `AudioNormalizer`."""

    def __call__(self, wav, sample_rate):
        """Convert (samples,) or (samples, channels) torch.Tensor; returns (samples,)."""
        mono = wav if wav.dim() == 1 else wav.mean(dim=1)
        return torch.from_numpy(audio.resample(mono.float().cpu().numpy(), sample_rate)).to(wav.device)


def write(
    folder,
    model,
    labels,
    *,
    encoder_name,
    pooling,
    speeds=(1.0,),
    calibration=None,
    metrics=None,
    versions=None,
    imported_from=None,
):
    """Write a bundle, load it back, and compare.

    Arguments
    ---------
    folder : str or Path
        Replaced when it holds a bundle already, and nothing else.
    model : AccentModel
        Trained.
    labels : sequence of str
        In the order of the output.
    encoder_name : str
        What the encoder was pretrained as, for the card.
    pooling : str
        A name in `accent_plugin.pooling.POOLINGS`.
    speeds : sequence of float
        Copies of a clip to average over.
    calibration : dict
        As `accent_plugin.calibration.describe` gives it; its temperature is folded into the classifier.
    metrics : dict
        The content of the run's metrics.json, for the card.
    versions : dict
        Package -> version.
    imported_from : str
        Name of the checkpoint that these weights are; None where this package trained them.

    Returns
    -------
    Path

    Raises
    ------
    BundleError
        When the folder holds something else, a weight is NaN or infinite, or what was written gives other scores.
    """
    # Imported here, since it draws in what makes reports, which loading needs not.
    from accent_plugin import model_card

    folder = Path(folder).absolute()
    bundle_config.require_replaceable(folder, bundle_config.BUNDLE_FILES)
    model = copy.deepcopy(model).cpu().float().eval()
    model.wav2vec2.merge_adapters()
    temperature = calibration["temperature"] if calibration else 1.0
    with torch.no_grad():
        model.classifier.weight /= temperature
        model.classifier.bias /= temperature
    with disk.replacing_folder(folder, bundle_config.BUNDLE_FILES) as temporary:
        try:
            save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary / WEIGHTS_FILE)
        except SafetensorError as error:
            # As what a full disk is told by everybody else.
            raise BundleError(f"{folder} cannot be written: {error}\nmake room there and run it again") from error
        config = describe(
            model,
            labels,
            encoder_name=encoder_name,
            pooling=pooling,
            weights=bundle_config.identity(temporary / WEIGHTS_FILE),
            speeds=speeds,
            calibration=calibration,
            versions=versions,
            imported_from=imported_from,
        )
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
        # safetensors lets nobody else read what it writes, whatever the umask says.
        shutil.copymode(temporary / CONFIG_FILE, temporary / WEIGHTS_FILE)
        (temporary / YAML_FILE).write_text(_yaml(config), encoding="utf-8")
        model_card.write(temporary, config, metrics)
        _compare(model, load(temporary), config["model"]["speeds"])
    return folder


def describe(
    model,
    labels,
    *,
    encoder_name,
    pooling,
    weights,
    speeds=(1.0,),
    calibration=None,
    versions=None,
    imported_from=None,
):
    """Make the content of config.json; arguments as for `write`, ``weights`` as `bundle_config.identity` gives it."""
    return {
        "format_version": FORMAT_VERSION,
        "made_by": f"accent_plugin {accent_plugin.__version__}",
        "labels": list(labels),
        "sample_rate": audio.SAMPLE_RATE,
        "model": {
            "encoder": {"name": encoder_name, **model.wav2vec2.describe()},
            "pooling": pooling,
            "projector_size": None if model.projector is None else model.projector[0].out_features,
            "projector_activation": model.projector is not None and len(model.projector) > 1,
            "whitening": model.whitening is not None,
            "speeds": [float(speed) for speed in speeds],
        },
        "calibration": calibration,
        "weights": weights,
        "versions": versions or {},
        **({"imported_from": imported_from} if imported_from else {}),
    }


def load(folder):
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
        raise BundleError(f"{folder} was exported to ONNX: accent_plugin.onnx.OnnxAccentClassifier loads it")
    bundle_config.require_size(weights, config)
    # On this device tensors have shapes and no memory, so that a configuration of any size can be compared first.
    with torch.device("meta"):
        expected = _build(config, folder / CONFIG_FILE)
    _require_tensors(weights, _tensors(weights), expected)
    bundle_config.require_identity(weights, config)
    model = _build(config, folder / CONFIG_FILE)
    model.load_weights(weights)
    return ready(model.eval(), config)


def check(folder):
    """Refuse a folder that is no whole bundle; see `load`."""
    load(folder)


def build(config):
    """Build the model that a bundle's hyperparams.yaml asks for, to be filled by SpeechBrain's Pretrainer.

    Arguments
    ---------
    config : str
        The content of config.json.
    """
    config = json.loads(config)
    return _build(config, YAML_FILE)


def make_label_encoder(config):
    """SpeechBrain's label encoder with the labels of a bundle, in their order; ``config`` as in `build`."""
    labels = json.loads(config)["labels"]
    encoder = CategoricalEncoder()
    encoder.update_from_iterable(labels, sequence_input=False)
    encoder.expect_len(len(labels))
    return encoder


def ready(model, config):
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


def _build(config, where):
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


def _played(wavs, wav_lens, speed):
    """A batch at another speed: each clip by itself, so that padding has no influence."""
    if speed == 1:
        return wavs, wav_lens
    lens = torch.ones(len(wavs)) if wav_lens is None else wav_lens
    counts = torch.round(lens.cpu().double() * wavs.shape[1]).long().tolist()
    clips = [
        torch.from_numpy(change_speed(wav[:count].float().cpu().numpy(), speed))
        for wav, count in zip(wavs, counts, strict=True)
    ]
    padded = nn.utils.rnn.pad_sequence(clips, batch_first=True).to(wavs.device)
    lengths = torch.tensor([len(clip) for clip in clips], dtype=torch.double) / padded.shape[1]
    # Apple's GPUs have no float64.
    return padded, (lengths.float() if wavs.device.type == "mps" else lengths).to(wavs.device)


def _compare(model, bundle, speeds):
    """Both must give the same scores, on noise: the very weights are compared, not what they are good for."""
    noise = 0.1 * torch.randn(2, 2 * audio.SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([0.6, 1.0])
    with torch.inference_mode():
        before = Head(model)(Embedding(model, speeds)(noise, lengths))
        after = bundle.modules["classifier"](bundle.modules["embedding_model"](noise, lengths))
    difference = (before - after).abs().max().item()
    # Not "difference > tolerance": that would let NaN pass.
    if not difference <= _TOLERANCE:
        raise BundleError(
            f"the bundle gives other scores than the model it was made of (by {difference:.1e}): report it"
        )


def _tensors(path):
    """Name of each tensor in a file -> its type, as safetensors calls it, and shape."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} is not in the safetensors format: {error}") from None


def _require_tensors(path, found, model):
    expected = {key: (_DTYPES[value.dtype], tuple(value.shape)) for key, value in model.state_dict().items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise BundleError(f"{path} lacks {len(missing)} tensors of the model, {missing[0]} for one")
    if extra := sorted(found.keys() - expected.keys()):
        raise BundleError(f"{path} has {len(extra)} tensors that the model has not, {extra[0]!r} for one")
    for key, (dtype, shape) in expected.items():
        if found[key][1] != shape:
            raise BundleError(f"{path} has {key} of shape {found[key][1]}, {CONFIG_FILE} describes {shape}")
        if found[key][0] != dtype:
            raise BundleError(f"{path} has {key} as {found[key][0]}, not as {dtype}")


def _yaml(config):
    """SpeechBrain's file of the bundle; the configuration goes in as one quoted text, which no YAML dialect changes."""
    # Escaped as ASCII, and with nothing that HyperPyYAML takes for a reference.
    text = json.dumps(config).replace("<", "\\u003c").replace(">", "\\u003e").replace("'", "\\u0027")
    return f"""\
# Made from config.json by {config["made_by"]}; not to be edited. SpeechBrain runs this file when it loads the model, so
# load only models that you trust. accent_plugin.inference.AccentClassifier.from_bundle does not read it.

bundle_config: '{text}'
sample_rate: {config["sample_rate"]}

model: !apply:accent_plugin.bundle.build
    config: !ref <bundle_config>

label_encoder: !apply:accent_plugin.bundle.make_label_encoder
    config: !ref <bundle_config>

audio_normalizer: !new:accent_plugin.bundle.Normalizer

mean_var_norm_emb: !new:accent_plugin.bundle.AsIs

modules:
    compute_features: !new:accent_plugin.bundle.AsIs
    mean_var_norm: !new:accent_plugin.bundle.AsIs
    embedding_model: !new:accent_plugin.bundle.Embedding
        model: !ref <model>
        speeds: {json.dumps(config["model"]["speeds"])}
    classifier: !new:accent_plugin.bundle.Head
        model: !ref <model>

pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        model: !ref <model>
"""
