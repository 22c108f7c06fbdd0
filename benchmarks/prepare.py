"""Speed and memory of preparation from MP3, compared with `datasets.map`.

    python benchmarks/prepare.py CLIPS_FOLDER [--repeat 10] [--workers 2] [--turns 5]

CLIPS_FOLDER contains *.mp3, such as a Common Voice release's `clips`; they are repeated under other names and speakers.
All peers read the same DatasetDict. The peer's function decodes with soundfile and resamples to 16 kHz with torchaudio
into datasets' cache: floats in Arrow files. This package does more: it checks each clip, finds duplicates, splits by
speaker, and writes FLAC and manifests. The peers have separate processes and take turns, so that a change in the
machine's speed affects all of them; ratios are computed within a turn.
"""

import argparse
import functools
import io
import itertools
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ACCENTS = ("us", "england", "australia")
RATE = 16_000
# MPEG 1 layer III: index in a frame's header -> kilobits per second, and Hz.
KBITS = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
RATES = (44_100, 48_000, 32_000)


@dataclass(frozen=True)
class Turn:
    """Measurements of a turn; memory is the peak of the largest process so far."""

    wall: float
    cpu: float
    audio: float
    written: int
    memory: int
    remark: str


# ---------------------------------------------------------------------------------------------------------- the clips


def later(mp3, copy):
    """Cut a number of frames from the start of an MP3, so that its copy is not dropped as a duplicate."""
    at = mp3.find(b"\xff\xfb") if copy else 0
    for _ in range(copy):
        bits = mp3[at + 2]
        at += 144_000 * KBITS[bits >> 4] // RATES[bits >> 2 & 3] + (bits >> 1 & 1)
    return mp3[at:]


def rows(clips, repeat):
    for copy in range(repeat):
        for number, path in enumerate(clips):
            name = f"{copy}-{path.name}"
            yield {
                "client_id": f"c{copy}-{number}",
                "accent": ACCENTS[number % 3],
                "path": name,
                "audio": {"bytes": later(path.read_bytes(), copy), "path": name},
            }


def make(folder, clips, repeat):
    """Save a DatasetDict of the clips, undecoded."""
    from datasets import Audio, Dataset, DatasetDict, Features, Value, disable_progress_bars

    disable_progress_bars()
    sound = {"bytes": Value("binary"), "path": Value("string")}
    features = Features(
        {"client_id": Value("string"), "accent": Value("string"), "path": Value("string"), "audio": sound}
    )
    # A tuple: datasets would spread a list over shards.
    given = {"clips": tuple(clips), "repeat": repeat}
    table = Dataset.from_generator(rows, features=features, gen_kwargs=given, cache_dir=f"{folder}/cache")
    DatasetDict(train=table.cast_column("audio", Audio())).save_to_disk(f"{folder}/data")


# ---------------------------------------------------------------------------------- one peer's turn, in its process


def run_ours(data, out, processes, threads):
    """Prepare, and return the seconds of audio that were kept and the clips that were dropped."""
    from accent_plugin.data.prepare import prepare_data

    prepared = prepare_data(data, out, accents=ACCENTS, seed=0, balance="none", workers=processes or 1, progress=False)
    seconds = sum(cell["seconds"] for split in prepared.counts.values() for cell in split.values())
    return seconds, f"dropped: {prepared.dropped}"


def run_datasets(data, out, processes, threads):
    """Fill datasets' cache, and return the seconds of audio in it."""
    import datasets
    import pyarrow.compute
    import torch
    import torchaudio  # noqa: F401 - here, so that the processes do not import it in each turn

    datasets.disable_progress_bars()
    torch.set_num_threads(threads)
    out.mkdir()
    # Undecoded: datasets' own decoding needs torchcodec and FFmpeg.
    table = datasets.load_from_disk(data)["train"].cast_column("audio", datasets.Audio(decode=False))
    found = table.map(
        resampled,
        remove_columns=["audio"],
        num_proc=processes,
        load_from_cache_file=False,
        cache_file_name=str(out / "cache.arrow"),
    )
    samples = pyarrow.compute.sum(pyarrow.compute.list_value_length(found.data["input_values"])).as_py()
    return samples / RATE, ""


def resampled(row):
    """Make a typical function for `map`."""
    import soundfile
    import torch

    samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
    samples = samples if samples.ndim == 1 else samples.mean(axis=1)
    return {"input_values": resampler(rate)(torch.from_numpy(samples)).numpy()}


@functools.cache
def resampler(rate):
    """Make torchaudio's resampler, which computes its filter once."""
    import torchaudio

    return torchaudio.transforms.Resample(rate, RATE)


RUN = {"accent_plugin": run_ours, "datasets": run_datasets}


def serve(connection, name, folder, processes, threads):
    """Run a turn in a new folder for each request."""
    turns = itertools.count()
    while _wanted(connection):
        # Kept to the end: ext4 without a journal creates files several times slower for minutes after a deletion.
        out = Path(folder, f"{name}-{processes}-{next(turns)}")
        wall, cpu = time.perf_counter(), usage("ru_utime", "ru_stime")
        audio, remark = RUN[name](f"{folder}/data", out, processes, threads)
        wall, cpu = time.perf_counter() - wall, usage("ru_utime", "ru_stime") - cpu
        written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        memory = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        connection.send(Turn(wall, cpu, audio, written, memory * 1024, remark))


def _wanted(connection):
    try:
        return connection.recv()
    except EOFError:  # all turns are over, or another peer failed
        return False


def usage(*kinds):
    """Sum over this process and its ended children."""
    return sum(
        getattr(resource.getrusage(who), kind)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        for kind in kinds
    )


# --------------------------------------------------------------------------------------------------- all, by turns


def in_turns(folder, peers, turns, threads):
    """Collect the measurements of each peer's turns, without the first, which is a warm-up."""
    context = multiprocessing.get_context("spawn")
    connections, took = {}, {peer: [] for peer in peers}
    for name, processes in peers:
        connections[name, processes], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, name, folder, processes, threads)).start()
        theirs.close()
    try:
        for turn in range(turns + 1):
            for peer, connection in connections.items():
                connection.send(True)
                try:
                    done = connection.recv()
                except EOFError:
                    sys.exit(f"{peer[0]} failed, see above")
                if turn:
                    took[peer].append(done)
    finally:
        for connection in connections.values():
            connection.close()
    return took


def spread(ours, theirs, kind):
    """Format the ratio to the other peer: median over turns, minimum and maximum."""
    found = [getattr(it, kind) / getattr(own, kind) for own, it in zip(ours, theirs, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def print_table(took):
    """Print a table with a row per peer; ratios are to datasets with the same number of processes."""
    print(
        "| | audio-s per s | per CPU second | seconds, ratio | CPU seconds, ratio | MB written | largest process, GB |"
    )
    print("|---|---|---|---|---|---|---|")
    for (name, processes), turns in took.items():
        beside = took["datasets", processes]
        many = "one process" if processes is None else f"{processes} processes"
        speeds = [statistics.median(one.audio / getattr(one, kind) for one in turns) for kind in ("wall", "cpu")]
        print(
            f"| {name}, {many} | {speeds[0]:.0f} | {speeds[1]:.0f} | {spread(turns, beside, 'wall')} "
            f"| {spread(turns, beside, 'cpu')} | {turns[-1].written / 1e6:.0f} | {turns[-1].memory / 1e9:.2f} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="folder of *.mp3")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2, help="processes of the second pair; 1 skips it")
    parser.add_argument("--turns", type=int, default=5, help="measured turns; one more is the warm-up")
    parser.add_argument(
        "--torch_threads",
        type=int,
        default=1,
        help="of each process that resamples with torchaudio; more are slower for clips this short",
    )
    arguments = parser.parse_args()
    clips = sorted(arguments.clips.glob("*.mp3"))
    if not clips:
        parser.error(f"there is no *.mp3 in {arguments.clips}")
    # None: datasets starts a process even for num_proc=1.
    counts = [None] + [arguments.workers] * (arguments.workers > 1)
    with tempfile.TemporaryDirectory() as folder:
        make(folder, clips, arguments.repeat)
        peers = [(name, count) for count in counts for name in RUN]
        took = in_turns(folder, peers, arguments.turns, arguments.torch_threads)
    for (name, _), turns in took.items():
        print(f"{name}: {turns[0].audio:.0f} s of audio in a turn; {turns[0].remark}".rstrip("; "))
    print_table(took)
    # Imports torch, which the processes above need not share.
    from accent_plugin.versions import installed_versions

    print(f"medians of {arguments.turns} turns;", ", ".join(f"{k} {v}" for k, v in installed_versions().items()))


if __name__ == "__main__":
    main()
