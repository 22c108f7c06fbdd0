"""SpeechBrain's run options: read from a command line and checked, without importing PyTorch."""

import contextlib
import dataclasses
import importlib.util
from pathlib import Path

from accent_plugin.errors import ConfigError


def _load_module():
    """Load SpeechBrain's module of run options from its file; under its name, its package would import PyTorch."""
    package = importlib.util.find_spec("speechbrain")
    file = Path(package.origin).parent / "utils" / "run_opts.py"
    spec = importlib.util.spec_from_file_location("speechbrain.utils.run_opts", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_MODULE = _load_module()

# SpeechBrain's class; a Brain only reads its fields.
RunOptions = _MODULE.RunOptions

# Run options that take several words.
LISTS = ("jit_module_keys", "compile_module_keys")

# All run options of the command line; `RunOptions` has more fields.
NAMES = (*_MODULE.HELP_TEXTS, *LISTS)

# Run options that this recipe does not support -> why, and what to do.
_UNSUPPORTED = {
    "jit": "the encoder's masks cannot be scripted: use --compile",
    "jit_module_keys": "the encoder's masks cannot be scripted: use --compile",
    "data_parallel_backend": "several GPUs take one process each: use torchrun",
    "auto_mix_prec": "it is deprecated: use --precision fp16",
    "bfloat16_mix_prec": "it is deprecated: use --precision bf16",
    "remove_vector_weight_decay": "weight_decay already leaves out biases and norms: remove it",
}

_CHOICES = {
    "compile_mode": ("default", "reduce-overhead", "max-autotune"),
    "distributed_backend": ("nccl", "gloo", "mpi"),
}


def read_run_options(hparams_file, words):
    """Read the run options among the words of a command line; a wrong one is a ConfigError."""
    try:
        _, run_opts, rest = RunOptions.from_command_line_args([hparams_file, *words])
    except SystemExit as error:
        # argparse has already printed on stderr which option is wrong.
        raise ConfigError("a run option of SpeechBrain has a wrong value, see above") from error
    if rest:
        raise ConfigError(f"SpeechBrain does not know the run option {rest}")
    with contextlib.suppress(ValueError, TypeError):
        # SpeechBrain leaves it a text.
        return dataclasses.replace(run_opts, optimizer_step_limit=int(run_opts.optimizer_step_limit))
    return run_opts


def run_option_problems(run_opts):
    """Yield the run options that are not supported, or whose value SpeechBrain does not check."""
    given = run_opts.overridden_args
    for name, reason in _UNSUPPORTED.items():
        if name in given:
            yield f"--{name} is not supported: {reason}"
    for name, choices in _CHOICES.items():
        if name in given and run_opts[name] not in choices:
            yield f"{name} is {run_opts[name]!r}; it should be one of {', '.join(choices)}"
    if "compile_module_keys" in given and run_opts.compile_module_keys != ["model"]:
        yield f"compile_module_keys is {run_opts.compile_module_keys}; the only module is model"
    limit = run_opts.optimizer_step_limit
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        yield f"optimizer_step_limit is {limit!r}; it should be a whole number, at least 1"
    if run_opts.debug_batches < 1:
        yield f"debug_batches is {run_opts.debug_batches}; it should be at least 1"
