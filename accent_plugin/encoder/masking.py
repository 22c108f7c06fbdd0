"""Masks of valid samples and frames, and group normalisation that ignores padding."""

import torch
from torch import nn

from accent_plugin import devices


def sample_counts(wavs, wav_lens=None):
    """Compute the true length of each clip of a padded batch, in samples: (batch,) torch.Tensor of int64.

    Arguments
    ---------
    wavs : (batch, samples) torch.Tensor
    wav_lens : (batch,) torch.Tensor
        Length of each clip as a fraction of the longest, as in SpeechBrain; None if nothing is padded.
    """
    if wav_lens is None:
        return torch.full((wavs.shape[0],), wavs.shape[1], device=wavs.device)
    # Apple's GPUs have no float64.
    shares = wav_lens.cpu() if wav_lens.device.type == "mps" else wav_lens
    return torch.round(shares.double() * wavs.shape[1]).long().to(wavs.device)


def valid_frames(counts, length):
    """Make a (batch, length) mask that is True in the first `counts` places of each row."""
    return torch.arange(length, device=counts.device) < counts.unsqueeze(1)


def masked_group_norm(inputs, valid, groups, weight, bias, eps):
    """Group normalisation over the valid frames only, without waiting for the device.

    Sums are computed in float32 for every input type. One tensor of the input's size is stored for the backward pass,
    and another is temporary.

    Arguments
    ---------
    inputs : (batch, channels, frames) torch.Tensor
        The result has this shape and type; its padded frames equal the bias.
    valid : (batch, frames) torch.Tensor of bool
    groups : int
    weight, bias : (channels,) torch.Tensor
    eps : float
    """
    batch, channels, frames = inputs.shape
    grouped = inputs.view(batch, groups, channels // groups, frames)
    padding = ~valid[:, None, None, :]
    count = valid.sum(dim=-1).view(batch, 1, 1, 1) * grouped.shape[2]
    mean = grouped.masked_fill(padding, 0.0).sum(dim=(2, 3), keepdim=True, dtype=torch.float32) / count
    # Squares of centred values: with a large mean, uncentred squares would lose all precision.
    centred = (grouped - mean.to(grouped.dtype)).masked_fill_(padding, 0.0)
    norm = torch.linalg.vector_norm(centred, dim=(2, 3), keepdim=True, dtype=torch.float32)
    scale = weight.view(1, groups, -1, 1) * torch.rsqrt(norm.square() / count + eps)
    shift = bias.view(1, groups, -1, 1).to(grouped.dtype)
    return torch.addcmul(shift, centred, scale.to(grouped.dtype)).view(batch, channels, frames)


class MaskedGroupNorm(nn.GroupNorm):
    """Group normalisation over the valid frames only, with sums in float32; same parameters and keys as torch's."""

    def forward(self, inputs, valid=None):
        """Normalise (batch, channels, frames); padded frames of the result are finite but meaningless.

        `valid` is (batch, frames) torch.Tensor of bool, or None if every frame is valid.
        """
        own = (self.num_groups, self.weight, self.bias, self.eps)
        with torch.autocast(inputs.device.type, enabled=False):
            if devices.takes_cpu_path(inputs):
                return self._clip_by_clip(inputs, valid, own)
            if valid is None:
                # On a GPU, torch's kernel needs all arguments in one type.
                return nn.functional.group_norm(inputs.float(), *own).to(inputs.dtype)
            return masked_group_norm(inputs, valid, *own)

    def _clip_by_clip(self, inputs, valid, own):
        """Normalise with torch's kernel, which reads memory twice instead of six times and also sums in float32."""
        if valid is None:
            return nn.functional.group_norm(inputs, *own)
        counts = valid.sum(dim=-1).tolist()
        if torch.is_grad_enabled() and (inputs.requires_grad or self.weight.requires_grad):
            # Filling one tensor clip by clip would copy it for each clip in the backward pass.
            clips = [nn.functional.group_norm(clip[None, :, :n], *own) for clip, n in zip(inputs, counts, strict=True)]
            return torch.cat([nn.functional.pad(clip, (0, inputs.shape[-1] - clip.shape[-1])) for clip in clips])
        output = torch.zeros_like(inputs)
        for clip, row, count in zip(inputs, output, counts, strict=True):
            row[:, :count] = nn.functional.group_norm(clip[None, :, :count], *own)[0]
        return output

    @classmethod
    def replacing(cls, norm):
        """Make a masked version that shares the parameters of a torch.nn.GroupNorm."""
        masked = cls(norm.num_groups, norm.num_channels, eps=norm.eps, affine=True)
        masked.weight, masked.bias = norm.weight, norm.bias
        return masked
