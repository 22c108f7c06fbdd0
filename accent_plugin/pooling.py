"""Pooling over time: (batch, frames, features) and a mask of valid frames -> one vector per clip.

All poolings have the same signature and properties: padded frames have no effect, no noise is added, a single frame
gives finite values and gradients, and sums are computed in float32 for any autocast type.
"""

import torch
from torch import nn

from accent_plugin.errors import ConfigError
from accent_plugin.pooling_names import POOLING_NAMES

# Keeps the gradient of the square root finite if a feature is constant, for example with a single frame.
VARIANCE_FLOOR = 1e-6


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
        """Pool the frames of each clip.

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
        valid = valid.unsqueeze(-1)
        with torch.autocast(frames.device.type, enabled=False):
            # Padding is zeroed, because zero weights would not remove NaN: 0 * nan is nan.
            frames = frames.float().masked_fill(~valid, 0.0)
            return self._pool(frames, self._weights(frames, valid))

    def _weights(self, frames, valid):
        """Return the weight of each frame, (batch, frames, 1); the weights of the valid frames sum to one."""
        valid = valid.to(torch.float32)
        return valid / valid.sum(dim=1, keepdim=True).clamp(min=1.0)

    def _pool(self, frames, weights):
        return (frames * weights).sum(dim=1)


class StatisticsPooling(MeanPooling):
    """Mean and standard deviation over the valid frames, concatenated; the output is twice as wide as a frame.

    Snyder et al., "X-vectors: robust DNN embeddings for speaker recognition" (2018). Arguments as in `MeanPooling`.
    """

    def __init__(self, features):
        super().__init__(features)
        self.out_features = 2 * features

    def _pool(self, frames, weights):
        mean = super()._pool(frames, weights)
        variance = super()._pool((frames - mean.unsqueeze(1)).square(), weights)
        return torch.cat([mean, variance.clamp(min=VARIANCE_FLOOR).sqrt()], dim=-1)


class _FrameAttention(nn.Module):
    """Compute an attention weight for each frame: the softmax, over the valid frames, of v' tanh(W x + b)."""

    def __init__(self, features, attention_features):
        super().__init__()
        self.hidden = nn.Linear(features, attention_features)
        self.score = nn.Linear(attention_features, 1, bias=False)

    def forward(self, frames, valid):
        scores = self.score(torch.tanh(self.hidden(frames)))
        return torch.softmax(scores.masked_fill(~valid, torch.finfo(scores.dtype).min), dim=1)


class AttentivePooling(MeanPooling):
    """Mean over the valid frames, weighted by a learned attention.

    The self-attentive pooling of Lin et al., "A structured self-attentive sentence embedding" (2017), with one head.

    Arguments
    ---------
    features : int
        Width of a frame.
    attention_features : int
        Width of the attention's hidden layer.
    """

    def __init__(self, features, attention_features=128):
        super().__init__(features)
        self.attention = _FrameAttention(features, attention_features)

    def _weights(self, frames, valid):
        return self.attention(frames, valid)


class AttentiveStatisticsPooling(AttentivePooling, StatisticsPooling):
    """Attention-weighted mean and standard deviation over the valid frames, concatenated; twice as wide as a frame.

    Okabe et al., "Attentive statistics pooling for deep speaker embedding" (2018). Arguments as in `AttentivePooling`.
    """


_CLASSES = (MeanPooling, StatisticsPooling, AttentivePooling, AttentiveStatisticsPooling)

# Name -> class; a program may add its own.
POOLINGS = dict(zip(POOLING_NAMES, _CLASSES, strict=True))


# Pooling -> the choice of `summarise` that keeps its output; any other pooling needs all frames. Subclasses are not
# looked up: they may weight the frames.
SUMMARIES = {MeanPooling: "mean", StatisticsPooling: "moments"}


def summarise(states, summary):
    """Replace the frames of a clip by few frames for which a pooling of `SUMMARIES` returns the same.

    The moments of a weighted sum of states depend on the covariances between the states. So "moments" returns one frame
    more than there are states: the corners of a simplex, transformed so that their mean and covariances are those of
    all frames, for each feature.

    Arguments
    ---------
    states : (frames, states, features) torch.Tensor
        Every frame of one clip, without padding.
    summary : str
        "mean", "moments" or "frames", which returns the frames as they are.

    Returns
    -------
    (few, states, features) torch.Tensor
        In float32, except with "frames".

    Example
    -------
    >>> frames = torch.tensor([1.0, 2.0, 6.0]).view(3, 1, 1)
    >>> summarise(frames, "mean").flatten(), summarise(frames, "moments").flatten()
    (tensor([3.]), tensor([5.1602, 0.8398]))
    """
    if summary == "frames":
        return states
    if summary == "mean":
        return states.float().mean(dim=0, keepdim=True)
    # Some accelerators have no float64.
    states = states.cpu().double()
    mean = states.mean(dim=0)
    centred = (states - mean).permute(2, 1, 0)
    variances, axes = torch.linalg.eigh(centred @ centred.mT / len(states))
    deviations = axes * variances.clamp(min=0.0).sqrt().unsqueeze(1)
    corners = _simplex(states.shape[1])
    return (mean + torch.einsum("dsk,ck->csd", deviations, corners)).float()


def _simplex(dimensions):
    """Corners of a simplex with zero mean and unit covariance: (dimensions + 1, dimensions) torch.Tensor of float64."""
    place, corner = torch.meshgrid(torch.arange(1, dimensions + 1), torch.arange(dimensions + 1), indexing="ij")
    # Rows of a Helmert matrix: `place` ones, then minus `place`, then zeros.
    rows = (corner < place).double() - place * (corner == place)
    return (rows * torch.sqrt((dimensions + 1.0) / (place * (place + 1)))).T


def make_pooling(name, features):
    """Create a pooling from its name.

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
        If the name is unknown.
    """
    if name not in POOLINGS:
        raise ConfigError(f"pooling {name!r} is unknown; choose one of {', '.join(POOLINGS)}")
    return POOLINGS[name](features)
