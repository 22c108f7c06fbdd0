"""Dropout, attention and long convolutions for a CPU, where PyTorch's take longer than matrix products.

On a CPU, `torch.nn.functional.dropout` draws numbers one by one in a single thread, attention with dropout falls back
to fp32, and a convolution with a long kernel is slow, above all in the backward pass. This module draws 16 bits per
element from a generator that is seeded from PyTorch's, so `torch.manual_seed` and checkpoints still control the noise.
The distribution is PyTorch's, with the probability rounded to a multiple of 2^-16; the random numbers differ. Long
convolutions are computed in the frequency domain in training. Short clips in bf16 use this attention in evaluation,
too. On other devices, and while a model is compiled or traced, PyTorch's own functions run, with masks and shapes that
its fused kernels accept.
"""

import functools

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

# In frames. wav2vec 2.0's positional convolution has 128.
_LONG = 64


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
    # PyTorch's kernel is slow in bf16 as long as the products fit the cache.
    short = query.dtype == torch.bfloat16 and query.shape[2] <= _SHORT
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


def _convolve_long(convolve, padding, groups, inputs, weight, bias):
    """Convolve (batch, channels, frames); in training on a CPU by spectra, otherwise with torch's `convolve`.

    In blocks of about the kernel's length, products of spectra are an eighth of the arithmetic.
    """
    if not (devices.takes_cpu_path(inputs) and torch.is_grad_enabled() and weight.requires_grad):
        return convolve(inputs, weight, bias)
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else inputs.dtype
    kernel = weight.shape[-1]
    frames = inputs.shape[-1] + 2 * padding - kernel + 1
    blocks = max(1, round(frames / kernel))
    hop = -(-frames // blocks)
    with torch.autocast("cpu", enabled=False):
        spare = blocks * hop - frames
        padded = nn.functional.pad(inputs.transpose(1, 2).float(), (0, 0, padding, padding + spare))
        outputs = _SpectralProduct.apply(padded, weight.float(), blocks, hop, groups)[:, :frames]
        return (outputs if bias is None else outputs + bias).to(kind).transpose(1, 2)


class _SpectralProduct(torch.autograd.Function):
    """Valid cross-correlation over time, by products of the spectra of overlapping blocks (overlap-save).

    Spectra are computed as matrix products with sines and cosines: their frequencies then come first in memory, as the
    products over channels need them, and a block is short. Everything is in float32.
    """

    @staticmethod
    def forward(context, padded, weight, blocks, hop, groups):
        """Convolve (batch, blocks * hop + kernel - 1, channels) to (batch, blocks * hop, outputs).

        The weight is that of an nn.Conv1d: (outputs, channels / groups, kernel).
        """
        batch, _, channels = padded.shape
        outputs, own, kernel = weight.shape
        size = hop + kernel - 1
        analysis, synthesis = _waves(size)
        windows = padded.unfold(1, size, hop).transpose(2, 3).reshape(batch * blocks, size, channels)
        spectra = _by_frequency(analysis @ windows, groups)
        kernels = (analysis[:, :kernel] @ weight.reshape(-1, kernel).T).view(2, -1, outputs // groups, own)
        # Times the complex conjugate of the kernel. Real and imaginary parts of the clips are rows below each other.
        products, crossed = (spectra @ part.mT for part in kernels)
        half = batch * blocks
        products[:, :half] += crossed[:, half:]
        products[:, half:] -= crossed[:, :half]
        context.save_for_backward(spectra, kernels)
        context.sizes = blocks, hop, groups, kernel, size, padded.shape, weight.shape
        return (synthesis[:hop] @ _by_block(products, groups)).view(batch, blocks * hop, outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):
        """Gradients of the padded input and of the weight."""
        spectra, kernels = context.saved_tensors
        blocks, hop, groups, kernel, size, shape, weight_shape = context.sizes
        analysis, synthesis = _waves(size)
        half = gradient.shape[0] * blocks
        gradient = _by_frequency(synthesis[:hop].T @ gradient.reshape(half, hop, -1), groups)
        crossed = torch.cat([-gradient[:, half:], gradient[:, :half]], dim=1)
        of_weight = torch.stack([gradient.mT @ spectra, crossed.mT @ spectra]).view(len(analysis), -1)
        of_weight = (of_weight.T @ analysis[:, :kernel]).view(weight_shape)
        if not context.needs_input_grad[0]:
            return None, of_weight, None, None, None
        of_spectra = torch.baddbmm(gradient @ kernels[0], crossed, kernels[1])
        of_windows = (analysis.T @ _by_block(of_spectra, groups)).view(shape[0], blocks, size, shape[2])
        of_input = of_windows.new_zeros(shape)
        for block in range(blocks):
            of_input[:, block * hop : block * hop + size] += of_windows[:, block]
        return of_input, of_weight, None, None, None


@functools.lru_cache(maxsize=64)
def _waves(size):
    """Matrices of the Fourier transform of `size` real numbers to real and imaginary parts, and of its inverse.

    The first is (2 * frequencies, size), real parts first, the second (size, 2 * frequencies); both are float32.
    """
    frequencies = torch.arange(size // 2 + 1)
    # Reduced as integers, for precision.
    angles = (frequencies[:, None] * torch.arange(size) % size).double() * (2 * torch.pi / size)
    weight = torch.full((len(frequencies), 1), 2.0 / size)
    weight[0] = 1 / size
    if size % 2 == 0:
        weight[-1] = 1 / size
    waves = torch.stack([angles.cos(), -angles.sin()])
    return waves.flatten(0, 1).float(), (waves * weight).flatten(0, 1).T.float()


def _by_frequency(spectra, groups):
    """(blocks, 2 * frequencies, channels) -> (frequencies * groups, 2 * blocks, channels / groups)."""
    blocks, frequencies, channels = spectra.shape
    split = spectra.view(blocks, 2, frequencies // 2, groups, channels // groups)
    return split.permute(2, 3, 1, 0, 4).reshape(-1, 2 * blocks, channels // groups)


def _by_block(spectra, groups):
    """Invert `_by_frequency`."""
    _, blocks, channels = spectra.shape
    split = spectra.view(-1, groups, 2, blocks // 2, channels)
    return split.permute(3, 2, 0, 1, 4).reshape(blocks // 2, -1, groups * channels)


def use_cpu_kernels(model, attention=True):
    """Make a Hugging Face model use this module's dropout and long convolutions and, with `attention`, `attend`."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout
        elif isinstance(module, nn.Conv1d) and module.kernel_size[0] >= _LONG and module.stride == (1,):
            convolve = functools.partial(_convolve_long, module._conv_forward, module.padding[0], module.groups)
            module._conv_forward = convolve
    if attention and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
