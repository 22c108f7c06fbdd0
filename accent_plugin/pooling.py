"""Pooling over time: (batch, frames, features) and a mask of valid frames -> one vector per clip.

All poolings have the same signature and properties: padded frames have no effect, no noise is added, a single frame
gives finite values and gradients, and sums are computed in float32 for any autocast type.
"""

import torch
from torch import nn

from accent_plugin.errors import ConfigError


def _masked_mean(frames, weights):
    """Compute the weighted sum over frames; weights (batch, frames, 1) sum to one over the valid frames."""
    return (frames * weights).sum(dim=1)


def _uniform_weights(valid):
    valid = valid.unsqueeze(-1).to(torch.float32)
    return valid / valid.sum(dim=1, keepdim=True).clamp(min=1.0)


def _clear_padding(frames, valid):
    """Zero the padded frames; zero weights would not remove NaN, because 0 * nan is nan."""
    return frames.float().masked_fill(~valid.unsqueeze(-1), 0.0)


class MeanPooling(nn.Module):
    """Mean over the valid frames.

    Arguments
    ---------
    features : int
        Width of a frame.

    Example
    -------
    >>> frames = torch.tensor([[[1.0], [3.0], [100.0]]])
    >>> MeanPooling(1)(frames, torch.tensor([[True, True, False]]))
    tensor([[2.]])
    """

    def __init__(self, features):
        super().__init__()
        self.out_features = features

    def forward(self, frames, valid):
        """Pool.

        Arguments
        ---------
        frames : (batch, frames, features) torch.Tensor
        valid : (batch, frames) torch.Tensor
            True where a frame belongs to the clip.

        Returns
        -------
        (batch, out_features) torch.Tensor
            In float32.
        """
        with torch.autocast(frames.device.type, enabled=False):
            return _masked_mean(_clear_padding(frames, valid), _uniform_weights(valid))


# Keeps the gradient of the square root finite if a feature is constant, as with one frame.
_VARIANCE_FLOOR = 1e-6


def _statistics(frames, weights):
    """Compute the weighted mean and standard deviation over frames, concatenated."""
    mean = _masked_mean(frames, weights)
    variance = _masked_mean((frames - mean.unsqueeze(1)).square(), weights)
    return torch.cat([mean, variance.clamp(min=_VARIANCE_FLOOR).sqrt()], dim=-1)


class StatisticsPooling(nn.Module):
    """Mean and standard deviation over the valid frames, concatenated.

    Snyder et al., "X-vectors: robust DNN embeddings for speaker recognition" (2018).

    Arguments
    ---------
    features : int
        Width of a frame; the result is twice as wide.
    """

    def __init__(self, features):
        super().__init__()
        self.out_features = 2 * features

    def forward(self, frames, valid):
        """Pool; shapes as in `MeanPooling.forward`."""
        with torch.autocast(frames.device.type, enabled=False):
            return _statistics(_clear_padding(frames, valid), _uniform_weights(valid))


class _FrameAttention(nn.Module):
    """One attention weight per frame: softmax over the valid frames of v' tanh(W x + b)."""

    def __init__(self, features, attention_features):
        super().__init__()
        self.hidden = nn.Linear(features, attention_features)
        self.score = nn.Linear(attention_features, 1, bias=False)

    def forward(self, frames, valid):
        scores = self.score(torch.tanh(self.hidden(frames)))
        scores = scores.masked_fill(~valid.unsqueeze(-1), torch.finfo(scores.dtype).min)
        return torch.softmax(scores, dim=1)


class AttentivePooling(nn.Module):
    """Mean over the valid frames weighted by a learned attention.

    The self-attentive pooling of Lin et al., "A structured self-attentive sentence embedding" (2017), with one head.

    Arguments
    ---------
    features : int
        Width of a frame.
    attention_features : int
        Width of the attention's hidden layer.
    """

    def __init__(self, features, attention_features=128):
        super().__init__()
        self.out_features = features
        self.attention = _FrameAttention(features, attention_features)

    def forward(self, frames, valid):
        """Pool; shapes as in `MeanPooling.forward`."""
        with torch.autocast(frames.device.type, enabled=False):
            frames = _clear_padding(frames, valid)
            return _masked_mean(frames, self.attention(frames, valid))


class AttentiveStatisticsPooling(nn.Module):
    """Attention-weighted mean and standard deviation over the valid frames, concatenated.

    Okabe et al., "Attentive statistics pooling for deep speaker embedding" (2018).

    Arguments
    ---------
    features : int
        Width of a frame; the result is twice as wide.
    attention_features : int
        Width of the attention's hidden layer.
    """

    def __init__(self, features, attention_features=128):
        super().__init__()
        self.out_features = 2 * features
        self.attention = _FrameAttention(features, attention_features)

    def forward(self, frames, valid):
        """Pool; shapes as in `MeanPooling.forward`."""
        with torch.autocast(frames.device.type, enabled=False):
            frames = _clear_padding(frames, valid)
            return _statistics(frames, self.attention(frames, valid))


POOLINGS = {
    "mean": MeanPooling,
    "statistics": StatisticsPooling,
    "attentive": AttentivePooling,
    "attentive_statistics": AttentiveStatisticsPooling,
}


def make_pooling(name, features):
    """Make a pooling by its name.

    Arguments
    ---------
    name : str
        One of `POOLINGS`.
    features : int
        Width of a frame.

    Returns
    -------
    torch.nn.Module
        Maps (batch, frames, features) and (batch, frames) to (batch, `out_features`).

    Raises
    ------
    ConfigError
        If there is no such pooling.
    """
    if name not in POOLINGS:
        raise ConfigError(f"pooling {name!r} is unknown; choose one of {', '.join(POOLINGS)}")
    return POOLINGS[name](features)
