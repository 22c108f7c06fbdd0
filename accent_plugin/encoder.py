"""Pretrained speech encoders whose output for a clip does not depend on the batch it is in.

Three things make the usual lobes give a clip other frames when it is padded: normalising the padded waveform or
spectrogram, a normalisation over time in the first convolutions, and padding that leaks through later convolutions.
Here each is computed from the clip's own samples and frames, with the parameters and state-dict keys of Hugging Face's
models, so that for one unpadded clip the output is Hugging Face's (for Whisper a clip of 30 s, to which Hugging Face
pads every clip). A family enters `FAMILIES` only with a test of that.
"""

import contextlib
import difflib
import functools
import json
import logging
import re
import tempfile
import warnings
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from speechbrain.integrations.huggingface.huggingface import HFTransformersInterface
from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, WhisperFeatureExtractor
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging as transformers_logging

from accent_plugin import adapters, bundle_config, devices
from accent_plugin.audio import SAMPLE_RATE, TOO_LONG
from accent_plugin.convolutions import WaveformConvolutions
from accent_plugin.dropout import quicken
from accent_plugin.errors import AudioError, EncoderError

logger = logging.getLogger(__name__)

# Of Hugging Face's Wav2Vec2FeatureExtractor, so that a clip is normalised exactly as there.
_NORMALISATION_FLOOR = 1e-7
# Of the names of the encoder's tensors in a bundle: an AccentModel holds them so.
_IN_BUNDLE = "wav2vec2.model."
# Of a configuration: what says where it came from, or how to call the model, not what it is.
NOT_ARCHITECTURE = (
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "auto_map"),
    *("return_dict", "output_hidden_states", "output_attentions"),
)


def sample_counts(wavs, wav_lens=None):
    """True length of each clip of a padded batch, in samples.

    Arguments
    ---------
    wavs : (batch, samples) torch.Tensor
    wav_lens : (batch,) torch.Tensor
        Length of each clip as a share of the longest, as SpeechBrain gives it; None where nothing is padded.

    Returns
    -------
    (batch,) torch.Tensor of int64
    """
    if wav_lens is None:
        return torch.full((wavs.shape[0],), wavs.shape[1], device=wavs.device)
    # Apple's GPUs have no float64.
    shares = wav_lens.cpu() if wav_lens.device.type == "mps" else wav_lens
    return torch.round(shares.double() * wavs.shape[1]).long().to(wavs.device)


def _valid(counts, length):
    """(batch, length) mask that is True in the first `counts` places of each row."""
    return torch.arange(length, device=counts.device) < counts.unsqueeze(1)


def masked_group_norm(inputs, valid, groups, weight, bias, eps):
    """Group normalisation over the valid frames only, without looking at a value.

    Sums are taken in float32 whatever the inputs are. Besides the output, one tensor of the size of the inputs is kept
    for the backward pass, and one more lives for a moment.

    Arguments
    ---------
    inputs : (batch, channels, frames) torch.Tensor
    valid : (batch, frames) torch.Tensor of bool
    groups : int
    weight, bias : (channels,) torch.Tensor
    eps : float

    Returns
    -------
    (batch, channels, frames) torch.Tensor
        In the inputs' type; a padded frame has the bias.
    """
    batch, channels, frames = inputs.shape
    grouped = inputs.view(batch, groups, channels // groups, frames)
    padding = ~valid[:, None, None, :]
    count = valid.sum(dim=-1).view(batch, 1, 1, 1) * grouped.shape[2]
    mean = grouped.masked_fill(padding, 0.0).sum(dim=(2, 3), keepdim=True, dtype=torch.float32) / count
    # The sum of squares of what is centred: that of squares alone would lose all digits where the mean is large.
    centred = (grouped - mean.to(grouped.dtype)).masked_fill_(padding, 0.0)
    norm = torch.linalg.vector_norm(centred, dim=(2, 3), keepdim=True, dtype=torch.float32)
    scale = weight.view(1, groups, -1, 1) * torch.rsqrt(norm.square() / count + eps)
    shift = bias.view(1, groups, -1, 1).to(grouped.dtype)
    return torch.addcmul(shift, centred, scale.to(grouped.dtype)).view(batch, channels, frames)


class MaskedGroupNorm(nn.GroupNorm):
    """Group normalisation over the valid frames only, with sums in float32; same parameters and keys as torch's.

    `valid` is set by the encoder around each forward pass; None means that every frame counts.
    """

    valid = None

    def forward(self, inputs):
        """Normalise (batch, channels, frames); what stands in padded frames afterwards is finite and meaningless."""
        own = (self.num_groups, self.weight, self.bias, self.eps)
        with torch.autocast(inputs.device.type, enabled=False):
            if devices.takes_cpu_path(inputs):
                return self._clip_by_clip(inputs, own)
            if self.valid is None:
                # On a GPU torch's own wants one type.
                return nn.functional.group_norm(inputs.float(), *own).to(inputs.dtype)
            return masked_group_norm(inputs, self.valid, *own)

    def _clip_by_clip(self, inputs, own):
        """The same with torch's own kernel, which goes over memory twice where the formula above does six times.

        It adds up in float32 whatever the inputs are, and gives back their type.
        """
        if self.valid is None:
            return nn.functional.group_norm(inputs, *own)
        counts = self.valid.sum(dim=-1).tolist()
        if torch.is_grad_enabled() and (inputs.requires_grad or self.weight.requires_grad):
            # A tensor that is filled bit by bit would be copied for each clip in the backward pass.
            clips = [nn.functional.group_norm(clip[None, :, :n], *own) for clip, n in zip(inputs, counts, strict=True)]
            return torch.cat([nn.functional.pad(clip, (0, inputs.shape[-1] - clip.shape[-1])) for clip in clips])
        output = torch.zeros_like(inputs)
        for clip, row, count in zip(inputs, output, counts, strict=True):
            row[:, :count] = nn.functional.group_norm(clip[None, :, :count], *own)[0]
        return output

    @classmethod
    def replacing(cls, norm):
        """A masked copy that takes over the parameters of a torch.nn.GroupNorm."""
        masked = cls(norm.num_groups, norm.num_channels, eps=norm.eps, affine=True)
        masked.weight, masked.bias = norm.weight, norm.bias
        return masked


class InvariantEncoder:
    """What all encoders share; a family says how many frames there are, which parts it has, and how to encode.

    It names the key of its number of layers in `_DEPTH` and changes the loaded model in `_adapt`.

    Mixed into a SpeechBrain lobe. The forward pass returns frames and a mask instead of frames alone. While `held` is
    set, no gradient enters the pretrained model: it stands still without being frozen for good.
    """

    held = False
    # Layers with adapters; there are none yet when the parent's constructor sets the mode.
    _adapted = ()

    def __init__(
        self,
        source,
        save_path,
        freeze=False,
        freeze_feature_extractor=True,
        freeze_layers=0,
        num_layers=None,
        weighted_layers=None,
        standardise_layers=False,
        config_overrides=None,
        weights=True,
        weights_file=None,
        lora_rank=None,
        lora_alpha=None,
        lora_dropout=0.0,
        gradient_checkpointing=False,
        **kwargs,
    ):
        if freeze and lora_rank is not None:
            raise EncoderError("freeze trains nothing of the encoder, lora_rank adapters in it: give one of them")
        # The parent calls override_config while it is being built, so these come before it.
        self._num_layers, self._config_overrides = num_layers, config_overrides or {}
        self._weights = weights
        with quiet():
            super().__init__(source, save_path, **kwargs)
        quicken(self.model, attention=kwargs.get("attn_implementation") is None)
        self._adapt(source)
        if weights_file is not None:
            # Before adapters are put in, which give weights other names.
            self._take_weights(weights_file)
        self._freeze_for_good(freeze, freeze_feature_extractor, freeze_layers, adapted=lora_rank is not None)
        if lora_rank is not None:
            blocks = self.blocks[freeze_layers:]
            self._adapted = adapters.inject(blocks, self.config.model_type, lora_rank, lora_alpha, lora_dropout)
        if gradient_checkpointing:
            for block in self.blocks:
                block.forward = functools.partial(self._checkpointed, block.forward)
        self._prepare_sum(weighted_layers, standardise_layers)
        self.train(self.training)

    def override_config(self, config):
        """Apply the overrides before the model is built: dropout values are baked in at construction."""
        return _overridden(config, self._config_overrides, self._num_layers, self._DEPTH)

    def _freeze_for_good(self, freeze, freeze_feature_extractor, freeze_layers, adapted):
        depth = len(self.blocks)
        if not 0 <= freeze_layers <= depth:
            raise EncoderError(f"freeze_layers is {freeze_layers}, but this encoder has {depth} layers")
        # Whether no gradient enters the model at all: to adapters it has to pass through frozen layers.
        self.freeze = freeze
        self.stem_is_frozen = freeze or adapted or freeze_feature_extractor or freeze_layers > 0
        if freeze or adapted:
            self._frozen_parts = [self.model]
        else:
            self._frozen_parts = [self.stem] if self.stem_is_frozen else []
            if freeze_layers:
                self._frozen_parts += [*self.front, *self.blocks[:freeze_layers]]
        for part in self._frozen_parts:
            part.requires_grad_(False)

    def _prepare_sum(self, weighted_layers, standardise_layers):
        depth = len(self.blocks)
        if weighted_layers == "all":
            weighted_layers = list(range(depth + 1))
        self.weighted_layers = weighted_layers
        self.standardise_layers = standardise_layers
        if weighted_layers is not None:
            wrong = [layer for layer in weighted_layers if not 0 <= layer <= depth]
            if wrong or not weighted_layers:
                raise EncoderError(
                    f"weighted_layers is {weighted_layers}; this encoder has states 0 (before the first layer) "
                    f"to {depth}"
                )
            # The name and form of Hugging Face's use_weighted_layer_sum: softmax over one number per state.
            self.layer_weights = nn.Parameter(torch.zeros(len(weighted_layers)))

    @property
    def width(self):
        """Features of a frame."""
        return self.model.config.hidden_size

    def train(self, mode=True):
        """Set the mode; frozen parts stay in evaluation mode, or dropout would make them drift.

        Adapters follow the mode: in training their own dropout acts, that of the frozen encoder around them does not.
        """
        super().train(mode)
        for part in getattr(self, "_frozen_parts", ()):
            part.eval()
        for layer in self._adapted:
            layer.train(mode)
        return self

    def merge_adapters(self):
        """Make adapters, where there are any, part of the encoder's weights, in place and for good."""
        if self._adapted:
            adapters.merge(self.model)
        self._adapted = ()

    def forward(self, wavs, wav_lens=None):
        """Encode waveforms.

        Arguments
        ---------
        wavs : (batch, samples) torch.Tensor
            16 kHz, padded at the end; what stands in the padding has no influence.
        wav_lens : (batch,) torch.Tensor
            Length of each clip as a share of the longest; None where nothing is padded.

        Returns
        -------
        frames : (batch, frames, features) torch.Tensor
        valid : (batch, frames) torch.Tensor
            True where a frame belongs to the clip.
        """
        states, valid = self.used_states(wavs, wav_lens)
        return self.combine(states), valid

    def used_states(self, wavs, wav_lens=None):
        """Encode waveforms up to the learned sum of layers, where there is one.

        Returns
        -------
        states : list of (batch, frames, features) torch.Tensor
            What `combine` takes: the states that are summed, standardised where they are to be; or the last one alone.
        valid : (batch, frames) torch.Tensor
        """
        if self.weighted_layers is None:
            state, valid = self._run(wavs, wav_lens, all_states=False)
            return [state], valid
        states, valid = self._run(wavs, wav_lens, all_states=True)
        chosen = [states[layer] for layer in self.weighted_layers]
        if self.standardise_layers:
            chosen = [nn.functional.layer_norm(state, state.shape[-1:]) for state in chosen]
        return chosen, valid

    def combine(self, states):
        """Sum states with the learned weights: list of (batch, frames, features) torch.Tensor -> one such."""
        if self.weighted_layers is None:
            return states[0]
        weights = torch.softmax(self.layer_weights, dim=0)
        return sum(weight * state for weight, state in zip(weights, states, strict=True))

    def hidden_states(self, wavs, wav_lens=None):
        """Encode waveforms and keep every layer.

        Returns
        -------
        states : tuple of (batch, frames, features) torch.Tensor
            State 0 enters the first layer; state k leaves layer k.
        valid : (batch, frames) torch.Tensor
        """
        return self._run(wavs, wav_lens, all_states=True)

    def _run(self, wavs, wav_lens, all_states):
        counts = sample_counts(wavs, wav_lens)
        wavs = self._own_scale(wavs, counts)
        short = self.minimum_samples - wavs.shape[1]
        if short > 0:
            wavs = nn.functional.pad(wavs, (0, short))
        # A clip too short for the convolutions counts as if silence followed it, alone and in a batch.
        counts = counts.clamp(min=self.minimum_samples)
        # Where nothing is padded the model runs unmasked, so that the result is Hugging Face's to the last bit.
        padded = wav_lens is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not (self.freeze or self.held)):
            output = self._encode(wavs, counts, padded, all_states)
        valid = _valid(self.frame_counts(counts), output.last_hidden_state.shape[1])
        return output.hidden_states if all_states else output.last_hidden_state, valid

    def _checkpointed(self, forward, *arguments, **keywords):
        """A block, which in training keeps only what enters it; the backward pass computes the rest again.

        Not Hugging Face's switch: it leaves out layers in evaluation mode, as those around adapters are, and takes in
        the convolutions, whose masks are gone by the time of the backward pass.
        """
        if self.training and torch.is_grad_enabled():
            return checkpoint(forward, *arguments, use_reentrant=False, **keywords)
        return forward(*arguments, **keywords)

    def _own_scale(self, wavs, counts):
        """Clear the padding and, where the encoder was trained so, bring each clip to zero mean and unit variance."""
        with torch.autocast(wavs.device.type, enabled=False):
            mask = _valid(counts, wavs.shape[1])
            wavs = wavs.float().masked_fill(~mask, 0.0)
            if not self.normalize_wav:
                return wavs
            counts = counts.unsqueeze(1)
            mean = wavs.sum(dim=1, keepdim=True) / counts
            centred = (wavs - mean).masked_fill(~mask, 0.0)
            variance = centred.square().sum(dim=1, keepdim=True) / counts
            return centred / torch.sqrt(variance + _NORMALISATION_FLOOR)

    def _from_pretrained(self, source, save_path, cache_dir, device=None, **kwargs):
        """Load from a local folder and insist on whole weights: the stock lobe draws missing ones at random."""
        if not self._weights:
            self.model = self._without_weights(**kwargs)
            return
        try:
            model, info = AutoModel.from_pretrained(
                source, config=self.config, dtype=torch.float32, output_loading_info=True, **kwargs
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise EncoderError(f"the encoder in {source} cannot be loaded: {str(error).splitlines()[0]}") from error
        missing = [key for key in info["missing_keys"] if not self._may_be_missing(key)]
        if missing:
            raise EncoderError(
                f"the weights in {source} lack {len(missing)} tensors of the encoder, {missing[0]} for one; "
                "the folder holds another model or a damaged file"
            )
        self.model = model

    def _without_weights(self, **kwargs):
        """The model as its configuration describes it, for weights that are loaded later."""
        return AutoModel.from_config(self.config, **kwargs)

    def _take_weights(self, path):
        """Load the encoder's weights of a bundle: all that there are, but for blocks that `num_layers` leaves out."""
        state = self.model.state_dict()
        try:
            with safe_open(path, framework="pt") as file, torch.no_grad():
                names = {key.removeprefix(_IN_BUNDLE): key for key in file.keys() if key.startswith(_IN_BUNDLE)}  # noqa: SIM118
                self._require_keys(path, state.keys(), names.keys())
                for name, value in state.items():
                    if name in names:
                        value.copy_(file.get_tensor(names[name]))
                        if not torch.isfinite(value).all():
                            raise EncoderError(f"{path} has NaN or infinity in {names[name]}: nothing can come of it")
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = str(error).splitlines()[0]
            raise EncoderError(f"the encoder's weights in {path} cannot be taken: {problem}") from error

    def _require_keys(self, path, expected, found):
        # SpecAugment's vector is there or not as the configuration's mask_time_prob is, which may be overridden.
        differing = {key for key in expected ^ found if not key.endswith("masked_spec_embed")}
        if missing := sorted(differing & expected):
            raise EncoderError(f"{path} lacks {len(missing)} tensors of the encoder, {missing[0]} for one")
        blocks = {key: int(match[1]) for key in differing if (match := re.match(r"(?:encoder\.)?layers\.(\d+)\.", key))}
        if extra := sorted(key for key in differing if blocks.get(key, -1) < len(self.blocks)):
            raise EncoderError(f"{path} has {len(extra)} tensors that the encoder has not, {extra[0]} for one")

    def describe(self):
        """What `build_encoder` needs to build this encoder again, as plain JSON without paths."""
        config, preprocessor = (json.loads(part.to_json_string()) for part in (self.config, self.feature_extractor))
        return {
            "family": self.config.model_type,
            "config": {key: value for key, value in config.items() if key not in NOT_ARCHITECTURE},
            "preprocessor": {key: value for key, value in preprocessor.items() if key not in NOT_ARCHITECTURE},
            "weighted_layers": self.weighted_layers,
            "standardise_layers": self.standardise_layers,
        }

    def _may_be_missing(self, key):
        # Drawn at random by Hugging Face where SpecAugment was never used; never used here either.
        return key.endswith("masked_spec_embed")


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
        # Hugging Face's own derives it from a mask of samples, and waits for a GPU to do so.
        self.model._get_feature_vector_attention_mask = _mask_of_frames

    @property
    def stem(self):
        """The convolutions on the waveform."""
        return self.model.feature_extractor

    @property
    def front(self):
        """What stands between the stem and the first transformer block."""
        parts = [self.model.feature_projection, self.model.encoder.pos_conv_embed]
        if not self.config.do_stable_layer_norm:
            parts.append(self.model.encoder.layer_norm)
        return parts

    @property
    def blocks(self):
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
        with contextlib.ExitStack() as stack:
            self.stem.counts = counts
            stack.callback(setattr, self.stem, "counts", None)
            norm = self.stem.conv_layers[0].layer_norm
            if isinstance(norm, MaskedGroupNorm):
                kernel, stride = self.config.conv_kernel[0], self.config.conv_stride[0]
                first_frames = (wavs.shape[1] - kernel) // stride + 1
                norm.valid = _valid((counts - kernel) // stride + 1, first_frames)
                stack.callback(setattr, norm, "valid", None)
            valid = _valid(self.frame_counts(counts), self.frame_counts(wavs.shape[1]))
            # data2vec-audio stacks positional convolutions, each of which carries padding into the next.
            if positional := getattr(self.model.encoder.pos_conv_embed, "layers", None):
                padding = ~valid.unsqueeze(1)
                for layer in positional:
                    hook = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].masked_fill(padding, 0.0),))
                    stack.callback(hook.remove)
            return self.model(wavs, attention_mask=valid, output_hidden_states=all_states)


class EncoderHalf(InvariantEncoder, HFTransformersInterface):
    """What Moonshine and Whisper share: their decoder is dropped, so a folder may leave it out.

    Arguments as in `make_encoder`.
    """

    def _adapt(self, source):
        self.load_feature_extractor(source, cache_dir=None)
        self.model = self.model.encoder

    def _may_be_missing(self, key):
        return not key.startswith("encoder.")

    def _without_weights(self, **kwargs):
        # The decoder is dropped at once: on this device it takes no memory.
        with torch.device("meta"):
            whole = AutoModel.from_config(self.config, **kwargs)
        if torch.get_default_device().type != "meta":
            whole.encoder = type(whole.encoder)(whole.encoder.config)
        return whole

    @property
    def blocks(self):
        """Transformer blocks."""
        return self.model.layers

    def _output(self, states, all_states):
        """States before and after each block as Hugging Face gives them: the last one is the normalised output."""
        states[-1] = self.model.layer_norm(states[-1])
        return BaseModelOutput(states[-1], hidden_states=tuple(states) if all_states else None)


class MoonshineEncoder(EncoderHalf):
    """The encoder of Moonshine (Jeffries et al. 2024): waveform in, small enough for a CPU, trained on recognition."""

    _DEPTH = "encoder_num_hidden_layers"

    def _adapt(self, source):
        super()._adapt(source)
        self.normalize_wav = self.feature_extractor.do_normalize
        self.model.groupnorm = MaskedGroupNorm.replacing(self.model.groupnorm)

    @property
    def stem(self):
        """The convolutions on the waveform."""
        return nn.ModuleList([self.model.conv1, self.model.groupnorm, self.model.conv2, self.model.conv3])

    @property
    def front(self):
        """What stands between the stem and the first transformer block: rotary embeddings, without parameters."""
        return []

    # (kernel, stride) of the three convolutions, which Hugging Face's configuration does not hold.
    _CONVOLUTIONS = ((127, 64), (7, 3), (3, 2))
    minimum_samples = 127 + ((7 - 1) + (3 - 1) * 3) * 64

    def frame_counts(self, counts):
        """Frames of clips of so many samples; both (batch,) torch.Tensor of int64, or both int."""
        for kernel, stride in self._CONVOLUTIONS:
            counts = (counts - kernel) // stride + 1
        return counts

    def _encode(self, wavs, counts, padded, all_states):
        model, valid = self.model, None
        if padded:
            kernel, stride = self._CONVOLUTIONS[0]
            model.groupnorm.valid = _valid((counts - kernel) // stride + 1, (wavs.shape[1] - kernel) // stride + 1)
            valid = _valid(self.frame_counts(counts), self.frame_counts(wavs.shape[1]))
        try:
            frames = model.groupnorm(torch.tanh(model.conv1(wavs.unsqueeze(1))))
        finally:
            model.groupnorm.valid = None
        frames = nn.functional.gelu(model.conv3(nn.functional.gelu(model.conv2(frames)))).transpose(1, 2)
        # Hugging Face's own forward pass takes a mask over samples, which counts frames that reach into the padding.
        mask = create_bidirectional_mask(model.config, inputs_embeds=frames, attention_mask=valid)
        places = torch.arange(frames.shape[1], device=frames.device).unsqueeze(0)
        turns = model.rotary_emb(frames, position_ids=places)
        states = [frames]
        for layer in model.layers:
            frames = layer(frames, attention_mask=mask, position_ids=places, position_embeddings=turns)
            states.append(frames)
        return self._output(states, all_states)


class WhisperEncoder(EncoderHalf):
    """The encoder of Whisper (Radford et al. 2022) on a clip's own frames, 50 a second, instead of on 30 s.

    Hugging Face pads each clip with silence to 30 s and attends to all of it; here a batch is as long as its longest
    clip. A clip of 30 s gives Hugging Face's frames; what lasts longer has no positions and is refused.
    """

    _DEPTH = "encoder_layers"
    # Whisper's spectrogram is scaled by its own maximum, its waveform not at all.
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
        self._maximum_samples = self.model.max_source_positions * self.model.conv2.stride[0] * self._hop
        if self._maximum_samples <= self._window_length // 2:
            raise EncoderError(
                f"{source} has positions for {self._maximum_samples} samples, fewer than half a window of "
                f"{self._window_length}"
            )
        # Not persistent: the state dict has Hugging Face's keys alone.
        self.register_buffer("_window", torch.hann_window(extractor.n_fft), persistent=False)
        self.register_buffer("_mel", torch.from_numpy(extractor.mel_filters.T).float(), persistent=False)

    @property
    def stem(self):
        """The convolutions on the spectrogram."""
        return nn.ModuleList([self.model.conv1, self.model.conv2])

    @property
    def front(self):
        """What stands between the stem and the first transformer block: fixed sinusoids, by position."""
        return [self.model.embed_positions]

    def frame_counts(self, counts):
        """Frames of clips of so many samples; both (batch,) torch.Tensor of int64."""
        return (self._mel_counts(counts) + 1) // 2

    def _mel_counts(self, counts):
        return (counts + self._hop - 1) // self._hop

    def _log_mel(self, wavs, counts):
        """Log-mel spectrogram (batch, bins, frames), zero after a clip's end, and the mask (batch, 1, frames) of clips.

        As Hugging Face computes it for the clip followed by silence, but that its maximum is over true frames.
        """
        valid = _valid(self._mel_counts(counts), self._mel_counts(wavs.shape[1])).unsqueeze(1)
        # The last true window looks into the silence that follows; at 30 s there is none, and torch reflects the clip.
        wavs = nn.functional.pad(wavs, (0, self._window_length // 2))[:, : self._maximum_samples]
        with torch.autocast(wavs.device.type, enabled=False):
            spectrum = torch.stft(wavs, self._window_length, self._hop, window=self._window, return_complex=True)
            power = spectrum[..., : valid.shape[-1]].abs().square()
            mel = (self._mel @ power).clamp(min=1e-10).log10()
            loudest = mel.masked_fill(~valid, -torch.inf).amax(dim=(1, 2), keepdim=True)
            return ((torch.maximum(mel, loudest - 8.0) + 4.0) / 4.0).masked_fill(~valid, 0.0), valid

    def _encode(self, wavs, counts, padded, all_states):
        if wavs.shape[1] > self._maximum_samples:
            raise AudioError(
                TOO_LONG,
                f"a clip lasts {wavs.shape[1] / SAMPLE_RATE:.1f} s, but Whisper has positions for "
                f"{self._maximum_samples / SAMPLE_RATE:g} s: set max_seconds or crop_seconds to that or less",
            )
        model = self.model
        frames, valid = self._log_mel(wavs, counts)
        # Between the convolutions the padding is cleared again, or the first one's bias would leak out of it.
        frames = nn.functional.gelu(model.conv1(frames)).masked_fill(~valid, 0.0)
        frames = nn.functional.gelu(model.conv2(frames)).transpose(1, 2)
        frames = frames + model.embed_positions.weight[: frames.shape[1]]
        frames = nn.functional.dropout(frames, model.dropout, model.training)
        mask = None
        if padded:
            mask = _valid(self.frame_counts(counts), frames.shape[1])
            mask = create_bidirectional_mask(model.config, inputs_embeds=frames, attention_mask=mask)
        states = [frames]
        for layer in model.layers:
            if not (layer.training and model.layerdrop and torch.rand(()) < model.layerdrop):
                frames = layer(frames, mask)
            states.append(frames)
        return self._output(states, all_states)


# Hugging Face's model_type -> class. A family is listed only where a test shows that a clip's frames are the same
# alone and in any batch.
FAMILIES = {
    "wav2vec2": Wav2Vec2Encoder,
    "hubert": Wav2Vec2Encoder,
    "wavlm": Wav2Vec2Encoder,
    "data2vec-audio": Wav2Vec2Encoder,
    "moonshine": MoonshineEncoder,
    "whisper": WhisperEncoder,
}


def make_encoder(
    source,
    save_path=None,
    freeze=False,
    freeze_feature_extractor=True,
    freeze_layers=0,
    num_layers=None,
    weighted_layers=None,
    standardise_layers=False,
    config_overrides=None,
    attn_implementation=None,
    lora_rank=None,
    lora_alpha=None,
    lora_dropout=0.0,
    gradient_checkpointing=False,
    from_bundle=None,
):
    """Load a pretrained encoder, from the Hub or a local folder, as the class of its family.

    Arguments
    ---------
    source : str
        A local folder (config.json, weights, preprocessor_config.json) or a name on the Hub.
    save_path : str
        Where downloads are kept; None for Hugging Face's own cache.
    freeze : bool
        Train nothing of the encoder (but the weights of `weighted_layers`).
    freeze_feature_extractor : bool
        Do not train the convolutions on the waveform, and do no backward work in them.
    freeze_layers : int
        Do not train the lowest so many transformer blocks, nor what stands before them.
    num_layers : int
        Keep only the lowest so many transformer blocks; None keeps all.
    weighted_layers : list of int, or "all"
        Return a learned weighted sum of these hidden states (0 enters the first block) instead of the last one.
    standardise_layers : bool
        Bring each frame of each summed state to zero mean and unit variance first (layer norm without parameters).
    config_overrides : dict
        Values of the Hugging Face configuration to change, such as `layerdrop` or `attention_dropout`.
    attn_implementation : str
        "sdpa", "eager" or "flash_attention_2", as in Hugging Face; None for
        `accent_plugin.dropout.attend`, which is the first of them but where that is slow.
    lora_rank : int
        Freeze the encoder's own weights and train low-rank adapters of this rank in its transformer blocks, but for
        the `freeze_layers` lowest (Hu et al. 2021); None for no adapters.
    lora_alpha : float
        The adapters are scaled by lora_alpha / lora_rank; None for twice the rank.
    lora_dropout : float
        Share of the adapters' input that is dropped in training.
    gradient_checkpointing : bool
        Keep only what enters each transformer block, and compute the rest again in the backward pass (Chen et al.
        2016): less memory, the same gradients, a slower step.
    from_bundle : str
        Folder of a bundle, or of a Hugging Face classifier, whose encoder is taken instead of `source`.

    Returns
    -------
    InvariantEncoder
        Its forward pass maps waveforms to frames and a mask of valid frames.

    Raises
    ------
    EncoderError
        If the folder is missing or incomplete, the Hub cannot be reached, the family is not supported, or adapters are
        asked for and PEFT is not installed.
    BundleError
        If the bundle is damaged.
    """
    options = {
        "freeze": freeze,
        "freeze_feature_extractor": freeze_feature_extractor,
        "freeze_layers": freeze_layers,
        "num_layers": num_layers,
        "weighted_layers": weighted_layers,
        "standardise_layers": standardise_layers,
        "config_overrides": config_overrides,
        "attn_implementation": attn_implementation,
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "gradient_checkpointing": gradient_checkpointing,
    }
    if from_bundle is not None:
        find_start(from_bundle)
        if bundle_config.is_bundle(from_bundle):
            return _of_bundle(Path(from_bundle), options)
        source = from_bundle
    folder = local_folder(source, save_path)
    config = read_config(folder)
    if config.model_type not in FAMILIES:
        raise EncoderError(
            f"{source} is of the family {config.model_type!r}, whose output has not been shown to be independent of "
            f"the batch; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[config.model_type](str(folder), "", **options)


def build_encoder(description):
    """Build an encoder again, with random weights.

    Arguments
    ---------
    description : dict
        What `InvariantEncoder.describe` gave. Nothing in it is run; a family, or a key of the configuration, that is
        not known is refused.

    Returns
    -------
    InvariantEncoder
        Frozen.

    Raises
    ------
    EncoderError
        If it describes no encoder.
    """
    summed = {key: description[key] for key in ("weighted_layers", "standardise_layers")}
    return _described(description, freeze=True, **summed)


def _of_bundle(folder, options):
    config, path = bundle_config.read(folder), folder / bundle_config.WEIGHTS_FILE
    bundle_config.require_identity(path, config)
    return _described(config["model"]["encoder"], weights_file=path, **options)


def _described(description, **options):
    family = description["family"]
    if family not in FAMILIES:
        raise EncoderError(f"the encoder's family {family!r} is unknown; known are {', '.join(FAMILIES)}")
    known = CONFIG_MAPPING[family]().to_dict().keys() - set(NOT_ARCHITECTURE)
    if strange := sorted(description["config"].keys() - known):
        # Quoted, since a stranger chose them.
        names = ", ".join(map(repr, strange[:5]))
        raise EncoderError(f"the encoder's configuration has keys that a {family} has not: {names}")
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("config", description["config"]), ("preprocessor_config", description["preprocessor"])):
            text = json.dumps(content | ({"model_type": family} if name == "config" else {}))
            Path(folder, f"{name}.json").write_text(text, encoding="utf-8")
        try:
            return FAMILIES[family](folder, "", weights=False, **options)
        except EncoderError:
            raise
        except Exception as error:
            # Hugging Face's constructors check little: a wrong value fails somewhere in torch.
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            raise EncoderError(f"the encoder's configuration describes no {family}: {problem}") from error


def find_source(source):
    """Check that an encoder's source is a usable folder or a well-formed Hub name, without loading anything.

    Raises
    ------
    EncoderError
        If it is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise EncoderError(f"the encoder's folder {source} has no config.json; give a Hugging Face model folder")
        if not (folder / "preprocessor_config.json").is_file():
            raise EncoderError(f"the encoder's folder {source} has no preprocessor_config.json beside its config.json")
        if not (list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))):
            raise EncoderError(f"the encoder's folder {source} has no weights (*.safetensors or *.bin)")
        return folder
    looks_local = str(source).startswith((".", "/", "~")) or str(source).count("/") > 1 or folder.exists()
    try:
        validate_repo_id(str(source))
    except HFValidationError:
        looks_local = True
    if looks_local:
        raise EncoderError(f"there is no folder {source}; give a Hugging Face model folder, or a name on the Hub")
    return None


def find_start(folder):
    """Check that a folder is a bundle, or a Hugging Face classifier, without loading anything.

    Raises
    ------
    EncoderError
        If it is neither.
    BundleError
        If it is a bundle and not whole.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EncoderError(f"there is no folder {folder}; give a bundle, or the folder of a Hugging Face classifier")
    if not bundle_config.is_bundle(folder):
        find_source(folder)
        found = read_config(folder).architectures or ["model without a class"]
        if not found[0].endswith("ForSequenceClassification"):
            raise EncoderError(f"{folder} holds a {found[0]}, no classifier: give it as wav2vec2_hub")
        return
    config = bundle_config.read(folder)
    if config["weights"]["file"] != bundle_config.WEIGHTS_FILE:
        raise EncoderError(f"{folder} was exported to {config['weights']['file']}, which cannot be trained")
    bundle_config.require_size(folder / bundle_config.WEIGHTS_FILE, config)


def local_folder(source, save_path=None):
    """The folder of an encoder's source; what is a name on the Hub is downloaded to `save_path`.

    Raises
    ------
    EncoderError
        If it is neither a usable folder nor to be had from the Hub.
    """
    folder = find_source(source)
    if folder is not None:
        return folder
    try:
        return Path(
            snapshot_download(
                source, cache_dir=save_path, allow_patterns=["*.json", "*.safetensors", "pytorch_model*.bin"]
            )
        )
    except Exception as error:
        # huggingface_hub raises a family of its own, httpx's and OSError for what is one thing to a user.
        raise EncoderError(
            f"{source} is neither a local folder nor to be had from the Hugging Face Hub "
            f"({type(error).__name__}); without a network, give a folder that holds it, "
            f"or fetch it first where there is one: hf download {source}"
        ) from error


def read_config(folder):
    """Hugging Face's configuration of a model's folder; no code of it is run.

    Raises
    ------
    EncoderError
        If it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise EncoderError(f"{folder / 'config.json'} cannot be read: {str(error).splitlines()[0]}") from error


def _overridden(config, overrides, num_layers, depth_key):
    for key, value in overrides.items():
        if not hasattr(config, key):
            close = difflib.get_close_matches(key, list(config.to_dict()), n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise EncoderError(f"config_overrides has {key!r}, which a {config.model_type} model does not have{hint}")
        setattr(config, key, value)
    for key in ("layerdrop", "encoder_layerdrop"):
        if hasattr(config, key) and key not in overrides:
            # Dropped layers get no gradient, which distributed training takes for an error, and cost small runs some
            # accuracy.
            setattr(config, key, 0.0)
    if num_layers is not None:
        depth = getattr(config, depth_key)
        if not 1 <= num_layers <= depth:
            raise EncoderError(f"num_layers is {num_layers}, but this encoder has {depth} layers")
        setattr(config, depth_key, num_layers)
    return config


@contextlib.contextmanager
def quiet():
    """Keep back Hugging Face's loading report and SpeechBrain's use of a deprecated call; errors still come through."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
