"""Pretrained speech encoders that return the same output for a clip in any batch.

With SpeechBrain's own lobes, padding changes the frames of a clip: they normalise the padded waveform or spectrogram,
normalise over time in the first convolutions, and mix padding into the clip in later ones. The encoders here compute
each step from the clip's own samples and frames. They keep the parameters and state-dict keys of Hugging Face's models,
and their output for one unpadded clip equals Hugging Face's (for Whisper: for a clip of 30 s, to which Hugging Face
pads every clip). Every family in `FAMILIES` has a test of this.
"""

import difflib
import functools
import json
import logging
import pickle
import re

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel

from accent_plugin.encoder import lora
from accent_plugin.encoder.fast_dropout import use_cpu_kernels
from accent_plugin.encoder.masking import sample_counts, valid_frames
from accent_plugin.encoder.sources import NOT_ARCHITECTURE, quiet_transformers, require_finite
from accent_plugin.errors import EncoderError

logger = logging.getLogger(__name__)

# The value in Hugging Face's Wav2Vec2FeatureExtractor, so that clips are normalised identically.
NORMALISATION_FLOOR = 1e-7

# Prefix of the encoder's tensors in a bundle, as AccentModel names them.
PREFIX = "wav2vec2.model."


class InvariantEncoder:
    """Base class of all encoders, a mix-in for a SpeechBrain lobe that returns frames and their mask.

    A family adds the frame counts, its parts and the forward pass. It names the configuration key of its layer count in
    `_DEPTH` and changes the loaded model in `_adapt`. While `detached` is set, no gradient flows into the pretrained
    model. Unlike freezing, this can be undone.

    Arguments
    ---------
    source, save_path : str
        A local folder (config.json, weights, preprocessor_config.json); the second is for the lobe.
    freeze : bool
        Freeze the encoder, except the weights of `weighted_layers`.
    freeze_feature_extractor : bool
        Freeze the convolutions on the waveform and skip their backward pass.
    freeze_layers : int
        Number of lowest transformer blocks to freeze, together with all layers before them.
    num_layers : int
        Number of lowest transformer blocks to keep; None keeps all.
    weighted_layers : list of int, or "all"
        Return a learned weighted sum of these hidden states instead of the last one. State 0 is the input of the first
        block.
    standardise_layers : bool
        Normalise each frame of each summed state to zero mean and unit variance first (layer norm without parameters).
    config_overrides : dict
        Values of the Hugging Face configuration to change, such as `layerdrop` or `attention_dropout`.
    attn_implementation : str
        "sdpa", "eager" or "flash_attention_2", as in Hugging Face. None uses
        `accent_plugin.encoder.fast_dropout.attend`: "sdpa", with a faster replacement where that is slow.
    lora_rank : int
        Freeze the encoder's own weights and train low-rank adapters of this rank in its transformer blocks (Hu et al.
        2021), except in the `freeze_layers` lowest blocks. None for no adapters.
    lora_alpha : float
        The adapters are scaled by lora_alpha / lora_rank; None for twice the rank.
    lora_dropout : float
        Dropout probability of the adapters' input in training.
    lora_targets : sequence of str
        Names of the linear layers that get an adapter.
    gradient_checkpointing : bool
        Store only the input of each transformer block and recompute the activations in the backward pass (Chen et al.
        2016). This needs less memory, gives the same gradients, and makes a step slower.
    weights : bool
        False builds the model from its configuration alone, with random weights.
    weights_file : Path
        Load the weights from this file of a bundle.
    """

    detached = False
    # Longest clip, in samples; None for any length.
    maximum_samples: int | None = None
    # Layers with adapters. The parent's constructor calls `train` before there are any.
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
        attn_implementation=None,
        lora_rank=None,
        lora_alpha=None,
        lora_dropout=0.0,
        lora_targets=(),
        gradient_checkpointing=False,
        weights=True,
        weights_file=None,
    ):
        if freeze and lora_rank is not None:
            raise EncoderError(
                "freeze and lora_rank are both given: freeze trains nothing in the encoder; give one of them"
            )
        # The parent's constructor calls override_config, which needs these.
        self._num_layers, self._config_overrides = num_layers, config_overrides or {}
        self._weights = weights
        with quiet_transformers():
            super().__init__(source, save_path, attn_implementation=attn_implementation)
        use_cpu_kernels(self.model, attention=attn_implementation is None)
        self._adapt(source)
        if weights_file is not None:
            # Adapters rename weights, so load the weights first.
            self._load_weights(weights_file)
        self._freeze_parts(freeze, freeze_feature_extractor, freeze_layers, adapted=lora_rank is not None)
        if lora_rank is not None:
            blocks = self.layers[freeze_layers:]
            self._adapted = lora.inject(blocks, lora_targets, lora_rank, lora_alpha, lora_dropout)
        if gradient_checkpointing:
            for block in self.layers:
                block.forward = functools.partial(self._checkpointed, block.forward)
        self._prepare_sum(weighted_layers, standardise_layers)
        self.train(self.training)

    def override_config(self, config):
        """Apply the overrides before the model is built, because dropout modules read their probability only then."""
        return _overridden(config, self._config_overrides, self._num_layers, self._DEPTH)

    def _freeze_parts(self, freeze, freeze_feature_extractor, freeze_layers, adapted):
        depth = len(self.layers)
        if not 0 <= freeze_layers <= depth:
            raise EncoderError(f"freeze_layers is {freeze_layers}, but this encoder has {depth} layers")
        # Whether the whole model runs without gradients. With adapters, gradients must pass through frozen layers.
        self.freeze = freeze
        self.feature_encoder_is_frozen = freeze or adapted or freeze_feature_extractor or freeze_layers > 0
        if freeze or adapted:
            self._frozen_parts = [self.model]
        else:
            self._frozen_parts = [self.feature_encoder] if self.feature_encoder_is_frozen else []
            if freeze_layers:
                self._frozen_parts += [*self.projection, *self.layers[:freeze_layers]]
        for part in self._frozen_parts:
            part.requires_grad_(False)

    def _prepare_sum(self, weighted_layers, standardise_layers):
        depth = len(self.layers)
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
            # Same name and form as in Hugging Face's use_weighted_layer_sum: a softmax over one number per state.
            self.layer_weights = nn.Parameter(torch.zeros(len(weighted_layers)))

    @property
    def width(self):
        """Number of features in a frame."""
        return self.model.config.hidden_size

    def train(self, mode=True):
        """Set the mode; frozen parts stay in evaluation mode, so that they apply no dropout.

        Adapters follow the mode: in training, their own dropout is active and the frozen encoder's is not.
        """
        super().train(mode)
        for part in getattr(self, "_frozen_parts", ()):
            part.eval()
        for layer in self._adapted:
            layer.train(mode)
        return self

    def merge_adapters(self):
        """Merge any adapters into the encoder's weights, in place; this cannot be undone."""
        if self._adapted:
            lora.merge(self.model)
        self._adapted = ()

    def forward(self, wavs, wav_lens=None):
        """Encode waveforms.

        Arguments
        ---------
        wavs : (batch, samples) torch.Tensor
            16 kHz, padded at the end. The values in the padding have no effect.
        wav_lens : (batch,) torch.Tensor
            Length of each clip as a fraction of the longest; None if nothing is padded.

        Returns
        -------
        frames : (batch, frames, features) torch.Tensor
        valid : (batch, frames) torch.Tensor
            True where a frame belongs to the clip.
        """
        states, valid = self.hidden_states(wavs, wav_lens, used_only=True)
        return self.combine(states), valid

    def combine(self, states):
        """Sum states, a list of (batch, frames, features) torch.Tensor or their stack, with the learned weights."""
        if self.weighted_layers is None:
            return states[0]
        weights = torch.softmax(self.layer_weights, dim=0)
        if isinstance(states, torch.Tensor):
            return torch.tensordot(weights, states, dims=1)
        return sum(weight * state for weight, state in zip(weights, states, strict=True))

    def hidden_states(self, wavs, wav_lens=None, used_only=False):
        """Encode waveforms and return the hidden states of all layers; arguments as in `forward`.

        With ``used_only``, return only the input of `combine`: the states of `weighted_layers`, standardised with
        `standardise_layers`, or the last state if there is no weighted sum.

        Returns
        -------
        states : sequence of (batch, frames, features) torch.Tensor
            State 0 is the input of the first layer; state k is the output of layer k.
        valid : (batch, frames) torch.Tensor
        """
        counts = sample_counts(wavs, wav_lens)
        wavs = self._normalise(wavs, counts)
        short = self.minimum_samples - wavs.shape[1]
        if short > 0:
            wavs = nn.functional.pad(wavs, (0, short))
        # A clip too short for the convolutions is extended with silence, alone and in a batch.
        counts = counts.clamp(min=self.minimum_samples)
        # Without padding, the model runs without a mask, so that the result equals Hugging Face's to the last bit.
        padded = wav_lens is not None
        last_only = used_only and self.weighted_layers is None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not (self.freeze or self.detached)):
            output = self._encode(wavs, counts, padded, all_states=not last_only)
        valid = valid_frames(self.frame_counts(counts), output.last_hidden_state.shape[1])
        if last_only:
            return [output.last_hidden_state], valid
        if not used_only:
            return output.hidden_states, valid
        chosen = [output.hidden_states[layer] for layer in self.weighted_layers]
        if self.standardise_layers:
            chosen = [nn.functional.layer_norm(state, state.shape[-1:]) for state in chosen]
        return chosen, valid

    def _checkpointed(self, forward, *arguments, **keywords):
        """Run a block; in training keep only its input, and recompute the activations in the backward pass.

        Hugging Face's own checkpointing skips layers in evaluation mode, such as frozen ones with adapters.
        """
        if self.training and torch.is_grad_enabled():
            return checkpoint(forward, *arguments, use_reentrant=False, **keywords)
        return forward(*arguments, **keywords)

    def _normalise(self, wavs, counts):
        """Zero the padding, and normalise each clip to zero mean and unit variance if the encoder expects that."""
        with torch.autocast(wavs.device.type, enabled=False):
            mask = valid_frames(counts, wavs.shape[1])
            wavs = wavs.float().masked_fill(~mask, 0.0)
            if not self.normalize_wav:
                return wavs
            counts = counts.unsqueeze(1)
            mean = wavs.sum(dim=1, keepdim=True) / counts
            centred = (wavs - mean).masked_fill(~mask, 0.0)
            variance = centred.square().sum(dim=1, keepdim=True) / counts
            return centred / torch.sqrt(variance + NORMALISATION_FLOOR)

    def _from_pretrained(self, source, save_path, cache_dir, device=None, **kwargs):
        """Load from a local folder and require all weights; SpeechBrain's lobe initialises missing ones at random."""
        if not self._weights:
            self.model = self._without_weights(**kwargs)
            return
        try:
            model, info = AutoModel.from_pretrained(
                source, config=self.config, dtype=torch.float32, output_loading_info=True, **kwargs
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise EncoderError(f"the encoder in {source} cannot be loaded: {str(error).splitlines()[0]}") from error
        except (pickle.UnpicklingError, LookupError, TypeError, AttributeError, EOFError) as error:
            # torch's reader of .bin files raises these for any other content.
            raise EncoderError(f"the weights in {source} are no PyTorch checkpoint, or more than weights") from error
        missing = [key for key in info["missing_keys"] if not self._may_be_missing(key)]
        if missing:
            raise EncoderError(
                f"the weights in {source} lack {len(missing)} tensors of the encoder, such as {missing[0]}; "
                "the folder contains another model or a damaged file"
            )
        require_finite(model.state_dict(), source, EncoderError)
        self.model = model

    def _without_weights(self, **kwargs):
        """Build the model from its configuration; its weights are loaded later."""
        return AutoModel.from_config(self.config, **kwargs)

    def _load_weights(self, path):
        """Load all encoder weights of a bundle, except blocks that `num_layers` drops."""
        state = self.model.state_dict()
        try:
            with safe_open(path, framework="pt") as file, torch.no_grad():
                names = {key.removeprefix(PREFIX): key for key in file.keys() if key.startswith(PREFIX)}  # noqa: SIM118
                self._require_keys(path, state.keys(), names.keys())
                for name, value in state.items():
                    if name in names:
                        value.copy_(file.get_tensor(names[name]))
                        if not torch.isfinite(value).all():
                            raise EncoderError(f"{path} has NaN or infinity in {names[name]}")
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = str(error).splitlines()[0]
            raise EncoderError(f"the encoder's weights in {path} cannot be loaded: {problem}") from error

    def _require_keys(self, path, expected, found):
        # The mask_time_prob of the configuration, which may be overridden, decides whether SpecAugment's vector exists.
        differing = {key for key in expected ^ found if not key.endswith("masked_spec_embed")}
        if missing := sorted(differing & expected):
            raise EncoderError(f"{path} lacks {len(missing)} tensors of the encoder, such as {missing[0]}")
        blocks = {key: int(match[1]) for key in differing if (match := re.match(r"(?:encoder\.)?layers\.(\d+)\.", key))}
        if extra := sorted(key for key in differing if blocks.get(key, -1) < len(self.layers)):
            raise EncoderError(f"{path} has {len(extra)} tensors that the encoder does not have, such as {extra[0]}")

    def describe(self):
        """Return what `build_encoder` needs to rebuild this encoder, as plain JSON without paths."""
        config, preprocessor = (json.loads(part.to_json_string()) for part in (self.config, self.feature_extractor))
        return {
            "family": self.config.model_type,
            "config": {key: value for key, value in config.items() if key not in NOT_ARCHITECTURE},
            "preprocessor": {key: value for key, value in preprocessor.items() if key not in NOT_ARCHITECTURE},
            "weighted_layers": self.weighted_layers,
            "standardise_layers": self.standardise_layers,
        }

    def _may_be_missing(self, key):
        # Without SpecAugment, Hugging Face initialises it at random. This package does not use it.
        return key.endswith("masked_spec_embed")


def _overridden(config, overrides, num_layers, depth_key):
    for key, value in overrides.items():
        if not hasattr(config, key):
            close = difflib.get_close_matches(key, list(config.to_dict()), n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise EncoderError(f"config_overrides has {key!r}, which a {config.model_type} model does not have{hint}")
        setattr(config, key, value)
    for key in ("layerdrop", "encoder_layerdrop"):
        if hasattr(config, key) and key not in overrides:
            # Layers dropped by LayerDrop get no gradient: distributed training fails, and small runs lose accuracy.
            setattr(config, key, 0.0)
    if num_layers is not None:
        depth = getattr(config, depth_key)
        if not 1 <= num_layers <= depth:
            raise EncoderError(f"num_layers is {num_layers}, but this encoder has {depth} layers")
        setattr(config, depth_key, num_layers)
    return config
