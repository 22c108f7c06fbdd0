"""Export a bundle to ONNX; `accent_plugin.exchange.onnx_classifier` runs the graph.

The graph takes padded waveforms and their lengths. It includes normalisation, masks and the head, so that a clip has
the same scores alone and in any batch. It is written in fp32 or in a lower precision:

* ``fp16``, ``bf16``: weights are stored in half the bytes and converted to fp32 on loading. ONNX Runtime computes in
  fp32, because it has no CPU kernels for these types.
* ``int8``: weights of the linear layers below the classifier are stored in a quarter of the bytes, with a scale for
  each output feature, and multiplied in integers, with dynamic quantisation of the inputs. Convolutions stay in fp32.

A lower precision changes answers, so the model is compared with fp32 on labelled speech before it is kept.
"""

import contextlib
import json
import logging
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accent_plugin import files
from accent_plugin.bundle import config as bundle_config
from accent_plugin.bundle import model_card
from accent_plugin.bundle.graph import make_graph
from accent_plugin.bundle.load import load_bundle
from accent_plugin.bundle.session import import_onnxruntime
from accent_plugin.bundle.write import describe_limits, require_same_scores
from accent_plugin.data.naming import VALID
from accent_plugin.errors import ExchangeError
from accent_plugin.evaluation.scores import confusion_matrix, unweighted_average_recall
from accent_plugin.exchange.onnx_classifier import OnnxAccentClassifier
from accent_plugin.inference.labelled import WHOLE_CLIPS, evaluate_model, read_labelled

logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
_WORST_LOSS = 0.01

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
    exact_graph = make_graph(loaded.model)
    with files.atomic_folder(out, bundle_config.ONNX_FILES) as temporary:
        exact = temporary if precision == "fp32" else temporary / "fp32"
        exact.mkdir(exist_ok=True)
        _write(exact, loaded, "fp32", exact_graph, folder)
        require_same_scores(exact / bundle_config.ONNX_FILE, loaded.model)
        if exact != temporary:
            graph = lower_precision(exact / bundle_config.ONNX_FILE, precision)
            _write(temporary, loaded, precision, graph, folder)
            if data is not None:
                _keep_comparison(temporary, compare(exact, temporary, data, split), unchecked)
            shutil.rmtree(exact)
    return out


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

    # First, before its telemetry is imported with it.
    import_onnxruntime()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(path)
    exact = []
    for node in graph.graph.node:
        node.name = node.output[0]
        # Gemm is used for the weights of linear layers only; the quantisation replaces it by this MatMul.
        if node.op_type == "MatMul":
            exact.append(node.name)
        elif "classifier.weight" in node.input:
            exact.append(f"{node.name}_MatMul")
    target = path.with_name("quantised.onnx")
    try:
        with _quiet():
            quantize_dynamic(
                graph, target, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8, per_channel=True,
                nodes_to_exclude=exact,
            )  # fmt: skip
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
    config = {key: value for key, value in loaded.config.items() if key != "graph"} | {
        "weights": bundle_config.weights_identity(path),
        "onnx": {
            "precision": precision,
            **describe_limits(loaded.model),
            "made_of": loaded.config["weights"]["sha256"],
        },
    }
    (folder / bundle_config.CONFIG_FILE).write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
    card = Path(source) / model_card.CARD_FILE
    if card.is_file():
        text = model_card.for_onnx(card.read_text(encoding="utf-8"))
        (folder / model_card.CARD_FILE).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _quiet():
    """Suppress warnings and log messages of ONNX Runtime's quantisation."""
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
