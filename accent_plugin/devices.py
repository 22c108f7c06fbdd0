"""Which devices can be used here, which precision each computes fastest in, and how much memory was needed there."""

import contextlib
import functools
import sys
import threading
import time
from pathlib import Path

import torch

from accent_plugin.errors import ConfigError

# What Linux tells of a process, its most memory among it.
_STATUS = Path("/proc/self/status")


# Tests set it to False, so that a CPU computes what an accelerator would.
cpu_paths = True


def takes_cpu_path(tensor):
    """Whether code written for CPUs applies: the tensor is on one, and nothing is being compiled or traced."""
    return cpu_paths and tensor.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


# One item for each block of `exact_fp32` that has not ended, and the switches from before the first one.
_exact_lock, _exact_users, _allowed_before = threading.Lock(), [], []


@contextlib.contextmanager
def exact_fp32():
    """Keep NVIDIA's GPUs from rounding factors in fp32 to TF32, whose 10 bits do not give the same answer in any batch.

    SpeechBrain turns TF32 on when it is imported, PyTorch has it on for convolutions. As a decorator or a context. The
    switches are the whole process's, so the last of several threads to leave sets them back.
    """
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    with _exact_lock:
        if not _exact_users:
            _allowed_before[:] = [switch.allow_tf32 for switch in switches]
        _exact_users.append(None)
        for switch in switches:
            switch.allow_tf32 = False
    try:
        yield
    finally:
        with _exact_lock:
            _exact_users.pop()
            if not _exact_users:
                for switch, allowed in zip(switches, _allowed_before, strict=True):
                    switch.allow_tf32 = allowed


def fastest_precision(device):
    """Choose a precision for training.

    Arguments
    ---------
    device : str or torch.device

    Returns
    -------
    str
        "bf16" where the device is faster with it; else "fp16" on a GPU, where a scaler watches over its range, and
        "fp32" elsewhere.
    """
    kind = torch.device(device).type
    if bf16_is_faster(kind):
        return "bf16"
    return "fp16" if kind == "cuda" else "fp32"


@functools.cache
def bf16_is_faster(device_type):
    """Whether the device is faster with bf16: a few layers like an encoder's, timed once per process."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    wide, flat = torch.zeros(1, 256, 1600), torch.zeros(256, 512)
    weights = {
        kind: (torch.zeros(256, 256, 3, dtype=kind), torch.zeros(1024, 512, dtype=kind))
        for kind in (torch.float32, torch.bfloat16)
    }

    def took(kernel, weight):
        start = clock()
        for _ in range(3):
            torch.nn.functional.conv1d(wide, kernel, stride=2)
            torch.nn.functional.linear(flat, weight)
        return clock() - start

    # Of this thread alone: with more, each would wait for those that another process keeps from running. On Windows
    # that clock ticks 64 times a second.
    clock = time.perf_counter if sys.platform == "win32" else time.thread_time
    threads, best = torch.get_num_threads(), dict.fromkeys((False, True), float("inf"))
    try:
        torch.set_num_threads(1)
        # By turns, as a processor's speed drifts. The first ones prepare the kernels.
        for enabled in [False, True] * 6:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                best[enabled] = min(best[enabled], took(*weights[torch.bfloat16 if enabled else torch.float32]))
    finally:
        torch.set_num_threads(threads)
    # Where it is about the same, exactness is worth more.
    return best[True] < 0.8 * best[False]


def require_device(device):
    """Refuse a device that torch cannot use here, before anything is loaded.

    Raises
    ------
    ConfigError
    """
    try:
        # Something is computed: a card that this PyTorch is not compiled for can still be given memory.
        torch.ones(1, device=str(device))
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
        raise ConfigError(f"device {str(device)!r} cannot be used here: {problem}; cpu always can") from None


def peak_memory(device):
    """Most memory that was in use at once.

    Arguments
    ---------
    device : torch.device or str
        On a GPU its tensors count, since training began; otherwise all memory of this process (and not of those that
        read audio for it), since it was started.

    Returns
    -------
    int
        Bytes; None on Windows, which does not say.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource

        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except ImportError:
        return None
    except OSError:
        lines = []
    for line in lines:
        # Linux's getrusage is no less than what the process that started this one ever had (getrusage(2), "execve").
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, kilobytes elsewhere.
    return peak if sys.platform == "darwin" else peak * 1024
