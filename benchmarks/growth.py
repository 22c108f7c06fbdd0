"""Start-up time, memory and sampling time with 1,000 to 1.2 million clips, compared with SpeechBrain's sampler.

    python benchmarks/growth.py [--clips 1000 10000 100000 1200000] [--workers 2]

The manifests are generated; their rows refer to a few clips of noise with lengths like Common Voice's (log-normal, mean
5.3 s). Each combination of size and peer runs in a separate process. Its memory is the increase since before it read
the manifest. For a worker it is the memory shared with no other process (Private_Dirty in Linux's smaps_rollup), after
some batches, and after reading every row: reference counts are written to objects, and written pages are copied. It
includes what Python itself writes, which is the same for all sizes.
"""

import argparse
import gc
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

from accent_plugin.audio import codecs
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.data import manifests as data_manifests
from accent_plugin.data.manifests import DATA_ROOT
from accent_plugin.training.loaders import LoadingOptions, training_clips
from accent_plugin.versions import installed_versions

ACCENTS = ("us", "england", "australia")
FILES = 64
COLUMNS = (
    "clips",
    "of",
    "start-up (s)",
    "first batch (s)",
    "plan of an epoch (s)",
    "main process (MB)",
    "its peak (MB)",
    "a worker (MB)",
    "a worker that saw every row (MB)",
)


# ---------------------------------------------------------------------------------------------------------- the data


def make_audio(folder, seed=0):
    """Write clips of noise, and return name -> seconds."""
    rng = np.random.default_rng(seed)
    (folder / "audio").mkdir()
    seconds = {}
    for number, length in enumerate(np.clip(rng.lognormal(np.log(5.3) - 0.06, 0.35, FILES), 1, 20)):
        samples = rng.uniform(-0.3, 0.3, int(length * SAMPLE_RATE)).astype(np.float32)
        codecs.write(folder / "audio" / f"{number}.flac", samples)
        seconds[f"audio/{number}.flac"] = len(samples) / SAMPLE_RATE
    return seconds


def make_manifest(path, seconds, clips):
    """Write the recipe's CSV with IDs of realistic length and 30 clips per speaker."""
    files = list(seconds.items())
    with open(path, "w", encoding="utf-8") as file:
        file.write(",".join(data_manifests.COLUMNS) + "\n")
        for row in range(clips):
            wav, length = files[row % FILES]
            accent, client = ACCENTS[row % len(ACCENTS)], row // 30
            wav = f"{DATA_ROOT}/{wav}"
            file.write(f"{row:032x},{length:.4f},{wav},{accent},{client:0128x},male,twenties\n")


# --------------------------------------------------------------------------------------------------------- the peers


class Ours:
    """Make the recipe's own loaders."""

    def __init__(self, manifest, batch_seconds, workers):
        options = LoadingOptions(list(ACCENTS), 1986, "downsample", batch_seconds, None, None, workers)
        self.loader = training_clips(data_manifests.read_manifest(manifest), options)
        self.sampler, self.dataset = self.loader.batch_sampler, self.loader.dataset

    def plan(self, epoch):
        self.sampler.set_epoch(epoch)
        return len(self.sampler)

    def look(self):
        for place in range(len(self.dataset)):
            self.dataset.label(self.dataset.clips[place])


class SpeechBrains:
    """Make DynamicItemDataset and DynamicBatchSampler, as in SpeechBrain's recipes."""

    def __init__(self, manifest, batch_seconds, workers):
        import speechbrain as sb
        from speechbrain.dataio.batch import PaddedBatch
        from speechbrain.dataio.dataloader import SaveableDataLoader
        from speechbrain.dataio.dataset import DynamicItemDataset
        from speechbrain.dataio.sampler import DynamicBatchSampler

        @sb.utils.data_pipeline.takes("wav")
        @sb.utils.data_pipeline.provides("sig")
        def read(wav):
            return sb.dataio.dataio.read_audio(wav)

        @sb.utils.data_pipeline.takes("accent")
        @sb.utils.data_pipeline.provides("label")
        def label(accent):
            return ACCENTS.index(accent)

        replacements = {DATA_ROOT.lstrip("$"): str(manifest.parent)}
        self.dataset = DynamicItemDataset.from_csv(manifest, replacements, [read, label], ["id", "sig", "label"])
        self.sampler = DynamicBatchSampler(self.dataset, batch_seconds, num_buckets=60, seed=1986)
        self.loader = SaveableDataLoader(
            self.dataset,
            batch_sampler=self.sampler,
            num_workers=workers,
            collate_fn=PaddedBatch,
            persistent_workers=workers > 0,
        )

    def plan(self, epoch):
        self.sampler.set_epoch(epoch)
        return len(self.sampler)

    def look(self):
        with self.dataset.output_keys_as(["id", "label"]):
            for place in range(len(self.dataset)):
                self.dataset[place]


PEERS = {"accent_plugin": Ours, "speechbrain": SpeechBrains}


# ------------------------------------------------------------------------------------------- one peer, in its process


def memory(which="Rss", pid="self"):
    """Read one line of a process's smaps_rollup in MB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == which:
            return int(rest.split()[0]) * 1024 / 1e6
    raise ValueError(f"smaps_rollup has no {which}")


def peak():
    """Peak memory of this process in MB; `getrusage` of a child would include its parent's peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def timed(function, *arguments):
    start = time.perf_counter()
    found = function(*arguments)
    return found, time.perf_counter() - start


def measure(peer, manifest, options):
    """Do what a run does at its start, and print the measurements as JSON."""
    # Imports at first use must not count as memory of the data.
    PEERS[peer](manifest.parent / "few.csv", options.batch_seconds, 0)
    gc.collect()
    before = memory()
    made, start_up = timed(PEERS[peer], manifest, options.batch_seconds, options.workers)
    batches = iter(made.loader)
    _, first = timed(next, batches)
    seen = list(islice((len(batch) for batch in batches), options.batches - 1))
    workers = [memory("Private_Dirty", child.pid) for child in multiprocessing.active_children()]
    _, plan = timed(made.plan, 2)
    held = memory() - before
    print(
        json.dumps(
            {
                "start-up (s)": start_up,
                "first batch (s)": first,
                "plan of an epoch (s)": plan,
                "main process (MB)": held,
                "its peak (MB)": peak() - before,
                "a worker (MB)": max(workers, default=0.0),
                "a worker that saw every row (MB)": after_an_epoch(made),
                "batches": len(seen) + 1,
            }
        )
    )


def after_an_epoch(made):
    """Private memory of a forked process, such as a loader's worker, that has read every row."""
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()

    def look():
        made.look()
        gc.collect()
        answers.put(memory("Private_Dirty"))

    worker = fork.Process(target=look)
    worker.start()
    answer = answers.get()
    worker.join()
    return answer


# -------------------------------------------------------------------------------------------------------------- all


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_200_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=200, help="batches to read before the workers are measured")
    parser.add_argument(
        "--batch_seconds", type=float, default=60.0, help="seconds of audio in a batch, as in the YAMLs"
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        measure(*options.peers, options.folder / "train.csv", options)
        return
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        seconds = make_audio(folder)
        make_manifest(folder / "few.csv", seconds, 1)
        for clips in options.clips:
            make_manifest(folder / "train.csv", seconds, clips)
            for peer in options.peers:
                words = [sys.executable, __file__, "--folder", str(folder), "--peers", peer]
                words += ["--workers", str(options.workers), "--batches", str(options.batches)]
                words += ["--batch_seconds", str(options.batch_seconds)]
                answer = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
                found = json.loads(answer.splitlines()[-1])
                numbers = [f"{found[name]:.2f}" if "(s)" in name else f"{found[name]:.0f}" for name in COLUMNS[2:]]
                print(f"| {clips:,} | {peer} | {' | '.join(numbers)} |", flush=True)
    print(
        f"\n{options.workers} workers; workers are measured after {options.batches} batches, or all if there are fewer"
    )
    print(", ".join(f"{name} {version}" for name, version in installed_versions().items()))


if __name__ == "__main__":
    main()
