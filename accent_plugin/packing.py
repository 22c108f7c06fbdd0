"""Matrix products with fixed weights on a CPU, in oneDNN's memory layout.

A product first copies its weights to a layout that suits the processor's caches. Here, this happens once. In fp32, it
also replaces MKL, which is slower than oneDNN on processors of other makers.
"""

import torch
from torch import nn

# The layout is chosen for this many rows, and is fast for any number. Four seconds of speech are 200 frames.
_ROWS = 200


def is_available(kind=torch.float32):
    """Whether packed products of a `torch.dtype` work on this CPU, and are worthwhile: measured with AVX-512."""
    # In float16, oneDNN refuses on many processors.
    if kind not in (torch.float32, torch.bfloat16):
        return False
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def pack(weight):
    """Pack a (features out, features in) torch.Tensor; only `multiply` takes the result."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach().clone(), _ROWS)


def multiply(rows, packed, bias=None):
    """Multiply rows with a packed weight, without gradients.

    Arguments
    ---------
    rows : (..., features in) torch.Tensor
        Converted to the type of the weight.
    packed : torch.Tensor
        From `pack`.
    bias : (features out,) torch.Tensor
        In the type of the weight, or None.

    Returns
    -------
    (..., features out) torch.Tensor
    """
    return torch.ops.mkldnn._linear_pointwise(rows.to(packed.dtype), packed, bias, "none", [], "")


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU, without its plain weight.

    Arguments
    ---------
    linear : torch.nn.Linear
    kind : torch.dtype
        Of the weight and of the output.
    """

    def __init__(self, linear, kind):
        super().__init__()
        # No buffer, because a packed tensor cannot be copied or moved like others.
        self._packed = pack(linear.weight.to(kind))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(kind), requires_grad=False)

    @property
    def dtype(self):
        """Of the weight."""
        return self._packed.dtype

    def forward(self, inputs):
        """Map (..., features in) torch.Tensor to (..., features out)."""
        return multiply(inputs, self._packed, self.bias)
