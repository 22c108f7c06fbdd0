"""Write a bundle, and check that it gives the same scores as the original model."""

import copy
import json
import logging
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import accent_plugin
from accent_plugin import files
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.bundle import config as bundle_config
from accent_plugin.bundle.config import (
    CONFIG_FILE,
    EMBEDDINGS,
    FORMAT_VERSION,
    GRAPH_FILE,
    LENGTHS,
    LOG_PROBABILITIES,
    WAVES,
    WEIGHTS_FILE,
    YAML_FILE,
)
from accent_plugin.bundle.graph import make_graph
from accent_plugin.bundle.load import load_bundle
from accent_plugin.bundle.modules import Embedding, Head
from accent_plugin.bundle.session import open_graph, read_offsets
from accent_plugin.errors import AccentPluginError, BundleError

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-4


def write_bundle(
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
    """Write a bundle, load it with torch and with ONNX Runtime, and compare the scores with the model's.

    If ONNX Runtime cannot run the model, this is logged, and the bundle has no graph.

    Arguments
    ---------
    folder : str or Path
        Replaced if it contains only a bundle.
    model : AccentModel
        Trained.
    labels : sequence of str
        The labels, in the order of the output.
    encoder_name : str
        Name of the pretrained encoder, for the card.
    pooling : str
        A name in `accent_plugin.pooling.POOLINGS`.
    speeds : sequence of float
        Speed factors of the copies of a clip to average over.
    calibration : dict
        From `accent_plugin.evaluation.calibration.describe_calibration`. Its temperature is folded into the classifier.
    metrics : dict
        The content of the run's metrics.json, for the card.
    versions : dict
        Package -> version.
    imported_from : str
        Name of the imported checkpoint; None if this package trained the weights.

    Returns
    -------
    Path

    Raises
    ------
    BundleError
        If the folder contains other files, a weight is NaN or infinite, or the scores of the written bundle differ.
    """
    # Imported here, because it imports the report code, which loading a bundle does not need.
    from accent_plugin.bundle import model_card

    folder = Path(folder).absolute()
    bundle_config.require_replaceable(folder, bundle_config.BUNDLE_FILES)
    model = copy.deepcopy(model).cpu().float().eval()
    model.wav2vec2.merge_adapters()
    temperature = calibration["temperature"] if calibration else 1.0
    with torch.no_grad():
        model.classifier.weight /= temperature
        model.classifier.bias /= temperature
    with files.atomic_folder(folder, bundle_config.BUNDLE_FILES) as temporary:
        try:
            save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary / WEIGHTS_FILE)
        except SafetensorError as error:
            # Report a full disk like the other writers.
            raise BundleError(f"{folder} cannot be written: {error}\nfree some space there and run it again") from error
        config = make_config(
            model,
            labels,
            encoder_name=encoder_name,
            pooling=pooling,
            weights=bundle_config.weights_identity(temporary / WEIGHTS_FILE),
            speeds=speeds,
            calibration=calibration,
            versions=versions,
            imported_from=imported_from,
        )
        if graph := _write_graph(temporary, model):
            config["graph"] = graph
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
        # safetensors ignores the umask and makes its file readable only by the owner.
        shutil.copymode(temporary / CONFIG_FILE, temporary / WEIGHTS_FILE)
        (temporary / YAML_FILE).write_text(_yaml(config), encoding="utf-8")
        model_card.write(temporary, config, metrics)
        _compare(model, load_bundle(temporary), config["model"]["speeds"])
    return folder


def make_config(
    model, labels, *, encoder_name, pooling, weights, speeds=(1.0,), calibration=None, versions=None, imported_from=None
):
    """Make the content of config.json; arguments as for `write_bundle`, ``weights`` from `weights_identity`."""
    return {
        "format_version": FORMAT_VERSION,
        "made_by": f"accent_plugin {accent_plugin.__version__}",
        "labels": list(labels),
        "sample_rate": SAMPLE_RATE,
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


def _write_graph(folder, model):
    """Write the graph beside the weights and return its entry in config.json; None if ONNX Runtime cannot run it."""
    path = folder / GRAPH_FILE
    try:
        path.write_bytes(make_graph(model, read_offsets(folder / WEIGHTS_FILE)).SerializeToString())
        require_same_scores(path, model)
    except Exception as error:
        # Without a graph, the bundle is complete too, and nothing here may cost a training run its bundle.
        path.unlink(missing_ok=True)
        problem = str(error) if isinstance(error, AccentPluginError) else f"{type(error).__name__}: {error}"
        logger.warning("the bundle has no %s, so it needs torch and starts slowly: %s", GRAPH_FILE, problem)
        return None
    identity = bundle_config.weights_identity(path)
    return {"bytes": identity["bytes"], "sha256": identity["sha256"], **describe_limits(model)}


def describe_limits(model):
    """Return the limits of a clip in samples, as stored in config.json beside a graph."""
    encoder = model.wav2vec2
    return {"minimum_samples": encoder.minimum_samples, "maximum_samples": encoder.maximum_samples}


def require_same_scores(path, model):
    """Raise a `BundleError` unless ONNX Runtime gives a model's scores and embeddings on noise of several lengths."""
    noise = 0.1 * torch.randn(3, 2 * SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([2 * SAMPLE_RATE, SAMPLE_RATE, max(100, model.wav2vec2.minimum_samples)])
    # ONNX Runtime runs first: it is the one that may refuse.
    inputs = {WAVES: noise.numpy(), LENGTHS: lengths.numpy()}
    found = open_graph(path).run([LOG_PROBABILITIES, EMBEDDINGS], inputs)
    with torch.inference_mode():
        embeddings = model.embed(noise, lengths.double() / noise.shape[1])
        expected = torch.log_softmax(model.classifier(embeddings), dim=-1)
    for ours, theirs in zip(found, (expected, embeddings), strict=True):
        difference = (torch.from_numpy(ours) - theirs).abs().max().item()
        # Rounding grows with the numbers. Not "difference > tolerance", which would accept NaN.
        if not difference <= _TOLERANCE * max(1.0, theirs.abs().max().item()):
            raise BundleError(
                f"ONNX Runtime and torch give different scores (by {difference:.1e}): please report this as a bug"
            )


def _compare(model, bundle, speeds):
    """Raise an error unless model and bundle give the same scores on noise."""
    noise = 0.1 * torch.randn(2, 2 * SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([0.6, 1.0])
    with torch.inference_mode():
        before = Head(model)(Embedding(model, speeds)(noise, lengths))
        after = bundle.modules["classifier"](bundle.modules["embedding_model"](noise, lengths))
    difference = (before - after).abs().max().item()
    # Not "difference > tolerance", which would accept NaN.
    if not difference <= _TOLERANCE:
        raise BundleError(
            f"the scores of the written bundle differ from the model's by {difference:.1e}: please report this"
        )


def _yaml(config):
    """Make SpeechBrain's YAML of the bundle; it contains the configuration as one quoted text for any YAML dialect."""
    # Escaped as ASCII, without characters that HyperPyYAML reads as a reference.
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
