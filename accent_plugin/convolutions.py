"""wav2vec 2.0's convolutions on the waveform; on a processor, where they are not trained, as matrix products.

torch keeps (channels, time) and copies each layer's input and output into another layout and back, which takes longer
than the arithmetic. Here the channels of a frame lie next to each other from the first layer to the last, so that the
windows of a convolution with stride s are rows of memory as they stand: s frames a row, and as many products as the
kernel is strides long. A clip goes through all layers in blocks that stay in the cache, and its padding is left out.

The group normalisation of the first layer needs the mean and the variance of its output over time. Both follow from the
mean and the covariance of the ten samples under the kernel, so the normalisation is folded into the clip's own kernel.
"""

import torch
from torch import nn

from accent_plugin import devices

# Frames of output computed at a time, 2 s: larger blocks leave the cache, smaller ones make poor matrices.
_BLOCK_FRAMES = 100


class WaveformConvolutions(nn.Module):
    """Takes the place of Hugging Face's feature encoder (wav2vec 2.0, HuBERT, WavLM, data2vec); same state-dict keys.

    Arguments
    ---------
    conv_layers : torch.nn.ModuleList
        Of Hugging Face's model.
    config : transformers.PretrainedConfig
    """

    # Samples of each clip, set by the encoder around each pass; None where nothing is padded.
    counts = None

    def __init__(self, conv_layers, config):
        super().__init__()
        self.conv_layers = conv_layers
        norms = [getattr(layer, "layer_norm", None) for layer in conv_layers]
        # A norm over single channels can be folded, one over several cannot; no known model has such.
        channelwise = all(norm.num_groups == norm.num_channels for norm in norms if isinstance(norm, nn.GroupNorm))
        self._has_products = config.feat_extract_activation == "gelu" and channelwise
        self._matrices = {}

    def forward(self, wavs):
        """Convolve.

        Arguments
        ---------
        wavs : (batch, samples) torch.Tensor
            16 kHz.

        Returns
        -------
        (batch, channels, frames) torch.Tensor
            What stands in padded frames is finite and meaningless.
        """
        learning = torch.is_grad_enabled() and (wavs.requires_grad or any(p.requires_grad for p in self.parameters()))
        if learning or not devices.takes_cpu_path(wavs) or not self._has_products:
            hidden = wavs[:, None]
            for layer in self.conv_layers:
                hidden = layer(hidden)
            return hidden
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        counts = [wavs.shape[1]] * len(wavs) if self.counts is None else self.counts.tolist()
        frames = self._span(wavs.shape[1])
        output = torch.zeros(len(wavs), frames, self.conv_layers[-1].conv.out_channels, dtype=kind)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for clip, count, row in zip(wavs.float(), counts, output, strict=True):
                self._convolve(clip[:count], row[: self._span(count)])
        return output.transpose(1, 2)

    def _span(self, samples):
        """Frames of so many samples."""
        for layer in self.conv_layers:
            samples = (samples - layer.conv.kernel_size[0]) // layer.conv.stride[0] + 1
        return samples

    def _convolve(self, clip, output):
        """Fill the (frames, channels) of a (samples,) clip, block by block."""
        hop, reach = 1, 1
        for layer in reversed(self.conv_layers):
            kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
            reach, hop = (reach - 1) * stride + kernel, hop * stride
        first = self._first_kernel(clip, output.dtype)
        for start in range(0, len(output), _BLOCK_FRAMES):
            rows = output[start : start + _BLOCK_FRAMES]
            samples = clip[start * hop : (start + len(rows) - 1) * hop + reach].to(output.dtype)
            hidden = samples.unsqueeze(1)
            kernels = first + self._later_kernels(output.dtype)
            for layer, (products, bias) in zip(self.conv_layers, kernels, strict=True):
                hidden = _slide(hidden, products, bias, layer.conv.stride[0])
                norm = getattr(layer, "layer_norm", None)
                if isinstance(norm, nn.LayerNorm):
                    hidden = nn.functional.layer_norm(hidden, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
                # In place: a new piece of memory costs more than the function.
                torch.ops.aten.gelu_(hidden)
            rows.copy_(hidden)

    def _first_kernel(self, clip, kind):
        """[(products, bias)] of the first layer, with the clip's normalisation folded in where there is one."""
        layer = self.conv_layers[0]
        norm = getattr(layer, "layer_norm", None)
        if not isinstance(norm, nn.GroupNorm):
            return [_products(layer.conv, kind)]
        kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
        windows = clip.unfold(0, kernel, stride).double()
        mean = windows.mean(dim=0)
        centred = windows - mean
        weight = layer.conv.weight.squeeze(1).double()
        covariance = centred.T @ centred / len(windows)
        variance = (weight @ covariance * weight).sum(dim=1)
        scale = norm.weight * torch.rsqrt(variance + norm.eps)
        # The convolution's own bias, where it has one, is taken away again by the normalisation.
        bias = norm.bias - scale * (weight @ mean)
        return [([(weight * scale.unsqueeze(1)).to(kind)], bias.to(kind))]

    def _later_kernels(self, kind):
        """[(products, bias)] of the other layers; kept, in the form that the products need, while they stand still."""
        convolutions = [layer.conv for layer in self.conv_layers][1:]
        parameters = [parameter for conv in convolutions for parameter in conv.parameters()]
        if any(parameter.requires_grad for parameter in parameters):
            return [_products(conv, kind) for conv in convolutions]
        state = [(p.data_ptr(), None if p.is_inference() else p._version) for p in parameters]
        if self._matrices.get(kind, (None,))[0] != state:
            self._matrices[kind] = state, [_products(conv, kind) for conv in convolutions]
        return self._matrices[kind][1]


def _products(conv, kind):
    """A convolution's weight as matrices (channels out, stride times channels in), one for each stride of the kernel,
    and its bias."""
    weight = conv.weight.detach().to(kind).permute(0, 2, 1)
    stride = conv.stride[0]
    parts = [weight[:, at : at + stride].flatten(1) for at in range(0, weight.shape[1], stride)]
    return parts, None if conv.bias is None else conv.bias.detach().to(kind)


def _slide(frames, products, bias, stride):
    """Convolve (frames, channels) with matrices of `_products`."""
    channels = frames.shape[1]
    width = sum(part.shape[1] for part in products)
    count = (frames.numel() - width) // (stride * channels) + 1
    output = None
    for number, part in enumerate(products):
        # Rows begin a stride apart and are no longer than that, but for the first layer's.
        rows = frames.as_strided(
            (count, part.shape[1]), (stride * channels, 1), frames.storage_offset() + number * stride * channels
        )
        if output is not None:
            output.addmm_(rows, part.T)
        elif bias is None:
            output = rows @ part.T
        else:
            output = torch.addmm(bias, rows, part.T)
    return output
