"""Classify speech of any kind and length with a trained bundle; see `accent_plugin.inference.base` for the method."""

import contextlib
import itertools
import json
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from speechbrain.inference.classifiers import EncoderClassifier
from torch import nn

from accent_plugin import devices, packing
from accent_plugin.audio.samples import SAMPLE_RATE, TOO_LONG
from accent_plugin.bundle.config import YAML_FILE
from accent_plugin.bundle.load import load_bundle
from accent_plugin.bundle.modules import Embedding
from accent_plugin.devices import bf16_is_faster, exact_fp32, require_device, require_unforked
from accent_plugin.errors import AudioError, BundleError, ConfigError
from accent_plugin.files import require_downloaded
from accent_plugin.inference.base import InferenceOptions, RecordingClassifier, buckets
from accent_plugin.packing import PackedLinear

PRECISIONS = ("fp32", "bf16", "auto")

# Audio that one core of a CPU computes at a time, in samples; a longer clip is alone. Less would use the weights too
# rarely for each time that they are read from memory.
_CORE_SAMPLES = 5 * SAMPLE_RATE


class AccentClassifier(RecordingClassifier, EncoderClassifier):
    """SpeechBrain's `EncoderClassifier` for the bundles of this package; it returns `Prediction` records.

    Create it with `from_bundle`, or with SpeechBrain's `from_hparams`. The latter executes the bundle's YAML; both
    accept the same options. The classifier is thread-safe. On a GPU, one thread at a time uses the network.

    Arguments
    ---------
    modules, hparams, run_opts, freeze_params
        As in SpeechBrain's `EncoderClassifier`; `hparams` contains "bundle_config".
    precision : str
        "fp32", "bf16", or "auto", which uses bf16 if the device is faster with it. On a CPU, this is timed once.
    **options
        Fields of `accent_plugin.inference.base.InferenceOptions`: `window_seconds`, `hop_seconds`, `batch_seconds`,
        `min_probability`, ...

    Raises
    ------
    ConfigError
        If options are invalid; the error lists all problems.
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
        require_unforked()
        super().__init__(modules=modules, hparams=hparams, run_opts=run_opts, freeze_params=freeze_params)
        self._set_up(config, options, self.device_type)
        self.uses_bf16 = precision == "bf16" or (precision == "auto" and bf16_is_faster(self.device_type))
        if isinstance(self.mods["embedding_model"], Embedding):
            _prepare_weights(self.mods["embedding_model"].model.wav2vec2, self.device_type, self.uses_bf16)
        # On other devices, concurrent batches would add up in memory.
        self._turn = contextlib.nullcontext() if self.device_type == "cpu" else threading.Lock()

    @classmethod
    def from_bundle(cls, folder, device=None, **options):
        """Load a bundle, without executing YAML or unpickling.

        Arguments
        ---------
        folder : str or Path
            The bundle, as written by training.
        device : str
            Such as "cpu" or "cuda:0"; None for the best available.
        **options
            Options of this class: `window_seconds`, `precision`, `min_probability`, ...

        Raises
        ------
        BundleError
            If the bundle is missing, damaged or contains unsafe values.
        ConfigError
            If an option is invalid.
        """
        if device is not None:
            require_device(device)
        require_unforked()
        loaded = load_bundle(folder)
        run_opts = None if device is None else {"device": str(device)}
        return cls(modules=loaded.modules, hparams=loaded.hparams, run_opts=run_opts, **options)

    @classmethod
    def from_hparams(cls, source, hparams_file=YAML_FILE, **keywords):
        """Load a bundle like SpeechBrain, which executes its YAML; raise a BundleError if there is another file."""
        require_unforked()
        require_downloaded(Path(str(source), hparams_file), BundleError)
        return super().from_hparams(source, hparams_file, **keywords)

    def _log_probabilities(self, waves):
        require_unforked()
        if self.device_type != "cpu":
            return self._run_network(waves)
        units = [[waves[index] for index in indices] for indices in buckets(list(map(len, waves)), _CORE_SAMPLES)]
        # The rest would leave cores idle: all cores share each of its operations.
        shared = len(units) % torch.get_num_threads()
        own, rest = units[: len(units) - shared], units[len(units) - shared :]
        scores = devices.map_on_cores(self._run_network, own)
        if rest:
            scores.append(self._run_network(list(itertools.chain.from_iterable(rest))))
        return np.concatenate(scores)

    def _run_network(self, waves):
        """Map (samples,) arrays to log-probabilities in one call of the network."""
        longest = max(map(len, waves))
        wavs, lens = torch.zeros(len(waves), longest), None
        for row, wave in zip(wavs, waves, strict=True):
            row[: len(wave)] = torch.from_numpy(wave)
        if any(len(wave) < longest for wave in waves):
            lens = torch.tensor([len(wave) / longest for wave in waves]).to(self.device)
        autocast = torch.autocast(self.device_type, torch.bfloat16, enabled=self.uses_bf16)
        try:
            with self._turn, exact_fp32(), torch.inference_mode(), autocast:
                embeddings = self.mods["embedding_model"](wavs.to(self.device), lens)
                log_probabilities = self.mods["classifier"](embeddings).squeeze(1)
        except AudioError as error:
            if error.reason != TOO_LONG:
                raise
            raise AudioError(
                TOO_LONG, f"window_seconds is {self.window_seconds:g}, too long for this encoder: {error}"
            ) from None
        return log_probabilities.cpu().double().numpy()


def _prepare_weights(encoder, device_type, bf16):
    """Cast the weights of linear layers to bf16, if it is used, and pack them on a CPU.

    Otherwise, autocast would cast them, and oneDNN or MKL rearrange them, in every call.
    """
    packs = device_type == "cpu" and packing.is_available()
    for name, module in list(encoder.named_modules()):
        if type(module) is not nn.Linear or nn.utils.parametrize.is_parametrized(module):
            continue
        # WavLM's attention passes its weights to a function of PyTorch.
        if packs and not (encoder.config.model_type == "wavlm" and ".attention." in name):
            encoder.set_submodule(name, PackedLinear(module, torch.bfloat16 if bf16 else torch.float32))
        elif bf16:
            module.to(torch.bfloat16)


def _read_config(hparams):
    """Read the bundle's config.json from hparams: a mapping (from_bundle) or text (from the YAML)."""
    config = (hparams or {}).get("bundle_config")
    if isinstance(config, str):
        config = json.loads(config)
    if not isinstance(config, Mapping) or not config.get("labels"):
        raise ConfigError(
            "hparams have no bundle_config with labels, so this is not a bundle of accent_plugin: load it with "
            "speechbrain.inference.EncoderClassifier"
        )
    return config
