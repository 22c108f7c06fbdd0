"""The config.json of a bundle: read with suspicion, and without torch.

A bundle may come from a stranger. What config.json says is bounded before anything is built from it, and every file it
speaks of is held to its size and SHA-256.
"""

import hashlib
import json
import math
from pathlib import Path

import accent_plugin
from accent_plugin import audio
from accent_plugin.errors import BundleError

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.ckpt"
ONNX_FILE = "model.onnx"
YAML_FILE = "hyperparams.yaml"

# A configuration of some kilobytes; a hostile one may be anything.
_LARGEST_CONFIG = 1 << 22
_LARGEST_NUMBER = 1 << 22
_MOST_LAYERS = 1000


def read(folder):
    """Read config.json and check every value in it; the files that it speaks of are not looked at.

    Raises
    ------
    BundleError
        When it is missing, damaged or of an unknown format_version.
    """
    folder = Path(folder).absolute()
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise BundleError(
            f"there is no folder {folder}; a bundle is the folder that training writes, with {CONFIG_FILE}"
        )
    if not path.is_file():
        raise BundleError(
            f"{folder} is no bundle: it has no {CONFIG_FILE}; training writes one to OUTPUT_FOLDER/bundle"
        )
    if path.stat().st_size > _LARGEST_CONFIG:
        raise BundleError(f"{path} has {path.stat().st_size:,} bytes, which no bundle's has: do not trust it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise BundleError(f"{path} holds no mapping")
    if config.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format_version {config.get('format_version')!r}; this accent_plugin "
            f"({accent_plugin.__version__}) understands {FORMAT_VERSION}: update it, or export the bundle again"
        )
    if problems := list(_problems(config)):
        raise BundleError(f"{path} is damaged:\n" + "\n".join(f"  {problem}" for problem in problems))
    return config


def identity(path):
    """Name, size in bytes and SHA-256 of a file, as config.json has them of the weights."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


def require_size(path, config):
    """Refuse a file of weights that is missing or of another size than config.json says: it was cut or changed.

    Raises
    ------
    BundleError
    """
    if not path.is_file():
        raise BundleError(f"{path} is missing: copy the whole folder")
    size, said = path.stat().st_size, config["weights"]["bytes"]
    if size != said:
        raise BundleError(
            f"{path} has {size:,} bytes, {CONFIG_FILE} says {said:,}: it was cut or changed; copy it again"
        )


def require_identity(path, config):
    """Refuse a file of weights with another digest than config.json says.

    Raises
    ------
    BundleError
    """
    if identity(path) != config["weights"]:
        raise BundleError(f"{path} has another SHA-256 than {CONFIG_FILE} says: it was changed, or copied badly")


def _problems(config):
    """Yield what is wrong with a configuration's values, before anything is built from them."""
    labels, model, weights = (config.get(key) for key in ("labels", "model", "weights"))
    named = isinstance(labels, list) and all(isinstance(name, str) and name for name in labels)
    if not named or not 1 <= len(labels) <= _MOST_LAYERS or len(set(labels)) < len(labels):
        yield f"labels is {_short(labels)}, not a list of distinct names"
    if config.get("sample_rate") != audio.SAMPLE_RATE:
        yield f"sample_rate is {_short(config.get('sample_rate'))}, not {audio.SAMPLE_RATE}"
    if (
        not isinstance(weights, dict)
        or weights.get("file") not in (WEIGHTS_FILE, ONNX_FILE)
        or not _is_count(weights.get("bytes"), math.inf)
    ):
        yield f"weights is {_short(weights)}, not the file, bytes and sha256 of {WEIGHTS_FILE} or {ONNX_FILE}"
    yield from _problems_of_calibration(config.get("calibration"))
    if not isinstance(model, dict):
        yield f"model is {_short(model)}, not a mapping"
        return
    if not isinstance(model.get("pooling"), str):
        yield f"model.pooling is {_short(model.get('pooling'))}, not the name of a pooling"
    size = model.get("projector_size")
    if "projector_size" not in model or not (size is None or _is_count(size)):
        yield f"model.projector_size is {_short(size)}, not a number of features or null"
    for key in ("projector_activation", "whitening"):
        if not isinstance(model.get(key), bool):
            yield f"model.{key} is {_short(model.get(key))}, not true or false"
    speeds = model.get("speeds")
    if not isinstance(speeds, list) or not 1 <= len(speeds) <= 16 or not all(_is_speed(speed) for speed in speeds):
        yield f"model.speeds is {_short(speeds)}, not a list of factors from 0.5 to 2"
    encoder = model.get("encoder")
    parts = ("config", "preprocessor")
    if not isinstance(encoder, dict) or not all(isinstance(encoder.get(key), dict) for key in parts):
        yield "model.encoder lacks its config or its preprocessor"
        return
    layers = encoder.get("weighted_layers")
    if layers is not None and not (isinstance(layers, list) and all(_is_count(layer) for layer in layers)):
        yield f"model.encoder.weighted_layers is {_short(layers)}, not a list of layers or null"
    if not isinstance(encoder.get("family"), str) or not isinstance(encoder.get("standardise_layers"), bool):
        yield "model.encoder lacks its family or standardise_layers"
    for key, value in encoder["config"].items():
        largest = _MOST_LAYERS if "layers" in key else _LARGEST_NUMBER
        for number in _numbers(value):
            if not math.isfinite(number) or abs(number) > largest:
                yield f"model.encoder.config.{key} is {_short(value)}, more than any encoder has"
                break


def _problems_of_calibration(found):
    if found is None:
        return
    curve = found.get("curve") if isinstance(found, dict) else None
    temperature = found.get("temperature") if isinstance(found, dict) else None
    if not isinstance(curve, dict) or not _is_positive(temperature):
        yield f"calibration is {_short(found)}, not null or a temperature above 0 and a curve"
        return
    columns = [curve.get(name) for name in ("threshold", "coverage", "risk")]
    if not all(isinstance(column, list) and all(_is_share(value) for value in column) for column in columns):
        yield "calibration.curve lacks lists of numbers called threshold, coverage and risk"
    elif len(set(map(len, columns))) > 1:
        yield "calibration.curve has columns of different lengths"


def _is_positive(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_share(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _numbers(value):
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | dict):
        if len(value) > _MOST_LAYERS:
            yield math.inf
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)


def _is_count(value, most=_LARGEST_NUMBER):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _is_speed(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.5 <= value <= 2


def _short(value):
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
