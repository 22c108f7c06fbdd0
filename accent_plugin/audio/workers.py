"""Process many clips in worker processes, so that a file that crashes its decoder costs only that clip."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import types
from dataclasses import dataclass

from accent_plugin.audio import codecs
from accent_plugin.audio.samples import UNDECODABLE, quantise
from accent_plugin.errors import AudioError

# Starting a worker takes as long as decoding this many clips.
_CLIPS_PER_WORKER = 100


@dataclass(frozen=True)
class ConversionJob:
    """One clip to convert: its id, source (bytes or path), target path, and limits on its length."""

    id: str
    source: bytes | str
    target: str
    min_seconds: float
    max_seconds: float


@dataclass(frozen=True)
class Converted:
    """Result of one job: a file of ``frames`` samples and ``size`` bytes, or the ``reason`` why there is none.

    ``md5`` is that of the samples; ``lost_seconds`` of the source could not be decoded.
    """

    id: str
    frames: int = 0
    size: int = 0
    md5: str = ""
    lost_seconds: float = 0.0
    reason: str = ""
    message: str = ""


def convert_files(jobs, workers=1):
    """Decode, check, resample and write many clips.

    Arguments
    ---------
    jobs : iterator of ConversionJob
        Consumed as needed, so that no more clips are in memory than there are workers.
    workers : int
        Number of processes; below 2 the work is done in this one. They import neither torch nor the main script.

    Yields
    ------
    Converted
        One for each job, in order of completion. If a worker dies, only the clip that it held is lost.

    Raises
    ------
    OSError
        When a file cannot be written.
    """
    return map_in_workers(_convert, jobs, workers, died=_lost)


def map_in_workers(work, jobs, workers=1, *, died):
    """Apply a function to many jobs in worker processes, and yield results in order of completion.

    Arguments
    ---------
    work : function
        Job -> result; defined at the top level of a module that imports neither torch nor the main script.
    jobs : iterator
        Consumed as needed, so that no more of them are in memory than there are workers. Each has an ``id``.
    workers : int
        Number of processes; below 2 the work is done in this one.
    died : function
        (id of the job, message) -> result of a job whose worker died.

    Yields
    ------
    object
        A result of ``work`` or ``died`` for each job.

    Raises
    ------
    OSError
        When ``work`` does.
    """
    return _in_processes(work, jobs, workers, died) if workers > 1 else (work(job) for job in jobs)


def worker_count(workers, clips):
    """Number of workers for so many clips: at most ``workers`` if given, else at most one per core."""
    return min(workers, clips) if workers is not None else min(core_count(), clips // _CLIPS_PER_WORKER)


def core_count():
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _convert(job):
    lost = []
    try:
        steps = quantise(codecs.load(job.source, job.min_seconds, job.max_seconds, lost))
    except AudioError as error:
        return Converted(job.id, reason=error.reason, message=str(error))
    written = codecs.write(job.target, steps)
    return Converted(job.id, len(steps), written.size, written.md5, sum(loss.seconds for loss in lost))


def _lost(id_, message):
    return Converted(id_, reason=UNDECODABLE, message=message)


def _serve(pipe, work):
    """Do the jobs from a pipe until None arrives; runs in a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionError):
        while (job := pipe.recv()) is not None:
            try:
                pipe.send(work(job))
            except OSError as error:
                pipe.send(error)


def _in_processes(work, jobs, count, died):
    """Yield results from ``count`` workers as they arrive; each worker holds at most one clip."""
    processes, busy = {}, {}

    def start():
        ours, theirs = context.Pipe()
        processes[ours] = context.Process(target=_serve, args=(theirs, work), daemon=True)
        with _main_hidden():
            processes[ours].start()
        theirs.close()
        return ours

    context = multiprocessing.get_context("spawn")
    idle = [start() for _ in range(count)]
    try:
        while True:
            # zip takes a job only for an idle worker.
            for pipe, job in zip(idle, jobs, strict=False):
                pipe.send(job)
                busy[pipe] = job.id
            if not busy:
                return
            idle = []
            ready: list = multiprocessing.connection.wait(list(busy))
            for pipe in ready:
                id_ = busy.pop(pipe)
                try:
                    answer = pipe.recv()
                except (EOFError, ConnectionError):
                    processes[pipe].join()
                    message = f"the worker that decoded it died (exit code {processes[pipe].exitcode})"
                    answer, pipe = died(id_, message), start()
                if isinstance(answer, OSError):
                    raise answer
                idle.append(pipe)
                yield answer
    finally:
        for process in processes.values():
            process.terminate()
            process.join()


@contextlib.contextmanager
def _main_hidden():
    """Hide the main script, which a spawned process would import: train.py would load torch and SpeechBrain in each."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
