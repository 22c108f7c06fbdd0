"""Classify speech of any kind and length with a trained bundle; see `accent_plugin.inference.base` for how."""

import contextlib
import json
import threading
from collections.abc import Mapping

import torch
from speechbrain.inference.classifiers import EncoderClassifier
from torch import nn

from accent_plugin.audio.samples import TOO_LONG
from accent_plugin.bundle.load import load_bundle
from accent_plugin.bundle.modules import Embedding
from accent_plugin.devices import bf16_is_faster, exact_fp32, require_device
from accent_plugin.errors import AudioError, ConfigError
from accent_plugin.inference.base import InferenceOptions, RecordingClassifier

PRECISIONS = ("fp32", "bf16", "auto")


class AccentClassifier(RecordingClassifier, EncoderClassifier):
    """SpeechBrain's `EncoderClassifier` for a bundle of this package, with answers instead of tensors.

    Make it with `from_bundle`, or with SpeechBrain's `from_hparams`, which runs the bundle's YAML and takes the same
    options. May be used by several threads; on a GPU they take turns at the network.

    Arguments
    ---------
    modules, hparams, run_opts, freeze_params
        As in SpeechBrain's `Pretrained`; `hparams` has the "bundle_config".
    precision : str
        "fp32", "bf16", or "auto": bf16 where the device is faster with it, which a processor is asked once.
    **options
        Of `accent_plugin.inference.base.InferenceOptions`: `window_seconds`, `hop_seconds`, `batch_seconds`,
        `min_probability`, ...

    Raises
    ------
    ConfigError
        With all the options that are wrong.
    """

    def __init__(
        self,
        modules=None,
        hparams=None,
        run_opts=None,
        freeze_params=True,
        *,
        precision="fp32",
        **options,
    ):
        config, options = _read_config(hparams), InferenceOptions(**options)
        problems = list(options.problems())
        if precision not in PRECISIONS:
            problems.append(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
        if problems:
            raise ConfigError("\n".join(problems))
        super().__init__(modules=modules, hparams=hparams, run_opts=run_opts, freeze_params=freeze_params)
        self._set_up(config, options, self.device_type)
        self.uses_bf16 = precision == "bf16" or (precision == "auto" and bf16_is_faster(self.device_type))
        if self.uses_bf16 and isinstance(self.mods["embedding_model"], Embedding):
            _cast_weights(self.mods["embedding_model"].model.wav2vec2)
        # Elsewhere, batches of several threads at once would need memory for all of them.
        self._turn = contextlib.nullcontext() if self.device_type == "cpu" else threading.Lock()

    @classmethod
    def from_bundle(cls, folder, device=None, **options):
        """Load a bundle; runs no YAML and unpickles nothing.

        Arguments
        ---------
        folder : str or Path
            As training writes it.
        device : str
            Such as "cpu" or "cuda:0"; None for the best there is.
        **options
            Of this class: `window_seconds`, `precision`, `min_probability`, ...

        Raises
        ------
        BundleError
            When the bundle is missing, damaged or not to be trusted.
        ConfigError
            When an option is wrong.
        """
        if device is not None:
            require_device(device)
        loaded = load_bundle(folder)
        run_opts = None if device is None else {"device": str(device)}
        return cls(modules=loaded.modules, hparams=loaded.hparams, run_opts=run_opts, **options)

    def _log_probabilities(self, waves):
        longest = max(map(len, waves))
        wavs = torch.zeros(len(waves), longest)
        for row, wave in zip(wavs, waves, strict=True):
            row[: len(wave)] = torch.from_numpy(wave)
        lens = torch.tensor([len(wave) / longest for wave in waves])
        autocast = torch.autocast(self.device_type, torch.bfloat16, enabled=self.uses_bf16)
        try:
            with self._turn, exact_fp32(), torch.inference_mode(), autocast:
                embeddings = self.mods["embedding_model"](wavs.to(self.device), lens.to(self.device))
                log_probabilities = self.mods["classifier"](embeddings).squeeze(1)
        except AudioError as error:
            if error.reason != TOO_LONG:
                raise
            raise AudioError(
                TOO_LONG, f"window_seconds is {self.window_seconds:g}, too long for this encoder: {error}"
            ) from None
        return log_probabilities.cpu().double().numpy()


def _cast_weights(encoder):
    """Hold the weights of linear layers in bf16: autocast would cast them anew in every call."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear) and not nn.utils.parametrize.is_parametrized(module):
            module.to(torch.bfloat16)


def _read_config(hparams):
    """The bundle's config.json, from hparams of either door: a mapping, or its text as YAML carries it."""
    config = (hparams or {}).get("bundle_config")
    if isinstance(config, str):
        config = json.loads(config)
    if not isinstance(config, Mapping) or not config.get("labels"):
        raise ConfigError(
            "hparams have no bundle_config with labels: this is no bundle of accent_plugin; "
            "speechbrain.inference.EncoderClassifier loads others"
        )
    return config
