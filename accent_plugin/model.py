"""The classifier: waveforms -> encoder -> optional projector -> pooling -> linear layer -> log-probabilities."""

import torch
from torch import nn

from accent_plugin import adapters
from accent_plugin.pooling import make_pooling
from accent_plugin.whitening import Whitening


class AccentModel(nn.Module):
    """Encoder and head as one module, so that distributed training wraps it once.

    Arguments
    ---------
    wav2vec2 : accent_plugin.encoder.InvariantEncoder
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
        Whiten the pooled features within classes; to be fitted before training, see `accent_plugin.whitening`.
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

    def embed(self, wavs, wav_lens=None, means=None):
        """One vector per clip.

        Arguments
        ---------
        wavs : (batch, samples) torch.Tensor
            16 kHz, padded at the end.
        wav_lens : (batch,) torch.Tensor
            Length of each clip as a share of the longest; None where nothing is padded.
        means : (batch, states, features) torch.Tensor
            What `accent_plugin.features` kept of the clips, in place of the waveforms; None for those.

        Returns
        -------
        (batch, features) torch.Tensor
        """
        if means is None:
            frames, valid = self.wav2vec2(wavs, wav_lens)
        else:
            # The mean over a single frame, which is the mean already: all that comes before it is linear.
            frames = self.wav2vec2.combine(means.unsqueeze(2).unbind(1))
            valid = torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
        if self.projector is not None:
            frames = self.projector(frames)
        pooled = self.pooling(frames, valid)
        return pooled if self.whitening is None else self.whitening(pooled)

    def forward(self, wavs, wav_lens=None, means=None):
        """Classify; arguments as in `embed`.

        Returns
        -------
        (batch, classes) torch.Tensor
            Log-probabilities in float32.
        """
        scores = self.classifier(self.dropout(self.embed(wavs, wav_lens, means)))
        return torch.log_softmax(scores.float(), dim=-1)

    def head_parameters(self):
        """Parameters that start from nothing: all but the pretrained encoder's, adapters in it among them."""
        encoder = {id(parameter) for parameter in self.encoder_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in encoder]

    def encoder_parameters(self):
        """Parameters of the pretrained encoder, frozen ones among them, adapters not."""
        encoder = self.wav2vec2.model
        new = {id(parameter) for parameter in adapters.parameters(encoder)}
        return [parameter for parameter in encoder.parameters() if id(parameter) not in new]
