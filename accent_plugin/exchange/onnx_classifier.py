"""Classify with ONNX Runtime, without torch or SpeechBrain.

It loads a bundle as training writes it, whose graph.onnx reads the weights from model.ckpt, and a folder that
`accent-plugin export BUNDLE --to onnx` writes, with all in model.onnx. A graph maps padded waveforms and their lengths
to log-probabilities, which do not depend on the padding.
"""

from pathlib import Path

import numpy as np

from accent_plugin.audio.changes import change_speed
from accent_plugin.audio.samples import SAMPLE_RATE, TOO_LONG
from accent_plugin.bundle import config as bundle_config
from accent_plugin.bundle.config import GRAPH_FILE, LENGTHS, LOG_PROBABILITIES, ONNX_FILE, WAVES, WEIGHTS_FILE
from accent_plugin.bundle.session import open_graph
from accent_plugin.errors import AudioError, BundleError, ConfigError
from accent_plugin.evaluation.scores import log_softmax
from accent_plugin.inference.base import InferenceOptions, RecordingClassifier


class OnnxAccentClassifier(RecordingClassifier):
    """`accent_plugin.inference.AccentClassifier` on ONNX Runtime, with the same methods, records and options.

    Create it with `from_bundle`. It is thread-safe.

    Arguments
    ---------
    session : onnxruntime.InferenceSession
    config : dict
        Content of config.json.
    **options
        Fields of `accent_plugin.inference.base.InferenceOptions`; a ConfigError lists all invalid ones.
    """

    def __init__(self, session, config, **options):
        chosen = InferenceOptions(**options)
        if problems := list(chosen.problems()):
            raise ConfigError("\n".join(problems))
        self._set_up(config, chosen)
        self._session = session
        # On a CPU, the products of one window use all cores as well as those of several, and need no padding.
        self._one_by_one = session.get_providers()[0] == "CPUExecutionProvider"
        self._speeds = config["model"]["speeds"]
        limits = config["onnx"] if config["weights"]["file"] == ONNX_FILE else config["graph"]
        self._least, self._most = limits["minimum_samples"], limits.get("maximum_samples")

    @classmethod
    def from_bundle(cls, folder, threads=None, providers=("CPUExecutionProvider",), **options):
        """Load a bundle or an exported folder; only the graph in it is executed.

        Arguments
        ---------
        folder : str or Path
            The bundle, as written by training, or a folder written by ``accent-plugin export --to onnx``.
        threads : int
            Threads of ONNX Runtime; None for one per core.
        providers : sequence of str
            Execution providers of ONNX Runtime in order of preference, such as "CUDAExecutionProvider".
        **options
            Fields of `accent_plugin.inference.base.InferenceOptions`: `window_seconds`, `min_probability`, ...

        Raises
        ------
        BundleError
            If the folder is missing, damaged, or has no graph.
        ConfigError
            If an option is invalid, or ONNX Runtime is not installed.
        """
        folder = Path(folder).absolute()
        config = bundle_config.read(folder)
        if config["weights"]["file"] == ONNX_FILE:
            identities = {ONNX_FILE: config["weights"]}
        elif config.get("graph"):
            identities = {GRAPH_FILE: config["graph"], WEIGHTS_FILE: config["weights"]}
        else:
            raise BundleError(
                f"{folder} has no {GRAPH_FILE}: accent-plugin export {folder.name} --to onnx --out FOLDER makes one"
            )
        for name, identity in identities.items():
            bundle_config.require_size(folder / name, identity)
            bundle_config.require_identity(folder / name, identity)
        graph = folder / next(iter(identities))
        classifier = cls(open_graph(graph, threads, providers), config, **options)
        # Without the package onnx, the tensors themselves cannot be read.
        if not np.isfinite(classifier._log_probabilities([np.zeros(1, np.float32)])).all():
            raise BundleError(f"{graph} gives NaN for silence: its weights have NaN or infinity; export it again")
        return classifier

    def _log_probabilities(self, waves):
        copies = [self._at_speed(waves, speed) for speed in self._speeds]
        return log_softmax(np.mean(copies, axis=0), axis=1)

    def _at_speed(self, waves, speed):
        """Log-probabilities (batch, classes) of (samples,) arrays played faster by `speed`."""
        waves = waves if speed == 1 else [change_speed(wave, speed) for wave in waves]
        if self._most is not None and max(map(len, waves)) > self._most:
            raise AudioError(
                TOO_LONG,
                f"window_seconds is {self.window_seconds:g}, too long for this encoder: it takes at most "
                f"{self._most / SAMPLE_RATE:g} s",
            )
        batches = [[wave] for wave in waves] if self._one_by_one else [waves]
        return np.concatenate([self._run(batch) for batch in batches]).astype(np.float64)

    def _run(self, waves):
        """Run the graph on one batch."""
        lengths = np.array([len(wave) for wave in waves], dtype=np.int64)
        padded = np.zeros((len(waves), max(self._least, *lengths)), dtype=np.float32)
        for row, wave in zip(padded, waves, strict=True):
            row[: len(wave)] = wave
        return self._session.run([LOG_PROBABILITIES], {WAVES: padded, LENGTHS: lengths})[0]
