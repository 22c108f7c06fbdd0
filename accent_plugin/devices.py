"""Devices: availability, fastest precision and peak memory."""

import concurrent.futures
import contextlib
import functools
import os
import sys
import threading
import time
from pathlib import Path

import torch

from accent_plugin.errors import ConfigError

# Linux's status of this process, including its peak memory.
_STATUS = Path("/proc/self/status")

# Tests set it to False, so that a CPU runs the code for accelerators.
cpu_paths = True


def takes_cpu_path(tensor):
    """Whether to run the code for CPUs: the tensor is on a CPU, and nothing is being compiled or traced."""
    return cpu_paths and tensor.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


# One item per active `exact_fp32` block, and the settings from before the first block.
_exact_lock, _exact_users, _allowed_before = threading.Lock(), [], []


@contextlib.contextmanager
def exact_fp32():
    """Disable TF32 on NVIDIA GPUs: with its 10-bit mantissa, answers depend on the batch.

    SpeechBrain enables TF32 on import, and PyTorch enables it for convolutions. Use this as a decorator or a context
    manager. The settings apply to the whole process, so the last of several threads restores them.
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
    """Choose a precision for training on a device.

    Returns
    -------
    str
        "bf16" if the device is faster with it. Otherwise "fp16" on a GPU, with a gradient scaler, and "fp32" on other
        devices.
    """
    kind = torch.device(device).type
    if bf16_is_faster(kind):
        return "bf16"
    return "fp16" if kind == "cuda" else "fp32"


@functools.cache
def bf16_is_faster(device_type):
    """Whether the device is faster with bf16: times a few encoder-like layers once per process."""
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

    # Time one thread only: several threads would wait for those that another process delays. On Windows, the thread
    # clock ticks only 64 times a second.
    clock = time.perf_counter if sys.platform == "win32" else time.thread_time
    threads, best = torch.get_num_threads(), dict.fromkeys((False, True), float("inf"))
    try:
        torch.set_num_threads(1)
        # Alternate, because a CPU's speed drifts. The first rounds are a warm-up.
        for enabled in [False, True] * 6:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                best[enabled] = min(best[enabled], took(*weights[torch.bfloat16 if enabled else torch.float32]))
    finally:
        torch.set_num_threads(threads)
    # If the times are similar, prefer the exact precision.
    return best[True] < 0.8 * best[False]


# Number of threads -> the executor of `map_on_cores`.
_executors: dict[int, concurrent.futures.ThreadPoolExecutor] = {}
_executors_lock = threading.Lock()


def map_on_cores(work, items):
    """Map a function that computes with PyTorch over items, one item per core.

    Threads that share one operation wait for each other in each of its parts. Threads with an item each do not wait,
    and lose little where other processes delay one of them.

    Arguments
    ---------
    work : function
        Maps one item to a result.
    items : list
        Longest first, so that no core waits long at the end.

    Returns
    -------
    list
        The results, in order.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return list(map(work, items))
    return list(_executor(threads).map(work, items))


def _executor(threads):
    with _executors_lock:
        if threads not in _executors:
            ready = threading.Barrier(threads + 1)
            executor = concurrent.futures.ThreadPoolExecutor(threads, "accent_plugin", _use_one_thread, (ready,))
            for _ in range(threads):
                executor.submit(bool)
            ready.wait()
            # PyTorch also takes the last number for threads to come.
            torch.set_num_threads(threads)
            _executors[threads] = executor
    return _executors[threads]


def _use_one_thread(ready):
    # A thread takes the number for all threads when it is first asked, which would be too late.
    torch.get_num_threads()
    torch.set_num_threads(1)
    ready.wait()


# Process in which a model was first loaded with PyTorch.
_computing: int | None = None


def require_unforked():
    """Note that this process computes with PyTorch; raise a `ConfigError` in a process forked from one that does.

    A fork keeps none of the threads of PyTorch's OpenMP, and waits for them for ever. One thread needs no others.
    """
    global _computing
    if _computing is None:
        _computing = os.getpid()
    if _computing != os.getpid() and torch.get_num_threads() > 1:
        raise ConfigError(
            f"this process was forked from process {_computing}, which had loaded a model with PyTorch: its threads do "
            "not survive a fork\nstart processes with multiprocessing.get_context('spawn'), load models only after the "
            "fork, call torch.set_num_threads(1) first, or use an ONNX export"
        )


def require_device(device):
    """Raise a ConfigError if torch cannot use a device, before anything is loaded."""
    try:
        # Run a kernel: PyTorch can allocate memory even on a GPU that it was not compiled for.
        torch.ones(1, device=str(device))
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
        raise ConfigError(
            f"device {str(device)!r} cannot be used here: {problem}; choose another, such as cpu"
        ) from None


def peak_memory(device):
    """Peak memory in bytes; None on Windows, where it is not available.

    On a GPU, it is the memory of tensors since training began. Otherwise, it is all memory of this process since its
    start, without the processes that load its audio.
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
        # On Linux, getrusage includes the peak of the parent process (getrusage(2), "execve").
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, kilobytes elsewhere.
    return peak if sys.platform == "darwin" else peak * 1024
