"""Export a bundle to ONNX; `accent_plugin.exchange.onnx_classifier` runs the graph.

The graph takes padded waveforms and their lengths. It includes normalisation, masks and the head, so that a clip has
the same scores alone and in any batch. It is written in fp32 or in a lower precision:

* ``fp16``, ``bf16``: weights are stored in half the bytes and converted to fp32 on loading. ONNX Runtime computes in
  fp32, because it has no CPU kernels for these types.
* ``int8``: weights of linear layers are stored in a quarter of the bytes and multiplied in integers, with dynamic
  quantisation of the inputs. Convolutions stay in fp32.

A lower precision changes answers, so the model is compared with fp32 on labelled speech before it is kept.
"""

import contextlib
import copy
import json
import logging
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from packaging.version import Version
from torch import nn

from accent_plugin import files
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.bundle import config as bundle_config
from accent_plugin.bundle import model_card
from accent_plugin.bundle.load import load_bundle
from accent_plugin.data.naming import VALID
from accent_plugin.encoder.factory import FAMILIES
from accent_plugin.errors import BundleError, ExchangeError
from accent_plugin.evaluation.scores import confusion_matrix, unweighted_average_recall
from accent_plugin.exchange.onnx_classifier import (
    LENGTHS,
    LOG_PROBABILITIES,
    WAVES,
    OnnxAccentClassifier,
    import_onnxruntime,
)
from accent_plugin.inference.labelled import WHOLE_CLIPS, evaluate_model, read_labelled

logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
_LONGEST_SECONDS = 600
_TOLERANCE = 1e-4
_WORST_LOSS = 0.01
# Earlier exporters fix sizes that should stay free.
_TESTED_TORCH = "2.11"

# Smaller tensors are not worth converting.
_LEAST_VALUES = 1024

# Limit of protobuf, the format of the graph.
_LARGEST_GRAPH = (1 << 31) - 1


def export(folder, out, precision="fp32", data=None, unchecked=False, split=None):
    """Export a bundle to ONNX, compare the result with the bundle, and return the written folder.

    Arguments
    ---------
    folder : str or Path
        Folder of the bundle.
    out : str or Path
        Folder to write; replaced if it holds nothing but an earlier export.
    precision : str
        One of `PRECISIONS`.
    data : str or Path
        Labelled speech (see `accent_plugin.inference.labelled.read_labelled`). A lower precision is refused if its
        unweighted average recall on it is more than 0.01 lower.
    unchecked : bool
        Keep a lower precision even without data or with a larger loss.
    split : str
        Split of `data`; None uses its validation split.

    Raises
    ------
    ExchangeError
        If the model cannot be exported, or a lower precision is refused.
    BundleError
        If `out` holds something else, or ONNX Runtime and torch give different scores.
    """
    if precision not in PRECISIONS:
        raise ExchangeError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    if precision != "fp32" and data is None and not unchecked:
        raise ExchangeError(
            f"{precision} may give other answers than fp32: give --data, labelled speech to compare them on, or keep "
            "it with --unchecked"
        )
    out = Path(out).absolute()
    bundle_config.require_replaceable(out, bundle_config.ONNX_FILES)
    loaded = load_bundle(folder)
    family = loaded.config["model"]["encoder"]["family"]
    if not FAMILIES[family].onnx:
        exportable = ", ".join(name for name in FAMILIES if FAMILIES[name].onnx)
        raise ExchangeError(f"{family} cannot be exported to ONNX; supported are {exportable}")
    with files.atomic_folder(out, bundle_config.ONNX_FILES) as temporary:
        exact = temporary if precision == "fp32" else temporary / "fp32"
        exact.mkdir(exist_ok=True)
        _write(exact, loaded, "fp32", trace(loaded.model), folder)
        _require_same_scores(exact, loaded)
        if exact != temporary:
            graph = lower_precision(exact / bundle_config.ONNX_FILE, precision)
            _write(temporary, loaded, precision, graph, folder)
            if data is not None:
                _keep_comparison(temporary, compare(exact, temporary, data, split), unchecked)
            shutil.rmtree(exact)
    return out


class _Graph(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, waves, lengths):
        return self.model(waves, lengths.double() / waves.shape[1])


def trace(model):
    """Export an `AccentModel` as a graph (onnx.ModelProto) for any number of clips of any length.

    Missing packages, and a model that the exporter cannot follow, are ExchangeErrors.
    """
    _require_packages()
    model = copy.deepcopy(model).cpu().float().eval()
    model.requires_grad_(False)
    least = model.wav2vec2.minimum_samples
    clips = torch.export.Dim("clips")
    samples = torch.export.Dim("samples", min=least, max=_LONGEST_SECONDS * SAMPLE_RATE)
    # Long enough for many frames: the exporter fixes dimensions that are 1 in the example.
    length = max(SAMPLE_RATE, 4 * least)
    example = torch.zeros(2, length), torch.tensor([length, 3 * length // 4])
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                _Graph(model).eval(),
                example,
                input_names=[WAVES, LENGTHS],
                output_names=[LOG_PROBABILITIES],
                dynamic_shapes=({0: clips, 1: samples}, {0: clips}),
                dynamo=True,
                verbose=False,
            )
        except Exception as error:
            # The exporter wraps any exception of torch, ONNX or the model.
            reason = str(error).splitlines()[0].split("\x1b")[0].strip()
            message = f"torch {torch.__version__} cannot export this model to ONNX: {reason}"
            if Version(torch.__version__) < Version(_TESTED_TORCH):
                message += f"\nexport is tested with torch {_TESTED_TORCH}, and fails with 2.6 and 2.8: upgrade torch"
            raise ExchangeError(message) from error
    return _without_origins(program.model_proto)


def _without_origins(graph):
    """Remove the source locations of nodes, which contain paths of this machine."""
    for part in (graph, graph.graph, *graph.graph.node, *graph.graph.value_info, *graph.functions):
        del part.metadata_props[:]
        part.doc_string = ""
    return graph


def lower_precision(path, precision):
    """Convert the weights of the graph in ``path`` to "fp16", "bf16" or "int8"; return an onnx.ModelProto."""
    import onnx

    if precision == "int8":
        return _in_int8(path)
    graph = onnx.load(path)
    kind = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    casts = []
    for tensor in graph.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) < _LEAST_VALUES:
            continue
        values = onnx.numpy_helper.to_array(tensor).astype(onnx.helper.tensor_dtype_to_np_dtype(kind))
        name = f"{tensor.name}_{precision}"
        casts.append(onnx.helper.make_node("Cast", [name], [tensor.name], to=onnx.TensorProto.FLOAT))
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    nodes = [*casts, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    return graph


def _in_int8(path):
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = path.with_name("quantised.onnx")
    try:
        with _quiet():
            quantize_dynamic(path, target, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8)
        return onnx.load(target)
    finally:
        target.unlink(missing_ok=True)


@dataclass(frozen=True)
class Comparison:
    """Effect of a lower precision: unweighted average recalls by clip, and the fraction of clips with equal answers."""

    data: str
    clips: int
    exact: float
    smaller: float
    same_label: float

    @property
    def loss(self):
        """Decrease of the unweighted average recall."""
        return self.exact - self.smaller


def compare(exact, smaller, data, split=None):
    """Compare two exports on labelled speech; return a `Comparison`.

    Arguments
    ---------
    exact, smaller : str or Path
        Folders of the exports in fp32 and in a lower precision.
    data : str or Path
        Labelled speech.
    split : str
        None for validation.
    """
    found = []
    for folder in (exact, smaller):
        classifier = OnnxAccentClassifier.from_bundle(folder, **WHOLE_CLIPS)
        clips = read_labelled(data, classifier.labels, split=split, preferred=VALID)
        found.append(evaluate_model(classifier, clips.rows, progress=False)[0])
    labels = [each.log_probabilities.argmax(axis=1) for each in found]
    confusions = [
        confusion_matrix(each.truth, predicted, len(each.labels)) for each, predicted in zip(found, labels, strict=True)
    ]
    recalls = [float(unweighted_average_recall(confusion)) for confusion in confusions]
    name = f"{Path(data).name} ({', '.join(clips.splits)})" if clips.splits else Path(data).name
    return Comparison(name, len(labels[0]), *recalls, float(np.mean(labels[0] == labels[1])))


def _keep_comparison(folder, found, unchecked):
    """Write a comparison into the folder's config.json, or raise if the loss is too large."""
    summary = (
        f"unweighted average recall {found.smaller:.3f} instead of {found.exact:.3f} on {found.clips} clips of "
        f"{found.data}, the same answer on {found.same_label:.1%}"
    )
    if found.loss > _WORST_LOSS and not unchecked:
        raise ExchangeError(f"refused: {summary}; a loss of more than {_WORST_LOSS} needs --unchecked")
    logger.info("%s", summary)
    path = folder / bundle_config.CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    config["onnx"]["compared"] = {
        "data": found.data,
        "clips": found.clips,
        "unweighted_average_recall": {"fp32": found.exact, config["onnx"]["precision"]: found.smaller},
        "same_label": found.same_label,
    }
    path.write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")


def _write(folder, loaded, precision, graph, source):
    path = folder / bundle_config.ONNX_FILE
    if graph.ByteSize() > _LARGEST_GRAPH:
        raise ExchangeError(
            f"the graph has {graph.ByteSize():,} bytes, but an ONNX file can hold at most {_LARGEST_GRAPH:,}"
        )
    path.write_bytes(graph.SerializeToString())
    config = loaded.config | {
        "weights": bundle_config.weights_identity(path),
        "onnx": {
            "precision": precision,
            "minimum_samples": loaded.model.wav2vec2.minimum_samples,
            "made_of": loaded.config["weights"]["sha256"],
        },
    }
    (folder / bundle_config.CONFIG_FILE).write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
    card = Path(source) / model_card.CARD_FILE
    if card.is_file():
        text = model_card.for_onnx(card.read_text(encoding="utf-8"))
        (folder / model_card.CARD_FILE).write_text(text, encoding="utf-8")


def _require_same_scores(folder, loaded):
    """Raise if an export and torch give different scores for a batch of noise of several lengths."""
    noise = np.random.default_rng(0).standard_normal(3 * SAMPLE_RATE).astype(np.float32) / 10
    waves = [noise, noise[: 2 * SAMPLE_RATE], noise[:100]]
    wavs = nn.utils.rnn.pad_sequence([torch.from_numpy(wave) for wave in waves], batch_first=True)
    lens = torch.tensor([len(wave) / len(noise) for wave in waves], dtype=torch.double)
    with torch.inference_mode():
        embeddings = loaded.modules["embedding_model"](wavs, lens)
        expected = loaded.modules["classifier"](embeddings).squeeze(1).numpy()
    found = OnnxAccentClassifier.from_bundle(folder)._log_probabilities(waves)
    difference = np.abs(found - expected).max()
    # Not "difference > tolerance", which would accept NaN.
    if not difference <= _TOLERANCE:
        raise BundleError(
            f"ONNX Runtime and torch give different scores (by {difference:.1e}): please report this as a bug"
        )


def _require_packages():
    try:
        # First, before another package imports ONNX Runtime with its telemetry.
        import_onnxruntime()
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExchangeError(f"{error.name} is not installed: pip install 'accent_plugin[onnx]'") from None


@contextlib.contextmanager
def _quiet():
    """Suppress the exporters' warnings and log messages."""
    # ONNX Runtime's quantisation logs through the root logger, which adds a handler to it.
    handlers = logging.root.handlers[:]
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        logging.root.handlers[:] = handlers
