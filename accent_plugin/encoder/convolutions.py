"""wav2vec 2.0's convolutions on the waveform; frozen ones are computed as matrix products.

torch stores (channels, time) and copies the input and output of each layer to another layout and back. On a CPU, this
takes longer than the arithmetic. This module stores the channels of a frame next to each other. The windows of a
convolution with stride s are then rows of memory, s frames a row, and a layer needs one matrix product for each stride
of its kernel.

On a CPU, a clip passes through all layers in blocks that stay in the cache, and its padding is skipped. The group
normalisation of the first layer needs the mean and variance of its output over time. Both follow from the mean and
covariance of the ten samples under the kernel, so the normalisation is folded into a kernel for each clip.

On other devices, all clips pass through a layer at once. The normalisation is also folded into the kernels, but its
variance is measured on a first product, which needs no float64. cuDNN is avoided because it prepares new kernels for
each new batch length.
"""

import torch
from torch import nn

from accent_plugin import devices, packing
from accent_plugin.encoder.masking import MaskedGroupNorm, valid_frames

# Output frames per block (2 s). Larger blocks do not fit the cache; smaller ones make inefficient products.
_BLOCK_FRAMES = 100

# Numbers of 16 bits in 16 bytes.
_ALIGNED = 8


class WaveformConvolutions(nn.Module):
    """Replaces Hugging Face's feature encoder (wav2vec 2.0, HuBERT, WavLM, data2vec); same state-dict keys.

    Arguments
    ---------
    conv_layers : torch.nn.ModuleList
        The layers of Hugging Face's model.
    config : transformers.PretrainedConfig
    """

    # False uses torch's convolutions on every device, for comparison.
    as_products = True

    def __init__(self, conv_layers, config):
        super().__init__()
        self.conv_layers = conv_layers
        norms = [getattr(layer, "layer_norm", None) for layer in conv_layers]
        # Only a norm over single channels can be folded. No known model has another.
        channelwise = all(norm.num_groups == norm.num_channels for norm in norms if isinstance(norm, nn.GroupNorm))
        self._has_products = config.feat_extract_activation == "gelu" and channelwise
        self._matrices = {}

    def __getstate__(self):
        # A packed kernel cannot be copied.
        return {**super().__getstate__(), "_matrices": {}}

    def forward(self, inputs):
        """Convolve.

        Arguments
        ---------
        inputs : (batch, samples) torch.Tensor, or tuple
            16 kHz. For a padded batch, a pair of this tensor and the sample counts, (batch,) torch.Tensor of int64:
            Hugging Face's models pass on one argument.

        Returns
        -------
        (batch, channels, frames) torch.Tensor
            Padded frames are finite but meaningless.
        """
        wavs, counts = inputs if isinstance(inputs, tuple) else (inputs, None)
        learning = torch.is_grad_enabled() and (wavs.requires_grad or any(p.requires_grad for p in self.parameters()))
        if learning or torch.compiler.is_compiling() or not (self._has_products and self.as_products):
            return self._convolve_with_torch(wavs, counts)
        device = wavs.device.type
        casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        kind = torch.get_autocast_dtype(device) if casts else torch.float32
        if not devices.takes_cpu_path(wavs):
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return self._convolve_batch(wavs.float(), counts, kind).transpose(1, 2)
        counts = [wavs.shape[1]] * len(wavs) if counts is None else counts.tolist()
        frames = self._span(wavs.shape[1])
        output = torch.zeros(len(wavs), frames, self.conv_layers[-1].conv.out_channels, dtype=kind)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for clip, count, row in zip(wavs.float(), counts, output, strict=True):
                self._convolve(clip[:count], row[: self._span(count)])
        return output.transpose(1, 2)

    def _convolve_with_torch(self, wavs, counts):
        first, *later = self.conv_layers
        hidden = wavs[:, None]
        if counts is None or not isinstance(getattr(first, "layer_norm", None), MaskedGroupNorm):
            hidden = first(hidden)
        else:
            hidden = first.conv(hidden)
            counts = (counts - first.conv.kernel_size[0]) // first.conv.stride[0] + 1
            hidden = first.activation(first.layer_norm(hidden, valid_frames(counts, hidden.shape[-1])))
        for layer in later:
            hidden = layer(hidden)
        return hidden

    def _convolve_batch(self, wavs, counts, kind):
        """Map (batch, samples) to (batch, frames, channels), all clips at once, without waiting for the device."""
        first, *later = self.conv_layers
        hidden = self._convolve_first(wavs, counts, kind)
        for layer, (products, bias) in zip([first, *later], [(None, None), *self._later_kernels(kind)], strict=True):
            if products is not None:
                hidden = _slide(hidden, products, bias, layer.conv.stride[0])
            norm = getattr(layer, "layer_norm", None)
            if isinstance(norm, nn.LayerNorm):
                own = norm.normalized_shape, norm.weight.to(kind), norm.bias.to(kind), norm.eps
                hidden = nn.functional.layer_norm(hidden, *own)
            torch.ops.aten.gelu_(hidden)
        return hidden

    def _convolve_first(self, wavs, counts, kind):
        """Apply the first layer and its group normalisation to a batch; returns (batch, frames, channels).

        The windows are centred and zero in the padding, so the products have zero mean, and their norm gives the
        standard deviation. A second product with scaled kernels is faster than scaling the first product.
        """
        layer = self.conv_layers[0]
        norm = getattr(layer, "layer_norm", None)
        kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
        windows, weight = wavs.unfold(1, kernel, stride), layer.conv.weight.squeeze(1)
        # Padded with zeros: tensor cores need rows of a multiple of 16 bytes.
        wider = (0, -kernel % _ALIGNED)
        weight = nn.functional.pad(weight, wider)
        if not isinstance(norm, nn.GroupNorm):
            bias = None if layer.conv.bias is None else layer.conv.bias.to(kind)
            return nn.functional.linear(nn.functional.pad(windows, wider).to(kind), weight.to(kind), bias)
        counts = torch.full((len(wavs),), wavs.shape[1], device=wavs.device) if counts is None else counts
        counts = ((counts - kernel) // stride + 1).view(-1, 1, 1)
        padding = torch.arange(windows.shape[1], device=wavs.device).view(1, -1, 1) >= counts
        mean = windows.masked_fill(padding, 0.0).sum(dim=1, keepdim=True) / counts
        centred = nn.functional.pad((windows - mean).masked_fill_(padding, 0.0), wider).to(kind)
        deviation = torch.linalg.vector_norm(centred @ weight.T.to(kind), dim=1, keepdim=True, dtype=torch.float32)
        scale = norm.weight * torch.rsqrt(deviation.square() / counts + norm.eps)
        # The normalisation cancels the bias of the convolution, if it has one.
        return torch.baddbmm(norm.bias.to(kind), centred, (weight.T * scale).to(kind))

    def _span(self, samples):
        """Number of frames for a number of samples."""
        for layer in self.conv_layers:
            samples = (samples - layer.conv.kernel_size[0]) // layer.conv.stride[0] + 1
        return samples

    def _convolve(self, clip, output):
        """Fill the (frames, channels) output of a (samples,) clip, block by block."""
        hop, reach = 1, 1
        for layer in reversed(self.conv_layers):
            kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
            reach, hop = (reach - 1) * stride + kernel, hop * stride
        first = self._first_kernel(clip, output.dtype)
        for start in range(0, len(output), _BLOCK_FRAMES):
            rows = output[start : start + _BLOCK_FRAMES]
            samples = clip[start * hop : (start + len(rows) - 1) * hop + reach].to(output.dtype)
            hidden = samples.unsqueeze(1)
            kernels = first + self._later_kernels(output.dtype, packed=packing.is_available(output.dtype))
            for layer, (products, bias) in zip(self.conv_layers, kernels, strict=True):
                hidden = _slide(hidden, products, bias, layer.conv.stride[0])
                norm = getattr(layer, "layer_norm", None)
                if isinstance(norm, nn.LayerNorm):
                    hidden = nn.functional.layer_norm(hidden, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
                # In place: allocating memory costs more than the function.
                torch.ops.aten.gelu_(hidden)
            rows.copy_(hidden)

    def _first_kernel(self, clip, kind):
        """[(products, bias)] of the first layer, with the normalisation of the clip folded in if there is one."""
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
        # The normalisation cancels the bias of the convolution, if it has one.
        bias = norm.bias - scale * (weight @ mean)
        return [([(weight * scale.unsqueeze(1)).to(kind)], bias.to(kind))]

    def _later_kernels(self, kind, packed=False):
        """[(products, bias)] of the other layers, cached and on demand packed while the weights do not change."""
        convolutions = [layer.conv for layer in self.conv_layers][1:]
        parameters = [parameter for conv in convolutions for parameter in conv.parameters()]
        if any(parameter.requires_grad for parameter in parameters):
            return [_products(conv, kind) for conv in convolutions]
        state = _versions(parameters)
        if self._matrices.get((kind, packed), (None,))[0] != state:
            kernels = [_products(conv, kind) for conv in convolutions]
            if packed:
                kernels = [([packing.pack(torch.cat(parts, dim=1))], bias) for parts, bias in kernels]
            self._matrices[kind, packed] = state, kernels
        return self._matrices[kind, packed][1]


class PositionalConvolution(nn.Module):
    """Replaces the positional convolution of wav2vec 2.0, HuBERT and WavLM; same state-dict keys.

    Its kernels are so long (128 frames) that Fourier transforms are faster on a CPU, unless gradients are needed.
    Blocks of frames are transformed, and a matrix product per frequency mixes the channels of a group (overlap-save).

    Arguments
    ---------
    embedding : torch.nn.Module
        Hugging Face's module, with the layers `conv`, `padding` and `activation`.
    """

    def __init__(self, embedding):
        super().__init__()
        self.conv, self.padding, self.activation = embedding.conv, embedding.padding, embedding.activation
        self._spectrum = None, None

    def __getstate__(self):
        return {**super().__getstate__(), "_spectrum": (None, None)}

    def forward(self, frames):
        """Convolve (batch, frames, features); returns the same shape."""
        learning = torch.is_grad_enabled() and (frames.requires_grad or self._is_trained())
        if learning or not devices.takes_cpu_path(frames):
            return self.activation(self.padding(self.conv(frames.transpose(1, 2)))).transpose(1, 2)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return self.activation(self._convolve(frames))

    def _convolve(self, frames):
        batch, length, channels = frames.shape
        groups, kernel, before = self.conv.groups, self.conv.kernel_size[0], self.conv.padding[0]
        size = _transform_size(kernel)
        step = size - kernel + 1
        blocks = -(-length // step)
        after = (blocks - 1) * step + size - before - length
        rows = nn.functional.pad(frames.float().transpose(1, 2), (before, after)).unfold(2, size, step)
        spectrum = torch.fft.rfft(rows).view(batch, groups, -1, blocks, size // 2 + 1)
        spectrum = spectrum.permute(4, 1, 0, 3, 2).flatten(2, 3).flatten(0, 1)
        mixed = torch.bmm(spectrum, self._kernel_spectrum(size))
        mixed = mixed.view(-1, groups, batch, blocks, channels // groups).permute(2, 3, 1, 4, 0)
        rows = torch.fft.irfft(mixed.flatten(2, 3), n=size)[..., :step]
        output = rows.transpose(2, 3).reshape(batch, blocks * step, channels)[:, :length]
        return (output + self.conv.bias).to(frames.dtype)

    def _is_trained(self):
        return any(parameter.requires_grad for parameter in self.conv.parameters())

    def _kernel_spectrum(self, size):
        """(frequencies * groups, channels in, channels out) of a group; cached while frozen weights do not change."""
        state = None if self._is_trained() else _versions(self.conv.parameters())
        if state is None or self._spectrum[0] != state:
            weight = torch.fft.rfft(self.conv.weight.float(), n=size).conj()
            weight = weight.view(self.conv.groups, -1, *weight.shape[1:]).permute(3, 0, 2, 1)
            spectrum = weight.flatten(0, 1).resolve_conj().contiguous()
            if state is None:
                return spectrum
            self._spectrum = state, spectrum
        return self._spectrum[1]


class PositionalConvolutions(nn.Module):
    """Replaces data2vec-audio's stack of positional convolutions; same state-dict keys.

    Each convolution would leak padding into the next. Hugging Face's encoder sets padded frames to zero before it calls
    the stack and passes no mask, so padding is recognised by its zeros.

    Arguments
    ---------
    layers : torch.nn.ModuleList
    """

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, frames):
        """Convolve (batch, frames, features); returns the same shape."""
        padding = (frames == 0).all(dim=-1).unsqueeze(1)
        frames = frames.transpose(1, 2)
        for layer in self.layers:
            frames = layer(frames.masked_fill(padding, 0.0))
        return frames.transpose(1, 2)


def _versions(parameters):
    """Return a list that changes when the parameters do."""
    return [(p.data_ptr(), None if p.is_inference() else p._version) for p in parameters]


def _transform_size(kernel):
    """Samples of a Fourier transform: a power of two that is at least twice as long as the kernel."""
    return 1 << (2 * kernel - 1).bit_length()


def _products(conv, kind):
    """Return a (channels out, stride * channels in) matrix per stride of a convolution's kernel, and its bias."""
    weight = conv.weight.detach().to(kind).permute(0, 2, 1)
    stride = conv.stride[0]
    # Contiguous: otherwise torch copies the matrix for each product.
    parts = [weight[:, at : at + stride].flatten(1).contiguous() for at in range(0, weight.shape[1], stride)]
    return parts, None if conv.bias is None else conv.bias.detach().to(kind)


def _slide(frames, products, bias, stride):
    """Convolve contiguous (frames, channels) or (batch, frames, channels) with matrices of `_products`, or packed."""
    *batch, length, channels = frames.shape
    kernel = sum(part.shape[1] for part in products) // channels
    count = (length - kernel) // stride + 1
    multiply, add_product = (torch.bmm, torch.baddbmm) if batch else (torch.mm, torch.addmm)
    output = None
    for number, part in enumerate(products):
        # Rows start one stride apart and do not overlap, except in the first layer and with a packed kernel.
        rows = frames.as_strided(
            (*batch, count, part.shape[1]),
            (*frames.stride()[:-2], stride * channels, 1),
            frames.storage_offset() + number * stride * channels,
        )
        if part.is_mkldnn:
            return packing.multiply(rows, part, bias)
        matrices = part.T.expand(*batch, -1, -1)
        if output is not None:
            add_product(output, rows, matrices, out=output)
        elif bias is None:
            output = multiply(rows, matrices)
        else:
            output = add_product(bias, rows, matrices)
    return output
