"""Read and check the config.json of a bundle, without torch.

A bundle may be untrusted. All values in config.json are checked against limits before anything is built from them. The
files that it names must have the size and SHA-256 that it states.
"""

import hashlib
import json
import math
import re
import sys
from pathlib import Path

import accent_plugin
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.errors import BundleError
from accent_plugin.files import require_downloaded

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.ckpt"
ONNX_FILE = "model.onnx"
# The graph that ONNX Runtime reads; the weights in it are those of WEIGHTS_FILE.
GRAPH_FILE = "graph.onnx"
YAML_FILE = "hyperparams.yaml"
CARD_FILE = "README.md"
# All files that a bundle, and an ONNX export, may contain.
BUNDLE_FILES = (CONFIG_FILE, WEIGHTS_FILE, GRAPH_FILE, YAML_FILE, CARD_FILE)
ONNX_FILES = (CONFIG_FILE, ONNX_FILE, CARD_FILE)
# Inputs and outputs of a graph.
WAVES, LENGTHS = "waves", "lengths"
LOG_PROBABILITIES, EMBEDDINGS = "log_probabilities", "embeddings"
# In bytes. A normal configuration has some kilobytes; a hostile one may have any size.
_LARGEST_CONFIG = 1 << 22
_LARGEST_NUMBER = 1 << 22
_LARGEST_GRAPH = 1 << 24
_MOST_LAYERS = 1000

# Limits of encoder values that affect memory, time or validity, but no tensor's shape.
_LIMITS = {
    "conv_kernel": (1, 1000),
    "conv_stride": (1, 1000),
    "num_conv_pos_embeddings": (1, 1000),
    # These only affect a decoder that is built and dropped immediately.
    "decoder_layers": (1, 100),
    "decoder_num_hidden_layers": (1, 100),
    "num_buckets": (4, 1 << 16),
    "max_bucket_distance": (1, _LARGEST_NUMBER),
    "pad_head_dim_to_multiple_of": (1, 256),
    "partial_rotary_factor": (0.0, 1.0),
    "sampling_rate": (SAMPLE_RATE, SAMPLE_RATE),
    "feature_size": (1, 512),
    "n_fft": (64, 4096),
    "hop_length": (1, 4096),
    "chunk_length": (1, 240),
}

# Values that are lists: each number is checked against the limits. If a value is null, transformers uses its default.
_EACH = ("conv_kernel", "conv_stride")
# Limits of the hop between frames, in samples. Pretrained encoders have 160 to 640.
_SHORTEST_HOP, _LONGEST_HOP = 80, SAMPLE_RATE
_MODEL_KEYS = {"encoder", "pooling", "projector_size", "projector_activation", "whitening", "speeds"}
_ENCODER_KEYS = {"name", "family", "config", "preprocessor", "weighted_layers", "standardise_layers"}
_WEIGHTS_KEYS = {"file", "bytes", "sha256"}
_SHA256 = re.compile("[0-9a-f]{64}")


def is_bundle(folder):
    """Whether a folder is a bundle of any version; transformers models have a config.json too."""
    return "format_version" in _read_unchecked(folder)


def is_hugging_face(folder):
    """Whether a folder is a transformers model of any class."""
    config = _read_unchecked(folder)
    return "architectures" in config and "format_version" not in config


def require_replaceable(folder, files, is_own=is_bundle):
    """Raise an error if a folder contains anything that this package did not write.

    Arguments
    ---------
    folder : Path
        May be missing or empty.
    files : collection of str
        Names of the files that may be replaced.
    is_own : callable
        Folder -> whether its config.json is of the same kind as the one that will replace it.

    Raises
    ------
    BundleError
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BundleError(f"{folder} is a file: choose another folder")
    found = sorted(folder.iterdir())
    foreign = [path for path in found if path.name not in files or path.is_dir()]
    if foreign or (found and not is_own(folder)):
        raise BundleError(
            f"{folder} contains {(foreign or found)[0].name!r}, which this command did not write: choose another "
            "folder, or empty it"
        )


def _read_unchecked(folder):
    """Read a folder's config.json without checking its values; return an empty dict if it is missing or damaged."""
    path = Path(folder) / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= _LARGEST_CONFIG else None
    except (ValueError, RecursionError, OSError):
        return {}
    return config if isinstance(config, dict) else {}


def read(folder):
    """Read config.json and check every value in it, but not the files that it names.

    Raises
    ------
    BundleError
        When it is missing, damaged or of an unknown format_version.
    """
    folder = Path(folder).absolute()
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise BundleError(
            f"there is no folder {folder}; a bundle is the folder with {CONFIG_FILE} that training writes"
        )
    if not path.is_file():
        raise BundleError(
            f"{folder} is not a bundle: it has no {CONFIG_FILE}; training writes bundles to OUTPUT_FOLDER/bundle"
        )
    require_downloaded(path, BundleError)
    if path.stat().st_size > _LARGEST_CONFIG:
        raise BundleError(f"{path} has {path.stat().st_size:,} bytes, more than any bundle needs: do not trust it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_mapping)
    except (ValueError, RecursionError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise BundleError(f"{path} is not a JSON object")
    version = config.get("format_version")
    # In Python, true and 1.0 equal 1.
    if type(version) is not int or version != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format_version {_short(version)}; this accent_plugin "
            f"({accent_plugin.__version__}) reads {FORMAT_VERSION}: update accent_plugin, or export the bundle again"
        )
    try:
        problems = list(_problems(config))
    except RecursionError as error:
        raise BundleError(f"{path} cannot be read: {error}") from None
    if problems:
        raise BundleError(f"{path} is damaged:\n" + "\n".join(f"  {problem}" for problem in problems))
    return config


def _mapping(pairs):
    """Convert a JSON object to a dict; json would silently use the last of duplicate keys."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it has the key {_short(key)} twice")
        found[key] = value
    return found


def weights_identity(path):
    """Return the name, size in bytes and SHA-256 of a file of weights or a graph, as stored in config.json."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


def require_size(path, identity):
    """Raise a `BundleError` if a file is missing or its size differs from its ``identity`` in config.json."""
    if not path.is_file():
        raise BundleError(f"{path} is missing: copy the whole folder")
    require_downloaded(path, BundleError)
    size, expected = path.stat().st_size, identity["bytes"]
    if size != expected:
        raise BundleError(
            f"{path} has {size:,} bytes, but {CONFIG_FILE} says {expected:,}: it is damaged or changed; copy it again"
        )


def require_identity(path, identity):
    """Raise a `BundleError` if the digest of a file differs from its ``identity`` in config.json."""
    if weights_identity(path)["sha256"] != identity["sha256"]:
        raise BundleError(f"the SHA-256 of {path} differs from {CONFIG_FILE}: it is damaged or changed; copy it again")


def _problems(config):
    labels, model, weights = (config.get(key) for key in ("labels", "model", "weights"))
    named = isinstance(labels, list) and all(_is_name(label) for label in labels)
    if not named or not 1 <= len(labels) <= _MOST_LAYERS or len(set(labels)) < len(labels):
        yield f"labels is {_short(labels)}, not a list of printable, distinct names"
    if config.get("sample_rate") != SAMPLE_RATE:
        yield f"sample_rate is {_short(config.get('sample_rate'))}, not {SAMPLE_RATE}"
    yield from _problems_of_weights(weights, config.get("onnx"))
    yield from _problems_of_graph(config.get("graph"))
    yield from _problems_of_calibration(config.get("calibration"))
    if not isinstance(model, dict):
        yield f"model is {_short(model)}, not a mapping"
        return
    yield from _problems_of_keys("model", model, _MODEL_KEYS)
    if not isinstance(model.get("pooling"), str):
        yield f"model.pooling is {_short(model.get('pooling'))}, not the name of a pooling"
    size = model.get("projector_size")
    if "projector_size" not in model or not (size is None or _is_count(size)):
        yield f"model.projector_size is {_short(size)}, not a number of features or null"
    for key in ("projector_activation", "whitening"):
        if not isinstance(model.get(key), bool):
            yield f"model.{key} is {_short(model.get(key))}, not true or false"
    speeds = model.get("speeds")
    if not isinstance(speeds, list) or not 1 <= len(speeds) <= 16 or not _is_within(speeds, 0.5, 2.0):
        yield f"model.speeds is {_short(speeds)}, not a list of factors from 0.5 to 2"
    yield from _problems_of_encoder(model.get("encoder"))


def _problems_of_weights(weights, graph):
    if (
        not isinstance(weights, dict)
        or weights.keys() != _WEIGHTS_KEYS
        or weights["file"] not in (WEIGHTS_FILE, ONNX_FILE)
        or not _is_count(weights["bytes"], math.inf)
    ):
        yield f"weights is {_short(weights)}, not the file, bytes and sha256 of {WEIGHTS_FILE} or {ONNX_FILE}"
        return
    if not _is_digest(weights["sha256"]):
        yield f"weights.sha256 is {_short(weights['sha256'])}, not 64 hexadecimal digits"
    if weights["file"] == ONNX_FILE and not _has_limits(graph):
        yield f"onnx is {_short(graph)}, not the precision and the limits of {ONNX_FILE}"


def _problems_of_graph(graph):
    if graph is None:
        return
    if (
        not _has_limits(graph)
        or not _is_count(graph.get("bytes"), _LARGEST_GRAPH)
        or not _is_digest(graph.get("sha256"))
    ):
        yield f"graph is {_short(graph)}, not the bytes, the sha256 and the limits of {GRAPH_FILE}"


def _has_limits(graph):
    """Whether there are the limits of a clip in samples; exports of version 0.1.0 have no maximum."""
    if not isinstance(graph, dict) or not _is_count(graph.get("minimum_samples")):
        return False
    most = graph.get("maximum_samples")
    return most is None or (_is_count(most) and most >= graph["minimum_samples"])


def _problems_of_keys(name, found, known):
    if strange := sorted(found.keys() - known):
        yield f"{name} has the key {_short(strange[0])}, which is unknown; known are {', '.join(sorted(known))}"


def _problems_of_encoder(encoder):
    parts = ("config", "preprocessor")
    if not isinstance(encoder, dict) or not all(isinstance(encoder.get(key), dict) for key in parts):
        yield "model.encoder lacks its config or its preprocessor"
        return
    yield from _problems_of_keys("model.encoder", encoder, _ENCODER_KEYS)
    if not _is_name(encoder.get("name")):
        yield f"model.encoder.name is {_short(encoder.get('name'))}, not a printable name"
    layers = encoder.get("weighted_layers")
    if layers is not None and not (isinstance(layers, list) and all(_is_count(layer) for layer in layers)):
        yield f"model.encoder.weighted_layers is {_short(layers)}, not a list of layers or null"
    if not isinstance(encoder.get("family"), str) or not isinstance(encoder.get("standardise_layers"), bool):
        yield "model.encoder lacks its family or standardise_layers"
    config, preprocessor = (encoder[part] for part in parts)
    kind = config.get("model_type", encoder.get("family"))
    if kind != encoder.get("family"):
        yield f"model.encoder.config.model_type is {_short(kind)}, but the family is {_short(encoder.get('family'))}"
    if "auto_map" in preprocessor:
        yield "model.encoder.preprocessor.auto_map names code to run, which bundles do not contain"
    outside = [problem for part in parts for problem in _outside(f"model.encoder.{part}", encoder[part])]
    yield from outside or _problems_of_frames(config)


def _outside(name, values):
    for key, value in values.items():
        path = f"{name}.{key}" if key.isidentifier() else f"{name}[{_short(key)}]"
        largest = _MOST_LAYERS if "layers" in key else _LARGEST_NUMBER
        # Not "> largest", which would accept NaN.
        if not all(abs(number) <= largest for number in _numbers(value)):
            yield f"{path} is {_short(value)}, more than any encoder has"
        elif key in _LIMITS and not (value is None or _is_within(value if key in _EACH else [value], *_LIMITS[key])):
            yield f"{path} is {_short(value)}, not {' to '.join(map(str, dict.fromkeys(_LIMITS[key])))}"
        elif isinstance(value, dict):
            yield from _outside(path, value)


def _problems_of_frames(config):
    kernels, strides = config.get("conv_kernel"), config.get("conv_stride")
    if kernels and strides:
        samples = 1
        for kernel, stride in zip(reversed(kernels), reversed(strides), strict=False):
            samples = (samples - 1) * stride + kernel
        if not _SHORTEST_HOP <= math.prod(strides) <= _LONGEST_HOP or samples > _LONGEST_HOP:
            yield (
                f"model.encoder.config has conv_kernel {_short(kernels)} and conv_stride {_short(strides)}: a frame "
                f"of {samples:,} samples every {math.prod(strides):,}, not every {_SHORTEST_HOP} to {_LONGEST_HOP:,}"
            )
    buckets, distance = config.get("num_buckets"), config.get("max_bucket_distance")
    # WavLM divides by the logarithm of the distance over a quarter of the buckets.
    if buckets and distance and distance <= buckets // 4:
        yield f"model.encoder.config.max_bucket_distance is {distance}, too small for {buckets} buckets"


def _problems_of_calibration(found):
    if found is None:
        return
    curve, temperature = (found.get(key) if isinstance(found, dict) else None for key in ("curve", "temperature"))
    if not isinstance(curve, dict) or not _is_within([temperature], math.ulp(0.0), sys.float_info.max):
        yield f"calibration is {_short(found)}, not null or a temperature above 0 and a curve"
        return
    columns: list = [curve.get(name) for name in ("threshold", "coverage", "risk")]
    if not all(_is_within(column, 0.0, 1.0) for column in columns):
        yield "calibration.curve lacks lists of fractions called threshold, coverage and risk"
    elif len(set(map(len, columns))) > 1:
        yield "calibration.curve has columns of different lengths"


def _numbers(value):
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | dict):
        if len(value) > _MOST_LAYERS:
            yield math.inf
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)


def _is_name(value):
    """Whether a text is printable; control characters could control a terminal."""
    return isinstance(value, str) and value != "" and value.isprintable() and value == value.strip()


def _is_within(values, least, most):
    """Whether this is a list of numbers within limits; integers if the limits are integers."""
    kinds = int | float if isinstance(least, float) else int
    return isinstance(values, list) and all(
        isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most for value in values
    )


def _is_digest(value):
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_count(value, most=_LARGEST_NUMBER):
    return _is_within([value], 0, most)


def _short(value):
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
