"""The classifier: waveforms -> encoder -> optional projector -> pooling -> linear layer -> log-probabilities."""

import torch
from torch import nn

from accent_plugin.encoder import lora
from accent_plugin.encoder.masking import valid_frames
from accent_plugin.pooling import SUMMARIES, make_pooling


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
        Width of a linear layer between encoder and pooling; None for no layer. Hugging Face's
        `Wav2Vec2ForSequenceClassification` uses 256.
    projector_activation : bool
        Apply a GELU after the projector. Hugging Face's model does not.
    dropout : float
        Dropout probability of the pooled features; with an activated projector, also of its output.
    whitening : bool
        Whiten the pooled features within classes. `Whitening.fit` has to be called before training.
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
            # After whitening, all directions are equivalent; random weights would favour some of them.
            nn.init.zeros_(self.classifier.weight)
            nn.init.zeros_(self.classifier.bias)

    @property
    def summary(self):
        """What suffices of a clip's hidden states to compute its output: a choice of `pooling.summarise`."""
        summary = SUMMARIES.get(type(self.pooling), "frames")
        if self.projector is None or (summary == "mean" and len(self.projector) == 1):
            return summary
        # Only means pass through a linear layer unchanged; a variance after it depends on all covariances.
        return "frames"

    def embed(self, wavs, wav_lens=None, states=None, frame_counts=None):
        """Compute one vector per clip: (batch, features) torch.Tensor.

        Arguments
        ---------
        wavs : (batch, samples) torch.Tensor
            16 kHz, padded at the end.
        wav_lens : (batch,) torch.Tensor
            Length of each clip as a fraction of the longest; None if nothing is padded.
        states : (states, batch, frames, features) torch.Tensor
            Hidden states cached by `accent_plugin.training.feature_cache`, used instead of the waveforms unless None.
        frame_counts : (batch,) torch.Tensor
            Number of frames of each clip in `states`.
        """
        if states is None:
            frames, valid = self.wav2vec2(wavs, wav_lens)
        else:
            with torch.autocast(states.device.type, enabled=False):
                frames = self.wav2vec2.combine(states.float())
            valid = valid_frames(frame_counts, frames.shape[1])
        if self.projector is not None:
            frames = self.projector(frames)
        pooled = self.pooling(frames, valid)
        return pooled if self.whitening is None else self.whitening(pooled)

    def forward(self, wavs, wav_lens=None, states=None, frame_counts=None):
        """Return (batch, classes) log-probabilities in float32; arguments as in `embed`."""
        scores = self.classifier(self.dropout(self.embed(wavs, wav_lens, states, frame_counts)))
        return torch.log_softmax(scores.float(), dim=-1)

    def head_parameters(self):
        """Return the parameters that are not pretrained: those of the head, and of any adapters in the encoder."""
        encoder = {id(parameter) for parameter in self.encoder_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in encoder]

    def encoder_parameters(self):
        """Return the pretrained parameters of the encoder, including frozen ones, without adapters."""
        encoder = self.wav2vec2.model
        new = {id(parameter) for parameter in lora.parameters(encoder)}
        return [parameter for parameter in encoder.parameters() if id(parameter) not in new]


class Whitening(nn.Module):
    """A fixed affine map to features with zero mean and unit within-class covariance.

    Before `fit`, it is the identity. Its two buffers are part of the state dict, so checkpoints contain them.
    """

    def __init__(self, features):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("transform", torch.eye(features))

    @property
    def fitted(self):
        """Whether `fit` was called, on this module or before the loaded weights were saved."""
        return bool(self.mean.any())

    @torch.no_grad()
    def fit(self, vectors, labels, shrinkage=0.1):
        """Fit the mean and the transform to (examples, features) vectors and (examples,) labels of int64.

        A `shrinkage` of 0 uses the full covariance; 1 uses only its mean variance.
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
