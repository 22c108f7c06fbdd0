"""Encoders of encoder-decoder models: Moonshine and Whisper."""

import torch
from speechbrain.integrations.huggingface.huggingface import HFTransformersInterface
from torch import nn
from transformers import AutoModel, WhisperFeatureExtractor
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput

from accent_plugin.audio.samples import SAMPLE_RATE, TOO_LONG
from accent_plugin.encoder.base import InvariantEncoder
from accent_plugin.encoder.masking import MaskedGroupNorm, valid_frames
from accent_plugin.errors import AudioError, EncoderError


class EncoderHalf(InvariantEncoder, HFTransformersInterface):
    """Base class of Moonshine and Whisper: the decoder is dropped, so its weights may be missing.

    Arguments as in `make_encoder`.
    """

    def _adapt(self, source):
        self.load_feature_extractor(source, cache_dir=None)
        self.model = self.model.encoder

    def _may_be_missing(self, key):
        return not key.startswith("encoder.")

    def _without_weights(self, **kwargs):
        # The decoder is dropped immediately. On this device, it takes no memory.
        with torch.device("meta"):
            complete = AutoModel.from_config(self.config, **kwargs)
        if torch.get_default_device().type != "meta":
            complete.encoder = type(complete.encoder)(complete.encoder.config)
        return complete

    @property
    def layers(self):
        """Transformer blocks."""
        return self.model.layers

    def _output(self, states, all_states):
        """Return the states before and after each block like Hugging Face: the last one is the normalised output."""
        states[-1] = self.model.layer_norm(states[-1])
        return BaseModelOutput(states[-1], hidden_states=tuple(states) if all_states else None)


class MoonshineEncoder(EncoderHalf):
    """The encoder of Moonshine (Jeffries et al. 2024), a speech recogniser that is small enough for a CPU."""

    _DEPTH = "encoder_num_hidden_layers"

    def _adapt(self, source):
        super()._adapt(source)
        self.normalize_wav = self.feature_extractor.do_normalize
        self.model.groupnorm = MaskedGroupNorm.replacing(self.model.groupnorm)

    @property
    def feature_encoder(self):
        """The convolutions on the waveform."""
        return nn.ModuleList([self.model.conv1, self.model.groupnorm, self.model.conv2, self.model.conv3])

    @property
    def projection(self):
        """The layers between the stem and the first transformer block: rotary embeddings, without parameters."""
        return []

    # (kernel, stride) of the three convolutions. Hugging Face's configuration does not contain them.
    _CONVOLUTIONS = ((127, 64), (7, 3), (3, 2))
    minimum_samples = 127 + ((7 - 1) + (3 - 1) * 3) * 64

    def frame_counts(self, counts):
        """Number of frames for numbers of samples; both (batch,) torch.Tensor of int64, or both int."""
        for kernel, stride in self._CONVOLUTIONS:
            counts = (counts - kernel) // stride + 1
        return counts

    def _encode(self, wavs, counts, padded, all_states):
        model, valid, valid_first = self.model, None, None
        frames = torch.tanh(model.conv1(wavs.unsqueeze(1)))
        if padded:
            kernel, stride = self._CONVOLUTIONS[0]
            valid_first = valid_frames((counts - kernel) // stride + 1, frames.shape[-1])
            valid = valid_frames(self.frame_counts(counts), self.frame_counts(wavs.shape[1]))
        frames = model.groupnorm(frames, valid_first)
        frames = nn.functional.gelu(model.conv3(nn.functional.gelu(model.conv2(frames)))).transpose(1, 2)
        # Hugging Face's forward pass takes a mask over samples and counts frames that reach into the padding.
        mask = create_bidirectional_mask(model.config, inputs_embeds=frames, attention_mask=valid)
        places = torch.arange(frames.shape[1], device=frames.device).unsqueeze(0)
        turns = model.rotary_emb(frames, position_ids=places)
        states = [frames]
        for layer in model.layers:
            frames = layer(frames, attention_mask=mask, position_ids=places, position_embeddings=turns)
            states.append(frames)
        return self._output(states, all_states)


class WhisperEncoder(EncoderHalf):
    """The encoder of Whisper (Radford et al. 2022), applied to the frames of a clip (50 per second) instead of 30 s.

    Hugging Face pads each clip with silence to 30 s and attends to all of it. Here, a batch is as long as its longest
    clip. A clip of 30 s gives the same frames as in Hugging Face. A longer clip raises an error, because Whisper has no
    positions beyond 30 s.
    """

    _DEPTH = "encoder_layers"
    # Whisper scales the spectrogram by its maximum and does not normalise the waveform.
    normalize_wav = False
    minimum_samples = 1

    def _adapt(self, source):
        super()._adapt(source)
        extractor, bins = self.feature_extractor, self.model.num_mel_bins
        if not isinstance(extractor, WhisperFeatureExtractor) or extractor.feature_size != bins:
            raise EncoderError(
                f"preprocessor_config.json in {source} is for a {type(extractor).__name__} of {extractor.feature_size} "
                f"features; this encoder wants a WhisperFeatureExtractor of {bins}"
            )
        self._hop, self._window_length = extractor.hop_length, extractor.n_fft
        self.maximum_samples = self.model.max_source_positions * self.model.conv2.stride[0] * self._hop
        if self.maximum_samples <= self._window_length // 2:
            raise EncoderError(
                f"{source} has positions for {self.maximum_samples} samples, fewer than half a window of "
                f"{self._window_length}"
            )
        # Not persistent, so that the state dict has only Hugging Face's keys.
        self.register_buffer("_window", torch.hann_window(extractor.n_fft), persistent=False)
        self.register_buffer("_mel", torch.from_numpy(extractor.mel_filters.T).float(), persistent=False)

    @property
    def feature_encoder(self):
        """The convolutions on the spectrogram."""
        return nn.ModuleList([self.model.conv1, self.model.conv2])

    @property
    def projection(self):
        """The layers between the stem and the first transformer block: fixed sinusoidal positions."""
        return [self.model.embed_positions]

    def frame_counts(self, counts):
        """Number of frames for numbers of samples; both (batch,) torch.Tensor of int64."""
        return (self._mel_counts(counts) + 1) // 2

    def _mel_counts(self, counts):
        return (counts + self._hop - 1) // self._hop

    def _log_mel(self, wavs, counts):
        """Compute log-mel spectrograms (batch, bins, frames), zero after a clip, and their mask (batch, 1, frames).

        The result is Hugging Face's for the clip followed by silence, but the maximum is over the frames of the clip.
        """
        valid = valid_frames(self._mel_counts(counts), self._mel_counts(wavs.shape[1])).unsqueeze(1)
        # The last window of a clip reaches into the silence after it. At 30 s there is none, and torch reflects the
        # clip.
        wavs = nn.functional.pad(wavs, (0, self._window_length // 2))[:, : self.maximum_samples]
        with torch.autocast(wavs.device.type, enabled=False):
            spectrum = torch.stft(wavs, self._window_length, self._hop, window=self._window, return_complex=True)
            power = spectrum[..., : valid.shape[-1]].abs().square()
            mel = (self._mel @ power).clamp(min=1e-10).log10()
            loudest = mel.masked_fill(~valid, -torch.inf).amax(dim=(1, 2), keepdim=True)
            return ((torch.maximum(mel, loudest - 8.0) + 4.0) / 4.0).masked_fill(~valid, 0.0), valid

    def _encode(self, wavs, counts, padded, all_states):
        if wavs.shape[1] > self.maximum_samples:
            raise AudioError(
                TOO_LONG,
                f"a clip lasts {wavs.shape[1] / SAMPLE_RATE:.1f} s, but Whisper has positions for "
                f"{self.maximum_samples / SAMPLE_RATE:g} s: set max_seconds or crop_seconds to that or less",
            )
        model = self.model
        frames, valid = self._log_mel(wavs, counts)
        # Zero the padding again between the convolutions, or the bias of the first would leak from it into the clip.
        frames = nn.functional.gelu(model.conv1(frames)).masked_fill(~valid, 0.0)
        frames = nn.functional.gelu(model.conv2(frames)).transpose(1, 2)
        frames = frames + model.embed_positions.weight[: frames.shape[1]]
        frames = nn.functional.dropout(frames, model.dropout, model.training)
        mask = None
        if padded:
            mask = valid_frames(self.frame_counts(counts), frames.shape[1])
            mask = create_bidirectional_mask(model.config, inputs_embeds=frames, attention_mask=mask)
        states = [frames]
        for layer in model.layers:
            if not (layer.training and model.layerdrop and torch.rand(()) < model.layerdrop):
                frames = layer(frames, mask)
            states.append(frames)
        return self._output(states, all_states)
