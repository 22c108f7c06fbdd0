"""Training on several processes, one per GPU: which of them writes, and what all of them have to agree on.

Started by `torchrun`, each process runs the whole recipe. What is small and decides something (shall we stop, how many
clips had this step, what were the predictions) goes over a group of its own on the processors, so that no GPU has to
wait for it. Started by `python`, there is one process, and every function here answers without asking anybody.
"""

import dataclasses
import datetime
import os
import sys
import time
import uuid

import torch
from speechbrain.utils.distributed import is_distributed_initialized
from torch import distributed

from accent_plugin.errors import AccentPluginError, ConfigError
from accent_plugin.training import signals

# Others wait this long for the first to prepare the data; a process that died is noticed by its closed connection.
TIMEOUT = datetime.timedelta(days=7)


# As SpeechBrain's.
JOIN_TIMEOUT = datetime.timedelta(hours=2)


# Seconds between two looks of the first process at who is there.
POLL_SECONDS = 0.05


_control = None


def is_launched():
    """Whether `torchrun` started this process."""
    return "RANK" in os.environ and "LOCAL_RANK" in os.environ


def world_size():
    """Number of processes."""
    return distributed.get_world_size() if is_distributed_initialized() else 1


def rank():
    """Number of this process among all, from 0."""
    return distributed.get_rank() if is_distributed_initialized() else 0


def is_main():
    """Whether this process is the one that writes files."""
    return rank() == 0


def is_local_main():
    """Whether this process prints what all processes of its machine would say alike."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def start(run_opts):
    """Join the other processes; nothing to do where there are none.

    Without a GPU, or with `--device cpu`, the backend is gloo, whatever SpeechBrain's default says.

    Arguments
    ---------
    run_opts : speechbrain.utils.run_opts.RunOptions

    Returns
    -------
    speechbrain.utils.run_opts.RunOptions
        With the device and the backend that are used.

    Raises
    ------
    ConfigError
        When there are fewer GPUs than processes on this machine.
    """
    global _control
    if not is_launched():
        return run_opts
    given = run_opts.overridden_args
    if run_opts.device == "cpu" or (run_opts.device is None and not torch.cuda.is_available()):
        if "distributed_backend" in given and run_opts.distributed_backend != "gloo":
            raise ConfigError(f"distributed_backend {run_opts.distributed_backend} needs GPUs; without them it is gloo")
        chosen = {"device": "cpu", "distributed_backend": "gloo"}
        run_opts = dataclasses.replace(run_opts, **chosen, overridden_args=given | chosen.keys())
    elif "device" in given:
        raise ConfigError(
            f"device {run_opts.device} was given, but each process takes a GPU of its own: leave --device out"
        )
    elif int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise ConfigError(
            f"there are {torch.cuda.device_count()} GPUs here for {os.environ.get('LOCAL_WORLD_SIZE')} processes: "
            "lower --nproc_per_node, or train on the processor with --device cpu"
        )
    if not is_distributed_initialized():
        with signals.default_handlers():
            _join(run_opts.distributed_backend)
            _control = distributed.new_group(backend="gloo", timeout=TIMEOUT)
    return run_opts


def _join(backend):
    """Join as SpeechBrain's `ddp_init_group` does, but never what an earlier start has left.

    torchrun has one store for all its restarts, in which PyTorch would find the addresses of processes that are dead
    (and they all are, before new ones begin). So each process writes a name that nobody had before, and the first one
    answers with the part of the store that is this start's. How often torchrun has restarted would not do: on several
    machines they count differently.
    """
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
    if is_distributed_initialized():
        distributed.destroy_process_group()
        _control = None


def all_reduce_sum(values):
    """Sums over all processes.

    Arguments
    ---------
    values : sequence of float

    Returns
    -------
    list of float
        The same in every process.
    """
    if world_size() == 1:
        return [float(value) for value in values]
    sums = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(sums, group=_control)
    return sums.tolist()


def all_gather(value):
    """What each process has, by rank: a list with one entry where there is one process."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    distributed.all_gather_object(values, value, group=_control)
    return values


def broadcast_from_main(function, *arguments, **keywords):
    """Call a function in the first process, and give its result to all.

    A user's error is raised there; the other processes end without a word, since it has been said.
    """
    if world_size() == 1:
        return function(*arguments, **keywords)
    result, error = None, None
    if is_main():
        try:
            result = function(*arguments, **keywords)
        except (AccentPluginError, OSError) as caught:
            error = caught
    said = [result, error is not None]
    distributed.broadcast_object_list(said, src=0, group=_control)
    if error is not None:
        raise error
    if said[1]:
        sys.exit(2)
    return said[0]
