"""The classifier: waveforms -> encoder -> optional projector -> pooling -> linear layer -> log-probabilities."""

import torch
from torch import nn

from accent_plugin.encoder import lora
from accent_plugin.pooling import make_pooling


class AccentModel(nn.Module):
    """Encoder and head as one module, so that distributed training wraps it once.

    Arguments
    ---------
    wav2vec2 : accent_plugin.encoder.base.InvariantEncoder
        Maps waveforms to frames and a mask of valid frames.
    accents : list of str
        Classes, in the order of the output.
    pooling : str
        A name in `accent_plugin.pooling.POOLINGS`.
    projector_size : int
        Width of a linear layer between encoder and pooling; None for none. The head of Hugging Face's
        `Wav2Vec2ForSequenceClassification` has one of 256.
    projector_activation : bool
        Follow the projector with a GELU. Hugging Face's has none.
    dropout : float
        Share of the pooled features dropped in training, and of the frames' features where there is a projector.
    whitening : bool
        Whiten the pooled features within classes; to be fitted before training, see `accent_plugin.model`.
    """

    def __init__(
        self,
        wav2vec2,
        accents,
        pooling="mean",
        projector_size=None,
        projector_activation=False,
        dropout=0.0,
        whitening=False,
    ):
        super().__init__()
        self.wav2vec2 = wav2vec2
        self.projector = None
        width = wav2vec2.width
        if projector_size is not None:
            layers = [nn.Linear(width, projector_size)]
            if projector_activation:
                layers += [nn.GELU(), nn.Dropout(dropout)]
            self.projector = nn.Sequential(*layers)
            width = projector_size
        self.pooling = make_pooling(pooling, width)
        self.whitening = Whitening(self.pooling.out_features) if whitening else None
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(self.pooling.out_features, len(accents))
        if whitening:
            # All directions are equal now: a random start would only favour some.
            nn.init.zeros_(self.classifier.weight)
            nn.init.zeros_(self.classifier.bias)

    def embed(self, wavs, wav_lens=None, pooled_states=None):
        """One vector per clip.

        Arguments
        ---------
        wavs : (batch, samples) torch.Tensor
            16 kHz, padded at the end.
        wav_lens : (batch,) torch.Tensor
            Length of each clip as a share of the longest; None where nothing is padded.
        pooled_states : (batch, states, features) torch.Tensor
            What `accent_plugin.training.feature_cache` kept of the clips, in place of the waveforms; None for those.

        Returns
        -------
        (batch, features) torch.Tensor
        """
        if pooled_states is None:
            frames, valid = self.wav2vec2(wavs, wav_lens)
        else:
            # The mean over a single frame, which is the mean already: all that comes before it is linear.
            frames = self.wav2vec2.combine(pooled_states.unsqueeze(2).unbind(1))
            valid = torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
        if self.projector is not None:
            frames = self.projector(frames)
        pooled = self.pooling(frames, valid)
        return pooled if self.whitening is None else self.whitening(pooled)

    def forward(self, wavs, wav_lens=None, pooled_states=None):
        """Classify; arguments as in `embed`.

        Returns
        -------
        (batch, classes) torch.Tensor
            Log-probabilities in float32.
        """
        scores = self.classifier(self.dropout(self.embed(wavs, wav_lens, pooled_states)))
        return torch.log_softmax(scores.float(), dim=-1)

    def head_parameters(self):
        """Parameters that start from nothing: all but the pretrained encoder's, adapters in it among them."""
        encoder = {id(parameter) for parameter in self.encoder_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in encoder]

    def encoder_parameters(self):
        """Parameters of the pretrained encoder, frozen ones among them, adapters not."""
        encoder = self.wav2vec2.model
        new = {id(parameter) for parameter in lora.parameters(encoder)}
        return [parameter for parameter in encoder.parameters() if id(parameter) not in new]


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
