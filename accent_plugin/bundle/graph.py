"""Write an `AccentModel` as an ONNX graph, from padded waveforms to log-probabilities and embeddings.

The graph is built from the modules of the model, not traced. This takes milliseconds instead of a minute. The
dimensions of the result stay free, and the weights enter the graph as they are stored. A weight can therefore remain
in the safetensors file of a bundle: the graph contains its offset and length there.

`accent_plugin.bundle.graph_encoders` adds the encoders. `accent_plugin.bundle.write` compares the scores of the graph
with those of the model.
"""

import numpy as np
import torch

from accent_plugin import pooling
from accent_plugin.bundle.config import EMBEDDINGS, LENGTHS, LOG_PROBABILITIES, WAVES, WEIGHTS_FILE
from accent_plugin.bundle.graph_encoders import ENCODERS
from accent_plugin.bundle.graph_nodes import Nodes, UnsupportedError
from accent_plugin.errors import ExchangeError

# Versions of the operators and of the file format: what ONNX Runtime 1.22 reads.
_OPSET, _IR_VERSION = 20, 10

_POOLINGS = (
    pooling.MeanPooling,
    pooling.StatisticsPooling,
    pooling.AttentivePooling,
    pooling.AttentiveStatisticsPooling,
)


def make_graph(model, stored=None):
    """Make the graph of a model.

    Arguments
    ---------
    model : accent_plugin.model.AccentModel
        In float32 and evaluation mode, without adapters.
    stored : dict
        Key in the state dict -> (offset, bytes) in the weights file beside the graph. None puts the weights into the
        graph.

    Returns
    -------
    onnx.ModelProto
        Its inputs are ``waves``, (clips, samples) in float32 at 16 kHz, padded to at least the encoder's
        `minimum_samples`, and ``lengths``, (clips,) in int64. Its outputs are ``log_probabilities``, (clips, classes),
        and ``embeddings``, (clips, features), the vectors before the classifier.

    Raises
    ------
    ExchangeError
        If the model has a part that no rule here describes, or the onnx package is missing.
    """
    try:
        import onnx
    except ImportError:
        raise ExchangeError("onnx is not installed: pip install onnx") from None
    nodes = Nodes(model)
    try:
        embeddings = _embed(nodes, model)
    except UnsupportedError as error:
        raise ExchangeError(f"no ONNX graph can be made of this model: {error}") from None
    scores = nodes("LogSoftmax", nodes.linear(embeddings, model.classifier), axis=-1)
    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    kinds = (
        (LOG_PROBABILITIES, scores, model.classifier.out_features),
        (EMBEDDINGS, embeddings, model.classifier.in_features),
    )
    for name, result, _ in kinds:
        nodes("Identity", result, output=name)
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes.made,
        "accent_plugin",
        [tensor(WAVES, float32, ["clips", "samples"]), tensor(LENGTHS, int64, ["clips"])],
        [tensor(name, float32, ["clips", width]) for name, _, width in kinds],
        [*nodes.constants(), *(_initializer(name, value, stored) for name, value in nodes.weights())],
    )
    opset = onnx.helper.make_opsetid("", _OPSET)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION, producer_name="accent_plugin")


def _initializer(name, value, stored):
    import onnx

    if stored is None:
        return onnx.numpy_helper.from_array(value.detach().numpy(), name)
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.detach().numpy().dtype)
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=value.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    offset, length = stored[name]
    for key, content in (("location", WEIGHTS_FILE), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(content))
    return tensor


def _embed(nodes, model):
    """Add everything up to the input of the classifier; returns (clips, features)."""
    encoder = model.wav2vec2
    family = encoder.config.model_type
    if family not in ENCODERS:
        raise UnsupportedError(f"the encoder's family is {family!r}; there are rules for {', '.join(ENCODERS)}")
    states, valid = ENCODERS[family](nodes, encoder)
    frames = _combine(nodes, encoder, states)
    if model.projector is not None:
        frames = nodes.linear(frames, model.projector[0])
        if len(model.projector) > 1:
            frames = nodes("Gelu", frames)
    pooled = _pool(nodes, model.pooling, frames, valid)
    if model.whitening is None:
        return pooled
    centred = nodes("Sub", pooled, nodes.weight(model.whitening.mean))
    return nodes("MatMul", centred, nodes.weight(model.whitening.transform))


def _combine(nodes, encoder, states):
    """`InvariantEncoder.combine`, on states of (clips * frames, features)."""
    if encoder.weighted_layers is None:
        return states[-1]
    chosen = [states[layer] for layer in encoder.weighted_layers]
    if encoder.standardise_layers:
        chosen = [nodes.standardise(state, encoder.width) for state in chosen]
    shares = nodes("Softmax", nodes.weight(encoder.layer_weights), axis=0)
    parts = [nodes("Mul", state, nodes("Gather", shares, np.int64(place))) for place, state in enumerate(chosen)]
    return nodes("Sum", *parts)


def _pool(nodes, module, frames, valid):
    """The poolings of `accent_plugin.pooling`: (clips * frames, features) -> (clips, out_features)."""
    if type(module) not in _POOLINGS:
        names = ", ".join(each.__name__ for each in _POOLINGS)
        raise UnsupportedError(f"its pooling is a {type(module).__name__}; supported are {names}")
    mask = nodes("Unsqueeze", valid, [2])
    frames = nodes("Where", mask, nodes.in_clips(frames), 0.0)
    if hasattr(module, "attention"):
        hidden = nodes("Tanh", nodes.linear(nodes.in_rows(frames), module.attention.hidden))
        scores = nodes.in_clips(nodes.linear(hidden, module.attention.score))
        scores = nodes("Where", mask, scores, torch.finfo(torch.float32).min)
        weights = nodes("Softmax", scores, axis=1)
    else:
        ones = nodes("Cast", mask, to=nodes.FLOAT)
        weights = nodes("Div", ones, nodes("Max", nodes("ReduceSum", ones, [1]), 1.0))
    mean = nodes("ReduceSum", nodes("Mul", frames, weights), [1])
    if not isinstance(module, pooling.StatisticsPooling):
        return nodes("Squeeze", mean, [1])
    centred = nodes("Sub", frames, mean)
    variance = nodes("ReduceSum", nodes("Mul", nodes("Mul", centred, centred), weights), [1])
    deviation = nodes("Sqrt", nodes("Max", variance, pooling.VARIANCE_FLOOR))
    return nodes("Squeeze", nodes("Concat", mean, deviation, axis=2), [1])
