"""wav2vec 2.0 and its relatives: XLSR, HuBERT, WavLM, data2vec-audio."""

from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from accent_plugin.encoder.base import InvariantEncoder
from accent_plugin.encoder.convolutions import PositionalConvolution, PositionalConvolutions, WaveformConvolutions
from accent_plugin.encoder.masking import MaskedGroupNorm, valid_frames
from accent_plugin.errors import EncoderError


def _mask_of_frames(length, attention_mask, add_adapter=None):
    """Replaces Hugging Face's method that converts a sample mask to a frame mask."""
    return attention_mask


class DeferredLayerNorm(nn.LayerNorm):
    """The norm above the last layer, applied by the encoder: transformers passes its input on.

    Older releases return the normalised output as the last hidden state, newer ones the output of the last layer. With
    this norm it is the output of the last layer in all of them. Same parameters and keys as torch's.
    """

    def forward(self, inputs):
        """Return the input."""
        return inputs

    def normalize(self, inputs):
        """Apply the norm to (batch, frames, features) torch.Tensor."""
        return super().forward(inputs)

    @classmethod
    def replacing(cls, norm):
        """Make one with the parameters of an `nn.LayerNorm`."""
        new = cls(norm.normalized_shape, eps=norm.eps, device="meta")
        new.weight, new.bias = norm.weight, norm.bias
        return new


class Wav2Vec2Encoder(InvariantEncoder, Wav2Vec2):
    """SpeechBrain's lobe for wav2vec 2.0, XLSR, HuBERT, WavLM and data2vec-audio, with batch-independent output.

    Sources: Baevski et al. 2020 (wav2vec 2.0), Hsu et al. 2021 (HuBERT), Chen et al. 2022 (WavLM), Baevski et al. 2022
    (data2vec). Arguments as in `make_encoder`.
    """

    _DEPTH = "num_hidden_layers"

    def _adapt(self, source):
        if getattr(self.model, "adapter", None) is not None:
            raise EncoderError(f"{source} has an adapter on top of its layers, which is not supported")
        if getattr(self.config, "conv_pos_batch_norm", False):
            raise EncoderError(f"{source} has a batch normalisation in its positional convolution: not supported")
        if getattr(self.model, "masked_spec_embed", None) is not None:
            # This parameter is unused without SpecAugment, and distributed training would wait forever for its
            # gradient.
            self.model.masked_spec_embed.requires_grad_(False)
        layers = self.model.feature_extractor.conv_layers
        if isinstance(layers[0].layer_norm, nn.GroupNorm):
            layers[0].layer_norm = MaskedGroupNorm.replacing(layers[0].layer_norm)
        self.model.feature_extractor = WaveformConvolutions(layers, self.config)
        positional = self.model.encoder.pos_conv_embed
        stacked = getattr(positional, "layers", None)
        if stacked:
            self.model.encoder.pos_conv_embed = PositionalConvolutions(stacked)
        elif positional.conv.stride == (1,):
            # SEW's has a stride, and other axes.
            self.model.encoder.pos_conv_embed = PositionalConvolution(positional)
        if self._norm_is_last:
            self.model.encoder.layer_norm = DeferredLayerNorm.replacing(self.model.encoder.layer_norm)
        # Hugging Face's method derives the mask from a sample mask, and waits for the GPU.
        self.model._get_feature_vector_attention_mask = _mask_of_frames

    @property
    def _norm_is_last(self):
        """Whether the encoder's norm is above the last layer and not below the first; data2vec-audio has no choice."""
        return getattr(self.config, "do_stable_layer_norm", False)

    @property
    def feature_encoder(self):
        """The convolutions on the waveform."""
        return self.model.feature_extractor

    @property
    def projection(self):
        """The layers between the stem and the first transformer block."""
        parts = [self.model.feature_projection, self.model.encoder.pos_conv_embed]
        if not self._norm_is_last:
            parts.append(self.model.encoder.layer_norm)
        return parts

    @property
    def layers(self):
        """Transformer blocks."""
        return self.model.encoder.layers

    @property
    def minimum_samples(self):
        """Number of samples needed for one frame."""
        samples = 1
        for kernel, stride in zip(reversed(self.config.conv_kernel), reversed(self.config.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples

    def frame_counts(self, counts):
        """Number of frames for numbers of samples; both (batch,) torch.Tensor of int64, or both int."""
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            counts = (counts - kernel) // stride + 1
        return counts

    def _encode(self, wavs, counts, padded, all_states):
        valid, inputs = None, wavs
        if padded:
            valid, inputs = valid_frames(self.frame_counts(counts), self.frame_counts(wavs.shape[1])), (wavs, counts)
        output = self.model(inputs, attention_mask=valid, output_hidden_states=all_states)
        if not self._norm_is_last:
            return output
        last = self.model.encoder.layer_norm.normalize(output.last_hidden_state)
        return BaseModelOutput(last, hidden_states=output.hidden_states)
