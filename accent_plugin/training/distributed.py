"""Training on several processes, one per GPU: which process writes, and how all agree on decisions.

Started by `torchrun`, each process runs the whole recipe. Small values (stop or not, number of clips in a step,
predictions) are exchanged over a separate gloo group on the CPU, so that no GPU waits for them. Started by `python`,
there is one process, and every function here returns without communication.

PyTorch is imported where it is used: the recipe asks which process it is before it has checked the configuration.
"""

import dataclasses
import datetime
import os
import sys
import time
import uuid

from accent_plugin.errors import AccentPluginError, ConfigError
from accent_plugin.training import signals

# The other processes wait this long for the first to prepare the data. A dead process closes its connections at once.
TIMEOUT = datetime.timedelta(days=7)

# SpeechBrain's value.
JOIN_TIMEOUT = datetime.timedelta(hours=2)

# Seconds between two checks by the first process for processes that have joined.
POLL_SECONDS = 0.05

_control = None


def is_launched():
    """Whether `torchrun` started this process."""
    return "RANK" in os.environ and "LOCAL_RANK" in os.environ


def _group():
    """`torch.distributed`, if this process has joined others, otherwise None."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed


def world_size():
    """Number of processes."""
    group = _group()
    return 1 if group is None else group.get_world_size()


def rank():
    """Index of this process, from 0."""
    group = _group()
    return 0 if group is None else group.get_rank()


def is_main():
    """Whether this process is the one that writes files."""
    return rank() == 0


def is_local_main():
    """Whether this process is the first on its machine; it prints messages that would be the same in all."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def start(run_opts):
    """Join the other processes, if there are any.

    Without a GPU, or with `--device cpu`, the backend is gloo instead of SpeechBrain's default.
    Returns SpeechBrain's run options with the device and the backend chosen; fewer GPUs than processes on this machine
    are a ConfigError.
    """
    global _control
    if not is_launched():
        return run_opts
    import torch

    given = run_opts.overridden_args
    if run_opts.device == "cpu" or (run_opts.device is None and not torch.cuda.is_available()):
        if "distributed_backend" in given and run_opts.distributed_backend != "gloo":
            raise ConfigError(f"distributed_backend {run_opts.distributed_backend} needs GPUs: on CPUs, use gloo")
        chosen = {"device": "cpu", "distributed_backend": "gloo"}
        run_opts = dataclasses.replace(run_opts, **chosen, overridden_args=given | chosen.keys())
    elif "device" in given:
        raise ConfigError(f"device is {run_opts.device}, but each process uses its own GPU: remove --device")
    elif int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise ConfigError(
            f"this machine has {torch.cuda.device_count()} GPUs for {os.environ.get('LOCAL_WORLD_SIZE')} processes: "
            "lower --nproc_per_node, or train on the CPU with --device cpu"
        )
    if _group() is None:
        with signals.default_handlers():
            _join(run_opts.distributed_backend)
            _control = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)
    return run_opts


def _join(backend):
    """Join the process group like SpeechBrain's `ddp_init_group`, but ignore entries of earlier starts.

    torchrun keeps one store over all its restarts, in which PyTorch would find the addresses of dead processes. So
    each process writes a unique name to the store, and the first one replies with a prefix for this start. torchrun's
    restart count cannot serve as the prefix, because machines may count differently.
    """
    import torch
    from torch import distributed

    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, own, size = next(distributed.rendezvous("env://", timeout=JOIN_TIMEOUT))
    name = uuid.uuid4().hex
    if own:
        store.set(f"accent_plugin/{own}", name)
        start = store.get(f"accent_plugin/{name}").decode()
        store.add(f"accent_plugin/{start}", 1)
    else:
        start = name
        while store.add(f"accent_plugin/{start}", 0) < size - 1:
            for key in (f"accent_plugin/{other}" for other in range(1, size)):
                if store.check([key]):
                    store.set(f"accent_plugin/{store.get(key).decode()}", start)
            time.sleep(POLL_SECONDS)
    store = distributed.PrefixStore(start, store)
    distributed.init_process_group(backend, store=store, rank=own, world_size=size, timeout=JOIN_TIMEOUT)


def stop():
    """Leave the other processes."""
    global _control
    if (group := _group()) is not None:
        group.destroy_process_group()
        _control = None


def all_reduce_sum(values):
    """Sum each of several floats over all processes; returns a list that is equal in all of them."""
    if world_size() == 1:
        return [float(value) for value in values]
    import torch

    sums = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(sums, group=_control)
    return sums.tolist()


def all_gather(value):
    """Gather a value from every process into a list, in order of rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    _group().all_gather_object(values, value, group=_control)
    return values


def broadcast_from_main(function, *arguments, **keywords):
    """Call a function in the first process, and return its result in all.

    An `AccentPluginError` or OSError is raised in the first process; the others exit without a message.
    """
    if world_size() == 1:
        return function(*arguments, **keywords)
    result, error = None, None
    if is_main():
        try:
            result = function(*arguments, **keywords)
        except (AccentPluginError, OSError) as caught:
            error = caught
    outcome = [result, error is not None]
    _group().broadcast_object_list(outcome, src=0, group=_control)
    if error is not None:
        raise error
    if outcome[1]:
        sys.exit(2)
    return outcome[0]
