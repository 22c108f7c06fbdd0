"""Nodes, constants and weights of an ONNX graph that is being built from the modules of a model.

Frames of all clips are kept as rows, (clips * frames, features), because a product of matrices takes the weight of a
`torch.nn.Linear` as it is stored. `Nodes.in_clips` and `Nodes.in_rows` convert to (clips, frames, features) and back.
"""

import numpy as np

from accent_plugin.bundle.config import WAVES
from accent_plugin.errors import AccentPluginError


class UnsupportedError(AccentPluginError):
    """A part of a model that no rule describes as a graph."""


class Nodes:
    """A growing graph; a call adds a node and returns the name of its output.

    Arguments
    ---------
    model : torch.nn.Module
        The owner of all weights.
    """

    # ONNX's numbers of float32 and float64.
    FLOAT, DOUBLE = 1, 11

    def __init__(self, model):
        self.made = []
        self._keys = {id(value): key for key, value in model.state_dict(keep_vars=True).items()}
        self._weights, self._constants = {}, {}
        self.clips = self("Shape", WAVES, start=0, end=1)
        self.samples = self("Shape", WAVES, start=1, end=2)
        # Set by the encoder: (1,) int64, the frames of the longest clip.
        self.frames = None

    def __call__(self, kind, *inputs, output=None, **attributes):
        """Add a node.

        Arguments
        ---------
        kind : str
            ONNX's name of the operator.
        *inputs : str, float, list of int or np.ndarray
            Names of earlier outputs, or constants: a float is float32, a list is int64.
        output : str
            None makes a name.
        **attributes
            Attributes of the operator.
        """
        import onnx

        names = [self._name(each) for each in inputs]
        output = output or f"{kind}_{len(self.made)}"
        self.made.append(onnx.helper.make_node(kind, names, [output], **attributes))
        return output

    def _name(self, value):
        if isinstance(value, str):
            return value
        array = np.asarray(value, dtype=np.float32 if isinstance(value, float) else None)
        key = array.dtype.str, array.shape, array.tobytes()
        return self._constants.setdefault(key, (f"constant_{len(self._constants)}", array))[0]

    def constants(self):
        """List the constants as onnx.TensorProto."""
        import onnx

        return [onnx.numpy_helper.from_array(array, name) for name, array in self._constants.values()]

    def weights(self):
        """List the weights in use as (key in the state dict, torch.Tensor)."""
        return list(self._weights.items())

    def weight(self, tensor):
        """Return the name of a parameter or persistent buffer of the model; its key in the state dict."""
        key = self._keys[id(tensor)]
        self._weights[key] = tensor
        return key

    def linear(self, rows, module):
        """`torch.nn.Linear` on (rows, features)."""
        bias = [] if module.bias is None else [self.weight(module.bias)]
        return self("Gemm", rows, self.weight(module.weight), *bias, transB=1)

    def conv(self, inputs, module, weight=None, pads=None):
        """`torch.nn.Conv1d` on (clips, channels, time); ``weight`` and ``pads`` replace the module's."""
        bias = [] if module.bias is None else [self.weight(module.bias)]
        if pads is None:
            pads = [module.padding[0]] * 2
        weight = weight or self.weight(module.weight)
        return self(
            "Conv", inputs, weight, *bias, kernel_shape=module.kernel_size, strides=module.stride, pads=pads,
            dilations=module.dilation, group=module.groups,
        )  # fmt: skip

    def norm(self, inputs, module):
        """`torch.nn.LayerNorm` over the last dimension."""
        if len(module.normalized_shape) != 1:
            raise UnsupportedError("a layer norm covers several dimensions")
        if module.weight is None:
            return self.standardise(inputs, module.normalized_shape[0], module.eps)
        bias = [] if module.bias is None else [self.weight(module.bias)]
        return self("LayerNormalization", inputs, self.weight(module.weight), *bias, axis=-1, epsilon=module.eps)

    def standardise(self, inputs, width, epsilon=1e-5):
        """Layer norm without parameters over the last dimension, of `width` features."""
        return self("LayerNormalization", inputs, np.ones(width, np.float32), axis=-1, epsilon=epsilon)

    def activation(self, inputs, name):
        """Apply an activation by Hugging Face's name."""
        if name not in _ACTIVATIONS:
            raise UnsupportedError(f"the activation is {name!r}; there are rules for {', '.join(_ACTIVATIONS)}")
        return self(_ACTIVATIONS[name], inputs)

    def valid(self, counts, length):
        """`accent_plugin.encoder.masking.valid_frames`: (clips,) and (1,) int64 -> (clips, length) bool."""
        places = self("Range", np.int64(0), self("Squeeze", length, [0]), np.int64(1))
        return self("Less", places, self("Unsqueeze", counts, [1]))

    def convolved(self, counts, kernel, stride):
        """Lengths in int64 after a convolution without padding."""
        return self("Add", self("Div", self("Sub", counts, [kernel]), [stride]), [1])

    def group_norm(self, inputs, module, valid):
        """`accent_plugin.encoder.masking.masked_group_norm` of (clips, channels, time) and (clips, time)."""
        groups, width = module.num_groups, module.num_channels // module.num_groups
        grouped = self("Reshape", inputs, [0, groups, width, -1])
        mask = self("Unsqueeze", valid, [1, 2])
        count = self("Mul", self("ReduceSum", self("Cast", mask, to=self.FLOAT), [3]), float(width))
        mean = self("Div", self("ReduceSum", self("Where", mask, grouped, 0.0), [2, 3]), count)
        centred = self("Where", mask, self("Sub", grouped, mean), 0.0)
        variance = self("Div", self("ReduceSumSquare", centred, [2, 3]), count)
        normed = self("Div", centred, self("Sqrt", self("Add", variance, float(module.eps))))
        scale, shift = (
            self("Reshape", self.weight(each), [1, groups, width, 1]) for each in (module.weight, module.bias)
        )
        scaled = self("Add", self("Mul", normed, scale), shift)
        return self("Reshape", scaled, [0, module.num_channels, -1])

    def in_clips(self, rows):
        """(clips * frames, features) -> (clips, frames, features)."""
        return self("Reshape", rows, self("Concat", self.clips, self.frames, [-1], axis=0))

    def in_rows(self, frames):
        """(clips, frames, features) -> (clips * frames, features)."""
        return self("Reshape", frames, self("Concat", self("Mul", self.clips, self.frames), [-1], axis=0))

    def heads(self, rows, count, width):
        """(clips * frames, heads * width) -> (clips, heads, frames, width)."""
        split = self("Reshape", rows, self("Concat", self.clips, self.frames, [count, width], axis=0))
        return self("Transpose", split, perm=[0, 2, 1, 3])

    def attend(self, query, key, value, bias, scaling):
        """Attention of (clips, heads, frames, width) with a bias that is added to the products; returns rows."""
        products = self("MatMul", self("Mul", query, float(scaling)), self("Transpose", key, perm=[0, 1, 3, 2]))
        weights = self("Softmax", self("Add", products, bias), axis=-1)
        mixed = self("Transpose", self("MatMul", weights, value), perm=[0, 2, 1, 3])
        rows = self("Mul", self.clips, self.frames)
        return self("Reshape", mixed, self("Concat", rows, [-1], axis=0))


# Hugging Face's name -> ONNX's operator.
_ACTIVATIONS = {"gelu": "Gelu", "relu": "Relu"}
