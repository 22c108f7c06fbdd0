"""wav2vec 2.0 and its relatives: XLSR, HuBERT, WavLM, data2vec-audio."""

from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
from torch import nn

from accent_plugin.encoder.base import InvariantEncoder
from accent_plugin.encoder.convolutions import PositionalConvolutions, WaveformConvolutions
from accent_plugin.encoder.masking import MaskedGroupNorm, valid_frames
from accent_plugin.errors import EncoderError


def _mask_of_frames(length, attention_mask, add_adapter=None):
    """Takes the place of a method of Hugging Face's that makes a mask of frames from one of samples."""
    return attention_mask


class Wav2Vec2Encoder(InvariantEncoder, Wav2Vec2):
    """SpeechBrain's lobe for wav2vec 2.0, XLSR, HuBERT, WavLM and data2vec-audio, made independent of the batch.

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
            # Trainable but unused without SpecAugment: distributed training would wait for its gradient for ever.
            self.model.masked_spec_embed.requires_grad_(False)
        layers = self.model.feature_extractor.conv_layers
        if isinstance(layers[0].layer_norm, nn.GroupNorm):
            layers[0].layer_norm = MaskedGroupNorm.replacing(layers[0].layer_norm)
        self.model.feature_extractor = WaveformConvolutions(layers, self.config)
        if positional := getattr(self.model.encoder.pos_conv_embed, "layers", None):
            self.model.encoder.pos_conv_embed = PositionalConvolutions(positional)
        # Hugging Face's own derives it from a mask of samples, and waits for a GPU to do so.
        self.model._get_feature_vector_attention_mask = _mask_of_frames

    @property
    def feature_encoder(self):
        """The convolutions on the waveform."""
        return self.model.feature_extractor

    @property
    def projection(self):
        """What stands between the stem and the first transformer block."""
        parts = [self.model.feature_projection, self.model.encoder.pos_conv_embed]
        if not self.config.do_stable_layer_norm:
            parts.append(self.model.encoder.layer_norm)
        return parts

    @property
    def layers(self):
        """Transformer blocks."""
        return self.model.encoder.layers

    @property
    def minimum_samples(self):
        """Samples that give one frame."""
        samples = 1
        for kernel, stride in zip(reversed(self.config.conv_kernel), reversed(self.config.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples

    def frame_counts(self, counts):
        """Frames of clips of so many samples; both (batch,) torch.Tensor of int64, or both int."""
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            counts = (counts - kernel) // stride + 1
        return counts

    def _encode(self, wavs, counts, padded, all_states):
        if not padded:
            return self.model(wavs, output_hidden_states=all_states)
        valid = valid_frames(self.frame_counts(counts), self.frame_counts(wavs.shape[1]))
        return self.model((wavs, counts), attention_mask=valid, output_hidden_states=all_states)
