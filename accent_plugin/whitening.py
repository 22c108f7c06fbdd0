"""Within-class whitening of pooled features: what varies among speakers of one accent is made small.

Within-class covariance normalisation (Hatch, Kajarekar and Stolcke, "Within-class covariance normalization for
SVM-based speaker recognition", 2006), with the covariance shrunk towards a multiple of the identity. For features of a
frozen encoder, of which there are more than speakers.
"""

import torch
from torch import nn


class Whitening(nn.Module):
    """A fixed affine map that gives features zero mean and, within a class, unit covariance.

    Before `fit` it changes nothing. Its two buffers are part of the state, so that a checkpoint holds them.

    Arguments
    ---------
    features : int
    """

    def __init__(self, features):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("transform", torch.eye(features))

    @property
    def fitted(self):
        """Whether mean and transform come from examples, here or in the weights that were loaded."""
        return bool(self.mean.any())

    @torch.no_grad()
    def fit(self, vectors, labels, shrinkage=0.1):
        """Set mean and transform from examples.

        Arguments
        ---------
        vectors : (examples, features) torch.Tensor
        labels : (examples,) torch.Tensor of int64
        shrinkage : float
            0 takes the covariance as it is, 1 only its mean variance.
        """
        vectors = vectors.double()
        centred = vectors.clone()
        for label in labels.unique():
            centred[labels == label] -= vectors[labels == label].mean(dim=0)
        covariance = centred.T @ centred / len(centred)
        identity = torch.eye(len(covariance), dtype=torch.double)
        scale = covariance.trace() / len(covariance)
        values, axes = torch.linalg.eigh((1 - shrinkage) * covariance + shrinkage * scale * identity)
        self.mean.copy_(vectors.mean(dim=0))
        self.transform.copy_(axes / values.sqrt() @ axes.T)

    def forward(self, vectors):
        """Map (batch, features) to (batch, features)."""
        with torch.autocast(vectors.device.type, enabled=False):
            return (vectors.float() - self.mean) @ self.transform
