"""Which devices can be used here, and which precision each computes fastest in."""

import functools
import time

import torch

from accent_plugin.errors import ConfigError


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
        start = time.perf_counter()
        for _ in range(3):
            torch.nn.functional.conv1d(wide, kernel, stride=2)
            torch.nn.functional.linear(flat, weight)
        return time.perf_counter() - start

    best = {}
    for enabled in (False, True):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            # The first calls prepare the kernels; the least of several is what no other process disturbed.
            best[enabled] = min([took(*weights[torch.bfloat16 if enabled else torch.float32]) for _ in range(6)][1:])
    # Where it is about the same, exactness is worth more.
    return best[True] < 0.8 * best[False]


def require_device(device):
    """Refuse a device that torch cannot use here, before anything is loaded.

    Raises
    ------
    ConfigError
    """
    try:
        torch.empty(0, device=str(device))
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
        raise ConfigError(f"device {str(device)!r} cannot be used here: {problem}; cpu always can") from None
