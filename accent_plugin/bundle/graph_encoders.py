"""The encoders as parts of an ONNX graph; each gives the hidden states that `InvariantEncoder.hidden_states` returns.

A function in `ENCODERS` takes the graph's `Nodes` and an encoder of `accent_plugin.encoder`. It returns the list of
hidden states, (clips * frames, features), and the mask of valid frames, (clips, frames).
"""

import math

import numpy as np
import torch
from torch import nn

from accent_plugin.bundle.config import LENGTHS, WAVES
from accent_plugin.bundle.graph_nodes import UnsupportedError
from accent_plugin.encoder.base import NORMALISATION_FLOOR
from accent_plugin.encoder.convolutions import PositionalConvolutions


def _wav2vec2(nodes, encoder):
    """wav2vec 2.0, HuBERT, WavLM and data2vec-audio."""
    model, config = encoder.model, encoder.config
    hidden, counts = _waves(nodes, encoder)
    hidden, samples = nodes("Unsqueeze", hidden, [1]), nodes.samples
    for layer in model.feature_extractor.conv_layers:
        kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
        counts, samples = (nodes.convolved(each, kernel, stride) for each in (counts, samples))
        norm = getattr(layer, "layer_norm", None)
        if isinstance(norm, nn.GroupNorm):
            hidden = _normed_conv(nodes, hidden, layer.conv, norm, counts, nodes.valid(counts, samples))
        else:
            hidden = nodes.conv(hidden, layer.conv)
            if norm is not None:
                hidden = _transposed(nodes, nodes.norm(_transposed(nodes, hidden), norm))
        hidden = nodes.activation(hidden, config.feat_extract_activation)
    nodes.frames, valid = samples, nodes.valid(counts, samples)
    hidden = nodes.in_rows(_transposed(nodes, hidden))
    projection = model.feature_projection
    if getattr(projection, "layer_norm", None) is not None:
        hidden = nodes.norm(hidden, projection.layer_norm)
    hidden = nodes.linear(hidden, projection.projection)
    mask = nodes("Unsqueeze", valid, [1])
    frames = nodes("Where", mask, _transposed(nodes, nodes.in_clips(hidden)), 0.0)
    hidden = nodes.in_rows(_transposed(nodes, nodes("Add", frames, _positions(nodes, encoder, frames, mask))))
    stable = getattr(config, "do_stable_layer_norm", False)
    if not stable:
        hidden = nodes.norm(hidden, model.encoder.layer_norm)
    states, bias, places = [hidden], _attention_bias(nodes, valid), None
    for layer in encoder.layers:
        if getattr(layer, "adapter_layer", None) is not None:
            raise UnsupportedError("its layers have adapters (adapter_attn_dim)")
        inputs = nodes.norm(hidden, layer.layer_norm) if stable else hidden
        attention, own = layer.attention, bias
        if hasattr(attention, "gru_rel_pos_linear"):
            places = places or _relative_places(nodes, attention)
            own = nodes("Add", _gated(nodes, attention, inputs, places), bias)
        hidden = nodes("Add", hidden, _attend(nodes, attention, inputs, own, attention.out_proj))
        normed = nodes.norm(hidden, layer.final_layer_norm if stable else layer.layer_norm)
        hidden = hidden if stable else normed
        feed = layer.feed_forward
        inner = nodes.activation(nodes.linear(normed, feed.intermediate_dense), config.hidden_act)
        hidden = nodes("Add", hidden, nodes.linear(inner, feed.output_dense))
        if not stable:
            hidden = nodes.norm(hidden, layer.final_layer_norm)
        states.append(hidden)
    if stable and encoder.weighted_layers is None:
        # A weighted sum has the output of the last layer, without the norm above it.
        states[-1] = nodes.norm(hidden, model.encoder.layer_norm)
    return states, valid


def _normed_conv(nodes, waves, conv, norm, counts, valid):
    """The first convolution and its masked norm, (clips, 1, samples) -> (clips, channels, frames), as one product.

    The mean and variance of a channel follow from those of the samples under the kernel, as in
    `accent_plugin.encoder.convolutions`, so that nothing but the product has the size of the output.
    """
    if norm.num_groups != norm.num_channels or conv.in_channels != 1 or conv.groups != 1 or conv.padding != (0,):
        raise UnsupportedError("the group norm of its first convolution covers several channels")
    (kernel,) = conv.kernel_size
    mask, counts = nodes("Unsqueeze", valid, [1]), nodes("Unsqueeze", counts, [1, 2])
    windows = nodes("Conv", waves, np.eye(kernel, dtype=np.float32)[:, None], strides=conv.stride)
    total = nodes("ReduceSum", nodes("Where", mask, windows, 0.0), [2])
    mean = nodes("Div", total, nodes("Cast", counts, to=nodes.FLOAT))
    centred = nodes("Where", mask, nodes("Sub", windows, mean), 0.0)
    # In float64: neighbouring samples are so similar that differences of their products lose digits.
    exact = nodes("Cast", centred, to=nodes.DOUBLE)
    products = nodes("MatMul", exact, nodes("Transpose", exact, perm=[0, 2, 1]))
    covariance = nodes("Div", products, nodes("Cast", counts, to=nodes.DOUBLE))
    weight = nodes("Squeeze", nodes.weight(conv.weight), [1])
    precise = nodes("Cast", weight, to=nodes.DOUBLE)
    variance = nodes("ReduceSum", nodes("Mul", nodes("MatMul", precise, covariance), precise), [2])
    deviation = nodes("Sqrt", nodes("Add", nodes("Cast", variance, to=nodes.FLOAT), float(norm.eps)))
    gain, shift = (nodes("Unsqueeze", nodes.weight(each), [1]) for each in (norm.weight, norm.bias))
    scale = nodes("Div", gain, deviation)
    # The last column is multiplied with ones. The norm cancels the bias of the convolution, if it has one.
    # One shift for each clip: the difference gives them the shape of the scales.
    shifts = nodes("Add", nodes("Sub", scale, scale), shift)
    kernels = nodes("Concat", nodes("Mul", scale, weight), shifts, axis=2)
    return nodes("MatMul", kernels, nodes("Concat", centred, nodes("Cast", mask, to=nodes.FLOAT), axis=1))


def _positions(nodes, encoder, frames, mask):
    """The positional convolutions on (clips, features, frames), which are zero in the padding."""
    module, name = encoder.model.encoder.pos_conv_embed, encoder.config.feat_extract_activation
    if isinstance(module, PositionalConvolutions):
        for layer in module.layers:
            convolved = _same_conv(nodes, nodes("Where", mask, frames, 0.0), layer.conv)
            normed = _transposed(nodes, nodes.norm(_transposed(nodes, convolved), layer.layer_norm))
            frames = nodes.activation(normed, name)
        return frames
    conv = module.conv
    if not nn.utils.parametrize.is_parametrized(conv, "weight"):
        raise UnsupportedError("its positional convolution has no weight norm")
    size, direction = (nodes.weight(getattr(conv.parametrizations.weight, part)) for part in ("original0", "original1"))
    length = nodes("ReduceL2", direction, [0, 1])
    weight = nodes("Mul", direction, nodes("Div", size, length))
    return nodes.activation(_same_conv(nodes, frames, conv, weight), name)


def _same_conv(nodes, frames, conv, weight=None):
    """A convolution that keeps the length; Hugging Face drops the last frame of one with an even kernel."""
    (kernel,), half = conv.kernel_size, conv.padding[0]
    return nodes.conv(frames, conv, weight, pads=[half, half - (kernel + 1) % 2])


def _relative_places(nodes, attention):
    """WavLM's bias by distance, (1, heads, frames, frames); the distances beyond the largest share one bucket."""
    most = attention.max_distance
    buckets = attention._relative_positions_bucket(torch.arange(-most, most + 1)).numpy()
    values = nodes("Gather", nodes.weight(attention.rel_attn_embed.weight), buckets)
    places = nodes("Range", np.int64(0), nodes("Squeeze", nodes.frames, [0]), np.int64(1))
    distances = nodes("Sub", nodes("Unsqueeze", places, [0]), nodes("Unsqueeze", places, [1]))
    clipped = nodes("Clip", distances, np.int64(-most), np.int64(most))
    bias = nodes("Gather", values, nodes("Add", clipped, [most]))
    return nodes("Unsqueeze", nodes("Transpose", bias, perm=[2, 0, 1]), [0])


def _gated(nodes, attention, rows, places):
    """WavLM's bias, gated by each frame: (clips, heads, frames, frames)."""
    heads, width = attention.num_heads, attention.head_dim
    parts = nodes.linear(nodes("Reshape", rows, [-1, width]), attention.gru_rel_pos_linear)
    gates = nodes("Sigmoid", nodes("ReduceSum", nodes("Reshape", parts, [-1, 2, 4]), [2], keepdims=0))
    first, second = (nodes.heads(nodes("Gather", gates, [place], axis=1), heads, 1) for place in range(2))
    inner = nodes("Sub", nodes("Mul", second, nodes.weight(attention.gru_rel_pos_const)), 1.0)
    return nodes("Mul", nodes("Add", nodes("Mul", first, inner), 2.0), places)


def _moonshine(nodes, encoder):
    model, config = encoder.model, encoder.model.config
    hidden, counts = _waves(nodes, encoder)
    hidden, samples = nodes("Unsqueeze", hidden, [1]), nodes.samples
    for number, conv in enumerate((model.conv1, model.conv2, model.conv3)):
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        counts, samples = (nodes.convolved(each, kernel, stride) for each in (counts, samples))
        hidden = nodes("Gelu" if number else "Tanh", nodes.conv(hidden, conv))
        if not number:
            hidden = nodes.group_norm(hidden, model.groupnorm, nodes.valid(counts, samples))
    nodes.frames, valid = samples, nodes.valid(counts, samples)
    hidden = nodes.in_rows(_transposed(nodes, hidden))
    turns = _rotation(nodes, model.rotary_emb, model.layers[0].self_attn.head_dim)
    states, bias = [hidden], _attention_bias(nodes, valid)
    for layer in model.layers:
        attention = layer.self_attn
        if attention.num_key_value_groups != 1:
            raise UnsupportedError("its heads share keys and values")
        inputs = nodes.norm(hidden, layer.input_layernorm)
        hidden = nodes("Add", hidden, _attend(nodes, attention, inputs, bias, attention.o_proj, turns))
        inner = nodes.linear(nodes.norm(hidden, layer.post_attention_layernorm), layer.mlp.fc1)
        inner = nodes.activation(inner, config.encoder_hidden_act)
        hidden = nodes("Add", hidden, nodes.linear(inner, layer.mlp.fc2))
        states.append(hidden)
    states[-1] = nodes.norm(hidden, model.layer_norm)
    return states, valid


def _rotation(nodes, module, width):
    """Rotary position embeddings: a function of (clips, heads, frames, width).

    x cos + (x P) sin, where P turns each pair (a, b) to (-b, a). Features beyond the rotated ones keep cos 1 and sin 0.
    """
    if module.rope_type != "default":
        raise UnsupportedError(f"its rotary embeddings are {module.rope_type!r}")
    speeds = module.inv_freq.repeat_interleave(2)
    speeds = nn.functional.pad(speeds, (0, width - len(speeds))).numpy()
    pairs = np.zeros((width, width), np.float32)
    for first in range(0, 2 * len(module.inv_freq), 2):
        pairs[first + 1, first], pairs[first, first + 1] = -1, 1
    places = nodes("Range", np.int64(0), nodes("Squeeze", nodes.frames, [0]), np.int64(1))
    angles = nodes("Mul", nodes("Unsqueeze", nodes("Cast", places, to=nodes.FLOAT), [1]), speeds)
    cos, sin = nodes("Cos", angles), nodes("Sin", angles)

    def turn(inputs):
        return nodes("Add", nodes("Mul", inputs, cos), nodes("Mul", nodes("MatMul", inputs, pairs), sin))

    return turn


def _whisper(nodes, encoder):
    model, config = encoder.model, encoder.model.config
    frames, valid = _log_mel(nodes, encoder)
    mask = nodes("Unsqueeze", valid, [1])
    hidden = nodes.activation(nodes.conv(frames, model.conv1), "gelu")
    hidden = nodes.activation(nodes.conv(nodes("Where", mask, hidden, 0.0), model.conv2), "gelu")
    counts, nodes.frames = (_halved(nodes, _mel_counts(nodes, encoder, each)) for each in (LENGTHS, nodes.samples))
    valid = nodes.valid(counts, nodes.frames)
    positions = nodes("Slice", nodes.weight(model.embed_positions.weight), [0], nodes.frames, [0])
    hidden = nodes.in_rows(nodes("Add", _transposed(nodes, hidden), positions))
    states, bias = [hidden], _attention_bias(nodes, valid)
    for layer in model.layers:
        attention = layer.self_attn
        inputs = nodes.norm(hidden, layer.self_attn_layer_norm)
        hidden = nodes("Add", hidden, _attend(nodes, attention, inputs, bias, attention.out_proj))
        inner = nodes.linear(nodes.norm(hidden, layer.final_layer_norm), layer.fc1)
        inner = nodes.activation(inner, config.activation_function)
        hidden = nodes("Add", hidden, nodes.linear(inner, layer.fc2))
        states.append(hidden)
    states[-1] = nodes.norm(hidden, model.layer_norm)
    return states, valid


def _log_mel(nodes, encoder):
    """`WhisperEncoder._log_mel`: (clips, bins, frames) and the mask (clips, frames).

    The discrete Fourier transform is a convolution. Its kernel is computed from integers when the graph is loaded.
    """
    size, hop = encoder._window_length, encoder._hop
    length = _mel_counts(nodes, encoder, nodes.samples)
    valid = nodes.valid(_mel_counts(nodes, encoder, LENGTHS), length)
    silent = nodes("Where", nodes.valid(LENGTHS, nodes.samples), WAVES, 0.0)
    padded = nodes("Pad", silent, np.array([0, 0, 0, size // 2]))
    cut = nodes("Slice", padded, [0], [encoder.maximum_samples], [1])
    # As in torch.stft, which reflects both ends.
    reflected = nodes("Pad", cut, np.array([0, size // 2, 0, size // 2]), mode="reflect")
    places, rates = (nodes("Range", *map(np.int64, (0, most, 1))) for most in (size, size // 2 + 1))
    turns = nodes("Mod", nodes("Mul", nodes("Unsqueeze", rates, [1]), nodes("Unsqueeze", places, [0])), [size])
    angles = nodes("Mul", nodes("Cast", turns, to=nodes.FLOAT), 2 * math.pi / size)
    waves = nodes("Concat", nodes("Cos", angles), nodes("Sin", angles), axis=0)
    kernel = nodes("Unsqueeze", nodes("Mul", waves, encoder._window.numpy()), [1])
    spectrum = nodes("Conv", nodes("Unsqueeze", reflected, [1]), kernel, strides=[hop])
    spectrum = nodes("Slice", nodes("Mul", spectrum, spectrum), [0], length, [2])
    power = nodes(
        "Add", *(nodes("Slice", spectrum, [start], [start + size // 2 + 1], [1]) for start in (0, size // 2 + 1))
    )
    mel = nodes("Max", nodes("MatMul", encoder._mel.numpy(), power), 1e-10)
    mel = nodes("Mul", nodes("Log", mel), 1 / math.log(10))
    mask = nodes("Unsqueeze", valid, [1])
    loudest = nodes("ReduceMax", nodes("Where", mask, mel, -math.inf), [1, 2])
    scaled = nodes("Mul", nodes("Add", nodes("Max", mel, nodes("Sub", loudest, 8.0)), 4.0), 0.25)
    return nodes("Where", mask, scaled, 0.0), valid


def _mel_counts(nodes, encoder, samples):
    return nodes("Div", nodes("Add", samples, [encoder._hop - 1]), [encoder._hop])


def _halved(nodes, counts):
    return nodes("Div", nodes("Add", counts, [1]), [2])


def _waves(nodes, encoder):
    """`InvariantEncoder._own_scale`: (clips, samples), and the counts of samples of at least one frame."""
    mask = nodes.valid(LENGTHS, nodes.samples)
    waves = nodes("Where", mask, WAVES, 0.0)
    if encoder.normalize_wav:
        counts = nodes("Unsqueeze", nodes("Cast", LENGTHS, to=nodes.FLOAT), [1])
        mean = nodes("Div", nodes("ReduceSum", waves, [1]), counts)
        centred = nodes("Where", mask, nodes("Sub", waves, mean), 0.0)
        variance = nodes("Div", nodes("ReduceSumSquare", centred, [1]), counts)
        waves = nodes("Div", centred, nodes("Sqrt", nodes("Add", variance, NORMALISATION_FLOOR)))
    return waves, nodes("Max", LENGTHS, [encoder.minimum_samples])


def _attention_bias(nodes, valid):
    """(clips, 1, 1, frames), added to products: 0 where a frame is attended to."""
    return nodes("Where", nodes("Unsqueeze", valid, [1, 2]), 0.0, torch.finfo(torch.float32).min)


def _attend(nodes, attention, rows, bias, out, turn=None):
    """Self-attention of all families: (clips * frames, features) to the same shape."""
    width = attention.head_dim
    heads = attention.q_proj.out_features // width
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (nodes.heads(nodes.linear(rows, part), heads, width) for part in parts)
    if turn is not None:
        query, key = turn(query), turn(key)
    return nodes.linear(nodes.attend(query, key, value, bias, attention.scaling), out)


def _transposed(nodes, inputs):
    return nodes("Transpose", inputs, perm=[0, 2, 1])


# Hugging Face's model_type -> function.
ENCODERS = {
    "wav2vec2": _wav2vec2,
    "hubert": _wav2vec2,
    "wavlm": _wav2vec2,
    "data2vec-audio": _wav2vec2,
    "moonshine": _moonshine,
    "whisper": _whisper,
}
