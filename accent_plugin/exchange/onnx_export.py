"""Write a bundle as a graph for ONNX Runtime; `accent_plugin.exchange.onnx_classifier` runs it.

The graph takes padded waveforms and their lengths. Scaling, masks and the head are in it, so a clip's scores are the
same alone and in any batch there too. It is written in fp32, or smaller:

* ``fp16``, ``bf16``: weights in half the bytes, which ONNX Runtime widens when it loads them. It computes in fp32,
  because on a processor it has no kernels for either.
* ``int8``: the weights of linear layers in a quarter of the bytes, and their products in integers, with inputs
  quantised as they come (dynamic quantisation). Convolutions stay in fp32.

A smaller model gives other answers. So it is compared with fp32 on labelled speech before it is kept.
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
from torch import nn

from accent_plugin import files
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.bundle import config as bundle_config
from accent_plugin.bundle import model_card
from accent_plugin.bundle.load import load_bundle
from accent_plugin.data.splits import VALID
from accent_plugin.encoder.factory import FAMILIES
from accent_plugin.errors import BundleError, ExchangeError
from accent_plugin.evaluation.scores import confusion_matrix, unweighted_average_recall
from accent_plugin.exchange.onnx_classifier import LENGTHS, LOG_PROBABILITIES, WAVES, OnnxAccentClassifier
from accent_plugin.inference.labelled import WHOLE_CLIPS, evaluate_model, read_labelled

logger = logging.getLogger(__name__)


PRECISIONS = ("fp32", "fp16", "bf16", "int8")


_LONGEST_SECONDS = 600


_TOLERANCE = 1e-4


_WORST_LOSS = 0.01


# Smaller tensors are not worth a conversion each.
_LEAST_VALUES = 1024


# Of protobuf, in which a graph is written.
_LARGEST_GRAPH = (1 << 31) - 1


def export(folder, out, precision="fp32", data=None, unchecked=False):
    """Write a bundle for ONNX Runtime, and compare.

    Arguments
    ---------
    folder : str or Path
        Of the bundle.
    out : str or Path
        Replaced when it holds such an export already, and nothing else.
    precision : str
        One of `PRECISIONS`.
    data : str or Path
        Labelled speech (see `accent_plugin.inference.labelled.read_labelled`): its validation split, or all of
        it where it has none. A smaller precision that loses more than a point of unweighted average recall on it is
        refused.
    unchecked : bool
        Keep a smaller precision whatever it loses, and without data.

    Returns
    -------
    Path

    Raises
    ------
    ExchangeError
        When the model has no such form, or the smaller one is refused.
    BundleError
        When the folder holds something else, or what was written gives other scores than torch.
    """
    if precision not in PRECISIONS:
        raise ExchangeError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    if precision != "fp32" and data is None and not unchecked:
        raise ExchangeError(
            f"{precision} gives other answers than fp32: give --data, labelled speech to compare on, or --unchecked"
        )
    out = Path(out).absolute()
    bundle_config.require_replaceable(out, bundle_config.ONNX_FILES)
    loaded = load_bundle(folder)
    family = loaded.config["model"]["encoder"]["family"]
    if not FAMILIES[family].onnx:
        exportable = ", ".join(name for name in FAMILIES if FAMILIES[name].onnx)
        raise ExchangeError(f"{family} cannot be exported to ONNX; {exportable} can")
    with files.atomic_folder(out, bundle_config.ONNX_FILES) as temporary:
        exact = temporary if precision == "fp32" else temporary / "fp32"
        exact.mkdir(exist_ok=True)
        _write(exact, loaded, "fp32", trace(loaded.model), folder)
        _require_torchs_scores(exact, loaded)
        if exact != temporary:
            graph = make_smaller(exact / bundle_config.ONNX_FILE, precision)
            _write(temporary, loaded, precision, graph, folder)
            if data is not None:
                _keep_comparison(temporary, compare(exact, temporary, data), unchecked)
            shutil.rmtree(exact)
    return out


class _Graph(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, waves, lengths):
        return self.model(waves, lengths.double() / waves.shape[1])


def trace(model):
    """The graph of an `AccentModel`, with any number of clips of any length, by torch's exporter.

    Returns
    -------
    onnx.ModelProto

    Raises
    ------
    ExchangeError
        When packages are missing, or the exporter cannot follow the model.
    """
    _require_packages()
    model = copy.deepcopy(model).cpu().float().eval()
    model.requires_grad_(False)
    least = model.wav2vec2.minimum_samples
    clips = torch.export.Dim("clips")
    samples = torch.export.Dim("samples", min=least, max=_LONGEST_SECONDS * SAMPLE_RATE)
    # Long enough for many frames: what has a length of one in the example would have one for ever.
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
            # The exporter wraps whatever torch, ONNX or a model says.
            raise ExchangeError(f"torch cannot export this model to ONNX: {str(error).splitlines()[0]}") from error
    return _without_origins(program.model_proto)


def _without_origins(graph):
    """Take away what the exporter notes of where each node came from, with paths of this machine."""
    for part in (graph, graph.graph, *graph.graph.node, *graph.graph.value_info, *graph.functions):
        del part.metadata_props[:]
        part.doc_string = ""
    return graph


def make_smaller(path, precision):
    """The graph in ``path`` with weights in "fp16", "bf16" or "int8"; returns an onnx.ModelProto."""
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
    """What a smaller model costs: unweighted average recalls by clip, and the share of clips with the same label."""

    data: str
    clips: int
    exact: float
    smaller: float
    same_label: float

    @property
    def loss(self):
        """Fall of the unweighted average recall."""
        return self.exact - self.smaller


def compare(exact, smaller, data, split=None):
    """Compare two exports on labelled speech.

    Arguments
    ---------
    exact, smaller, data : str or Path
    split : str
        None for validation, or all where there is none.

    Returns
    -------
    Comparison
    """
    found = []
    for folder in (exact, smaller):
        classifier = OnnxAccentClassifier.from_bundle(folder, **WHOLE_CLIPS)
        rows, _ = read_labelled(data, classifier.labels, split=split, preferred=VALID)
        found.append(evaluate_model(classifier, rows, progress=False)[0])
    labels = [each.log_probabilities.argmax(axis=1) for each in found]
    confusions = [
        confusion_matrix(each.truth, predicted, len(each.labels)) for each, predicted in zip(found, labels, strict=True)
    ]
    recalls = [float(unweighted_average_recall(confusion)) for confusion in confusions]
    return Comparison(Path(data).name, len(labels[0]), *recalls, float(np.mean(labels[0] == labels[1])))


def _keep_comparison(folder, found, unchecked):
    """Write a comparison into the folder's config.json, or refuse the folder."""
    said = (
        f"unweighted average recall {found.smaller:.3f} in place of {found.exact:.3f} on {found.clips} clips of "
        f"{found.data}, the same label on {found.same_label:.1%}"
    )
    if found.loss > _WORST_LOSS and not unchecked:
        raise ExchangeError(f"refused: {said}, a loss of more than a point; --unchecked keeps it")
    logger.info("%s", said)
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
    """Write graph, configuration and card into a folder."""
    path = folder / bundle_config.ONNX_FILE
    if graph.ByteSize() > _LARGEST_GRAPH:
        raise ExchangeError(
            f"the graph has {graph.ByteSize():,} bytes, and an ONNX file holds {_LARGEST_GRAPH:,} at most"
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


def _require_torchs_scores(folder, loaded):
    """Refuse an export that gives other scores than torch, on noise of several lengths in one batch."""
    noise = np.random.default_rng(0).standard_normal(3 * SAMPLE_RATE).astype(np.float32) / 10
    waves = [noise, noise[: 2 * SAMPLE_RATE], noise[:100]]
    wavs = nn.utils.rnn.pad_sequence([torch.from_numpy(wave) for wave in waves], batch_first=True)
    lens = torch.tensor([len(wave) / len(noise) for wave in waves], dtype=torch.double)
    with torch.inference_mode():
        embeddings = loaded.modules["embedding_model"](wavs, lens)
        expected = loaded.modules["classifier"](embeddings).squeeze(1).numpy()
    found = OnnxAccentClassifier.from_bundle(folder)._log_probabilities(waves)
    difference = np.abs(found - expected).max()
    # Not "difference > tolerance": that would let NaN pass.
    if not difference <= _TOLERANCE:
        raise BundleError(f"ONNX Runtime gives other scores than torch (by {difference:.1e}): report it")


def _require_packages():
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExchangeError(f"{error.name} is not installed: pip install 'accent_plugin[onnx]'") from None


@contextlib.contextmanager
def _quiet():
    """Keep back what exporters say to their developers."""
    # ONNX Runtime's quantisation writes through the root logger, which gets itself a handler for all notes by that.
    handlers = logging.root.handlers[:]
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        logging.root.handlers[:] = handlers
