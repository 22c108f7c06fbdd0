"""Classify with ONNX Runtime, without torch or SpeechBrain.

`accent-plugin export BUNDLE --to onnx` writes the folder: config.json as in a bundle, and model.onnx, the complete
graph from padded waveforms and their lengths to log-probabilities, which do not depend on the padding.
"""

import os
from pathlib import Path

import numpy as np
from scipy.special import log_softmax

from accent_plugin.audio.augment import change_speed
from accent_plugin.bundle import config as bundle_config
from accent_plugin.errors import BundleError, ConfigError
from accent_plugin.inference.base import InferenceOptions, RecordingClassifier

# Names of the inputs and the output of the graph.
WAVES, LENGTHS, LOG_PROBABILITIES = "waves", "lengths", "log_probabilities"


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
        self._speeds = config["model"]["speeds"]
        self._least = config["onnx"]["minimum_samples"]

    @classmethod
    def from_bundle(cls, folder, threads=None, providers=("CPUExecutionProvider",), **options):
        """Load an exported folder; only the graph in it is executed.

        Arguments
        ---------
        folder : str or Path
            Folder written by ``accent-plugin export --to onnx``.
        threads : int
            Threads of ONNX Runtime; None for one per core.
        providers : sequence of str
            Execution providers of ONNX Runtime in order of preference, such as "CUDAExecutionProvider".
        **options
            Fields of `accent_plugin.inference.base.InferenceOptions`: `window_seconds`, `min_probability`, ...

        Raises
        ------
        BundleError
            If the folder is missing, damaged, or holds something else.
        ConfigError
            If an option is invalid, or ONNX Runtime is not installed.
        """
        folder = Path(folder).absolute()
        config = bundle_config.read(folder)
        graph = folder / bundle_config.ONNX_FILE
        if config["weights"]["file"] != bundle_config.ONNX_FILE:
            raise BundleError(
                f"{folder} was not exported to ONNX: accent-plugin export {folder.name} --to onnx --out FOLDER"
            )
        bundle_config.require_size(graph, config)
        bundle_config.require_identity(graph, config)
        classifier = cls(_session(graph, threads, providers), config, **options)
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
        lengths = np.array([len(wave) for wave in waves], dtype=np.int64)
        padded = np.zeros((len(waves), max(self._least, *lengths)), dtype=np.float32)
        for row, wave in zip(padded, waves, strict=True):
            row[: len(wave)] = wave
        scores = self._session.run([LOG_PROBABILITIES], {WAVES: padded, LENGTHS: lengths})[0]
        return scores.astype(np.float64)


def import_onnxruntime():
    """Import ONNX Runtime without its telemetry, unless the user has set ORT_DISABLE_TELEMETRY to 0.

    It reads the variable on import; otherwise it leaves a device identifier in the home folder.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def _session(graph, threads, providers):
    try:
        onnxruntime = import_onnxruntime()
    except ImportError:
        raise ConfigError("ONNX Runtime is not installed: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    # Errors only: models from another version of the exporter cause many warnings.
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=list(providers))
    except Exception as error:
        # ONNX Runtime has a dozen exceptions without a common base class.
        raise BundleError(f"{graph} cannot be loaded by ONNX Runtime: {str(error).splitlines()[0]}") from None
    names = {each.name for each in (*session.get_inputs(), *session.get_outputs())}
    if names != {WAVES, LENGTHS, LOG_PROBABILITIES}:
        raise BundleError(
            f"{graph} has the inputs and outputs {', '.join(sorted(names))}: it was not written by accent-plugin export"
        )
    return session
