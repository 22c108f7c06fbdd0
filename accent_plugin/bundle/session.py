"""Open a graph with ONNX Runtime, without torch; a graph may be untrusted.

ONNX Runtime reads weights from any file below the graph's folder that the graph names. `open_graph` first reads all
such references, and raises an error unless each is exactly one tensor of the bundle's weights file.
"""

import json
import mmap
import os
import struct

from accent_plugin.bundle.config import EMBEDDINGS, LENGTHS, LOG_PROBABILITIES, WAVES, WEIGHTS_FILE
from accent_plugin.errors import BundleError, ConfigError

# In bytes. safetensors has the same limit.
_LARGEST_HEADER = 100_000_000

# The parts of ONNX's protobuf messages that contain tensors: message -> number of a field -> message.
_PARTS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
_KEY, _VALUE, _LOCATION, _EXTERNAL = 1, 2, 14, 1
_REFERENCE_KEYS = ["length", "location", "offset"]


def open_graph(path, threads=None, providers=("CPUExecutionProvider",)):
    """Open a graph.

    Arguments
    ---------
    path : Path
    threads : int
        Threads of ONNX Runtime; None for one per core.
    providers : sequence of str
        Execution providers of ONNX Runtime in order of preference.

    Returns
    -------
    onnxruntime.InferenceSession

    Raises
    ------
    BundleError
        If the graph is damaged, refers to anything but tensors of the weights file beside it, or has other inputs.
    ConfigError
        If ONNX Runtime is not installed.
    """
    _require_own_weights(path)
    try:
        onnxruntime = import_onnxruntime()
    except ImportError:
        raise ConfigError("ONNX Runtime is not installed: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    # Errors only: models from another version of the exporter cause many warnings.
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=list(providers))
    except Exception as error:
        # ONNX Runtime has a dozen exceptions without a common base class.
        raise BundleError(f"{path} cannot be loaded by ONNX Runtime: {str(error).splitlines()[0]}") from None
    names = {each.name for each in (*session.get_inputs(), *session.get_outputs())}
    # Exports of version 0.1.0 have no embeddings.
    if names | {EMBEDDINGS} != {WAVES, LENGTHS, LOG_PROBABILITIES, EMBEDDINGS}:
        raise BundleError(
            f"{path} has the inputs and outputs {', '.join(sorted(names))}: it was not written by accent_plugin"
        )
    return session


def import_onnxruntime():
    """Import ONNX Runtime without its telemetry, unless the user has set ORT_DISABLE_TELEMETRY to 0.

    It reads the variable on import; otherwise it leaves a device identifier in the home folder.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def read_offsets(path):
    """Read where the tensors of a safetensors file are: key -> (offset, bytes), from the start of the file."""
    try:
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > _LARGEST_HEADER:
                raise ValueError(f"its header has {size:,} bytes")
            header = json.loads(file.read(size))
            start, end = 8 + size, file.seek(0, os.SEEK_END)
        header.pop("__metadata__", None)
        spans = {key: tensor["data_offsets"] for key, tensor in header.items()}
        found = {key: (start + first, last - first) for key, (first, last) in spans.items()}
        if not all(start <= first and 0 <= length <= end - first for first, length in found.values()):
            raise ValueError("a tensor lies beyond its end")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise BundleError(f"{path} is not in the safetensors format: {error}") from None
    return found


def _require_own_weights(path):
    """Raise a `BundleError` unless all external tensors of a graph are tensors of the weights file beside it."""
    try:
        # Mapped: an export has all its weights in the graph.
        with open(path, "rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        references = list(_external_tensors(content))
    except (ValueError, OSError) as error:
        raise BundleError(f"{path} is not an ONNX graph: {error}") from None
    found = [dict(entries) for entries in references]
    for entries, entry in zip(references, found, strict=True):
        # A duplicate key could hide another value.
        if sorted(key for key, _ in entries) != _REFERENCE_KEYS or entry["location"] != WEIGHTS_FILE:
            raise BundleError(f"{path} refers to {entry.get('location')!r}: do not trust it")
    spans = read_offsets(path.with_name(WEIGHTS_FILE)).values() if found else ()
    # As text: only what `accent_plugin.bundle.graph` writes is accepted.
    allowed = {(str(offset), str(length)) for offset, length in spans}
    for entry in found:
        if (entry["offset"], entry["length"]) not in allowed:
            raise BundleError(
                f"{path} refers to {entry['length']!r} bytes at {entry['offset']!r} of {WEIGHTS_FILE}, which are not a "
                "tensor there: do not trust it"
            )


def _external_tensors(data):
    """Yield the (key, value) pairs of each external tensor in a serialised ModelProto."""
    waiting = [("model", data)]
    while waiting:
        message, data = waiting.pop()
        fields = list(_fields(data))
        parts = [(_PARTS[message][number], part) for number, part in fields if number in _PARTS[message]]
        if any(not isinstance(part, memoryview) for _, part in parts):
            raise ValueError("a field has another type")
        if message != "tensor":
            waiting += parts
        elif parts or any(number == _LOCATION and value == _EXTERNAL for number, value in fields):
            yield [_entry(part) for _, part in parts]


def _entry(data):
    found = dict(_fields(data))
    return tuple(bytes(found.get(number, b"")).decode("utf-8") for number in (_KEY, _VALUE))


def _fields(data):
    """Yield the number and the value of each field of a protobuf message; numbers as int, others as memoryview."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(data, place)
        else:
            if kind == 2:
                size, place = _varint(data, place)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:
                raise ValueError(f"a field has the unknown type {kind}")
            if size > len(data) - place:
                raise ValueError("it is truncated")
            value, place = data[place : place + size], place + size
        yield tag >> 3, value


def _varint(data, place):
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError("it is truncated")
        byte, place = data[place], place + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number has more than ten bytes")
