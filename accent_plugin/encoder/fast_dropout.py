"""Dropout and attention for training on a CPU, where PyTorch's versions take longer than the matrix products.

On a CPU, `torch.nn.functional.dropout` draws numbers one by one in a single thread, and attention with dropout falls
back to fp32. This module draws 16 bits per element from a generator that is seeded from PyTorch's, so
`torch.manual_seed` and checkpoints still control the noise. The distribution is PyTorch's, with the probability rounded
to a multiple of 2^-16; the random numbers differ. In evaluation, on other devices, and while a model is compiled or
traced, PyTorch's own functions run, on other devices with masks and shapes that its fused kernels accept.
"""

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from accent_plugin import devices

# Name of the attention below in an encoder's configuration.
ATTENTION = "accent_plugin"

_LEVELS = 2**16

# In frames, about ten seconds.
_SHORT = 512


def dropout(inputs, p=0.5, training=True):
    """Zero elements with probability `p` and scale the others by 1 / (1 - p), like torch.nn.functional.dropout."""
    threshold = round(p * _LEVELS)
    # PyTorch handles 0, 1, and probabilities too close to them for 16 bits.
    if not (training and devices.takes_cpu_path(inputs) and 0 < threshold < _LEVELS):
        return nn.functional.dropout(inputs, p, training)
    return inputs * _noise(inputs, threshold)


def _noise(like, threshold):
    """Noise of mean 1 that is 0 with probability `threshold` / 2^16."""
    seed = int(torch.randint(2**63 - 1, ()))
    # SFC64 draws 64 bits in the time that PyTorch's Mersenne twister takes for a few.
    generator = np.random.Generator(np.random.SFC64(seed))
    words = generator.integers(2**64 - 1, size=-(-like.numel() // 4), dtype=np.uint64, endpoint=True)
    bits = torch.from_numpy(words.view(np.int16))[: like.numel()].view(like.shape)
    noise = torch.empty(like.shape, dtype=like.dtype)
    # Written in the type of the inputs: products of mixed types take PyTorch ten times longer.
    torch.ge(bits, threshold - _LEVELS // 2, out=noise)
    return noise.mul_(_LEVELS / (_LEVELS - threshold))


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` that calls `dropout`."""

    def forward(self, inputs):
        """Drop elements of a tensor of any shape."""
        return dropout(inputs, self.p, self.training)


def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **keywords):
    """Scaled dot-product attention with Hugging Face's interface; also fast in training on a CPU.

    Arguments
    ---------
    module : torch.nn.Module
        The layer that calls this function.
    query, key, value : (batch, heads, frames, features) torch.Tensor
    attention_mask : (batch, 1, frames or 1, frames) torch.Tensor
        True where a frame is attended to; None attends to all frames.
    dropout : float
        Probability; Hugging Face passes 0 in evaluation.
    scaling : float
        Factor of the products; None for 1 / sqrt(features).
    **keywords
        Passed to `sdpa_attention_forward`.

    Returns
    -------
    output : (batch, frames, heads, features) torch.Tensor
    weights : None
    """
    # PyTorch's backward pass in bf16 is slow as long as the products fit the cache.
    learning = torch.is_grad_enabled() and query.requires_grad
    short = learning and query.dtype == torch.bfloat16 and query.shape[2] <= _SHORT
    if devices.takes_cpu_path(query) and (dropout or short):
        return _attend_by_products(query, key, value, attention_mask, dropout, scaling), None
    arguments = {"attention_mask": attention_mask, "dropout": dropout, "scaling": scaling, **keywords}
    if query.device.type == "cpu" and devices.cpu_paths:
        return sdpa_attention_forward(module, query, key, value, **arguments)
    return _attend_on_accelerator(module, query, key, value, **arguments)


# Without cuDNN's kernel, which PyTorch prefers on an H100: preparing it takes about 30 ms for each new batch shape.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# Fused kernels need a multiple of this many features. Moonshine tiny has 36 features.
_FEATURES = 8


def _attend_on_accelerator(module, query, key, value, scaling=None, **arguments):
    features = query.shape[-1]
    if missing := -features % _FEATURES:
        query, key, value = (nn.functional.pad(part, (0, missing)) for part in (query, key, value))
    scaling = features**-0.5 if scaling is None else scaling
    with sdpa_kernel(_KERNELS):
        output, weights = sdpa_attention_forward(module, query, key, value, scaling=scaling, **arguments)
    return output[..., :features], weights


def _attend_by_products(query, key, value, mask, p, scaling):
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scaling) @ key.transpose(-1, -2)
    if mask is not None:
        # Added instead of filled in: this needs no backward pass, because masked weights are zero.
        scores += torch.zeros(mask.shape, dtype=scores.dtype).masked_fill_(~mask, torch.finfo(scores.dtype).min)
    weights = dropout(scores.softmax(-1), p)
    return (weights @ value).transpose(1, 2).contiguous()


def make_mask(*, attention_mask=None, allow_is_bidirectional_skip=False, **keywords):
    """Hugging Face's `sdpa_mask`, without waiting for an accelerator to tell whether there is padding.

    Returns
    -------
    (batch, 1, frames, frames) torch.Tensor
        True where a frame is attended to; None if nothing is masked. On an accelerator, the shape is (batch, 1, 1,
        frames) if all frames attend to the same frames, so that each layer converts one row instead of all.
    """
    if attention_mask is None or (attention_mask.device.type == "cpu" and devices.cpu_paths):
        skip = allow_is_bidirectional_skip
        return sdpa_mask(attention_mask=attention_mask, allow_is_bidirectional_skip=skip, **keywords)
    if allow_is_bidirectional_skip:
        return attention_mask[:, None, None, :]
    return sdpa_mask(attention_mask=attention_mask, **keywords)


AttentionInterface.register(ATTENTION, attend)

AttentionMaskInterface.register(ATTENTION, make_mask)


def use_cpu_kernels(model, attention=True):
    """Make a Hugging Face model use `Dropout` and, with `attention`, `attend` in place of PyTorch's attention."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout
    if attention and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
