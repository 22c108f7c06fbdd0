"""Dropout and attention for training on a processor, where PyTorch's take more time than the matrix products.

There `torch.nn.functional.dropout` draws one number after the other, in one thread, and attention with dropout falls
back to a path that works in fp32. Here the noise is made of 16 bits for each element, from a generator that is itself
seeded from PyTorch's: `torch.manual_seed` and checkpoints decide about it as before. The distribution is PyTorch's, but
that a probability is rounded to a multiple of 2^-16; the numbers drawn are others. On other devices, in evaluation and
while a model is compiled or traced, PyTorch's own are called, on other devices with masks and shapes that its fused
kernels take.
"""

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from accent_plugin import devices

# What an encoder's configuration calls the attention below.
ATTENTION = "accent_plugin"


_LEVELS = 2**16


# Frames; some ten seconds.
_SHORT = 512


def dropout(inputs, p=0.5, training=True):
    """Zero each element with probability `p` and scale the others by 1 / (1 - p); as torch.nn.functional.dropout.

    Arguments
    ---------
    inputs : torch.Tensor
        Of any shape.
    p : float
    training : bool
        False returns the inputs.

    Returns
    -------
    torch.Tensor
    """
    threshold = round(p * _LEVELS)
    # At the ends, and nearer to them than the noise is fine, there is nothing to gain.
    if not (training and devices.takes_cpu_path(inputs) and 0 < threshold < _LEVELS):
        return nn.functional.dropout(inputs, p, training)
    return inputs * _noise(inputs, threshold)


def _noise(like, threshold):
    """0 in `threshold` of 2^16 cases, and otherwise what brings the mean to 1."""
    seed = int(torch.randint(2**63 - 1, ()))
    # SFC64 draws 64 bits in the time that PyTorch's Mersenne twister takes for a few.
    generator = np.random.Generator(np.random.SFC64(seed))
    words = generator.integers(2**64 - 1, size=-(-like.numel() // 4), dtype=np.uint64, endpoint=True)
    bits = torch.from_numpy(words.view(np.int16))[: like.numel()].view(like.shape)
    noise = torch.empty(like.shape, dtype=like.dtype)
    # Written in the inputs' type at once: products of two types take PyTorch ten times longer.
    torch.ge(bits, threshold - _LEVELS // 2, out=noise)
    return noise.mul_(_LEVELS / (_LEVELS - threshold))


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` by way of `dropout`."""

    def forward(self, inputs):
        """Drop elements of a tensor of any shape."""
        return dropout(inputs, self.p, self.training)


def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **keywords):
    """Scaled dot-product attention as Hugging Face's models call it; on a processor fast in training, too.

    Arguments
    ---------
    module : torch.nn.Module
        The layer that asks.
    query, key, value : (batch, heads, frames, features) torch.Tensor
    attention_mask : (batch, 1, frames or 1, frames) torch.Tensor
        True where a frame is attended to; None for everywhere.
    dropout : float
        Probability; Hugging Face gives 0 in evaluation.
    scaling : float
        Of the products; None for 1 / sqrt(features).
    **keywords
        Of `sdpa_attention_forward`.

    Returns
    -------
    output : (batch, frames, heads, features) torch.Tensor
    weights : None
        They are not kept.
    """
    # PyTorch's backward pass in bf16 is slow until the products become too large for the cache.
    learning = torch.is_grad_enabled() and query.requires_grad
    short = learning and query.dtype == torch.bfloat16 and query.shape[2] <= _SHORT
    if devices.takes_cpu_path(query) and (dropout or short):
        return _attend_by_products(query, key, value, attention_mask, dropout, scaling), None
    arguments = {"attention_mask": attention_mask, "dropout": dropout, "scaling": scaling, **keywords}
    if query.device.type == "cpu" and devices.cpu_paths:
        return sdpa_attention_forward(module, query, key, value, **arguments)
    return _attend_on_accelerator(module, query, key, value, **arguments)


# But for cuDNN's, which PyTorch prefers on an H100: it is prepared anew, for some 30 ms, for each shape of a batch.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


# Features that a fused kernel wants a multiple of. Moonshine tiny has 36.
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
        # Added, not filled in: in the backward pass that costs nothing, as masked weights are zero anyway.
        scores += torch.zeros(mask.shape, dtype=scores.dtype).masked_fill_(~mask, torch.finfo(scores.dtype).min)
    weights = dropout(scores.softmax(-1), p)
    return (weights @ value).transpose(1, 2).contiguous()


def make_mask(*, attention_mask=None, allow_is_bidirectional_skip=False, **keywords):
    """Hugging Face's `sdpa_mask`, but that on an accelerator it waits for no look at whether anything is padded.

    Returns
    -------
    (batch, 1, frames, frames) torch.Tensor
        True where a frame is attended to; None where nothing is masked. On an accelerator (batch, 1, 1, frames) where
        all frames attend to the same, so that each layer converts one row instead of all.
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
    """Let a Hugging Face model use `Dropout` and, where it would take PyTorch's attention, `attend`; in place.

    Arguments
    ---------
    model : transformers.PreTrainedModel
    attention : bool
        False leaves the attention as it is.
    """
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout
    if attention and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
