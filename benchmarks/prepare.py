"""Speed and memory of preparation from MP3.

    python benchmarks/prepare.py CLIPS_FOLDER [--repeat 10] [--workers 1]

CLIPS_FOLDER holds *.mp3, such as a Common Voice release's `clips`; they are repeated under other names and speakers.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

from datasets import Audio, Dataset, DatasetDict, Features, Value

from accent_plugin import manifests

ACCENTS = ("us", "england", "australia")


def later(mp3, copy):
    """An MP3 without its first frames: the same clip twice would be left out as a duplicate."""
    return mp3[max(0, mp3.find(mp3[mp3.find(b"\xff\xfb") :][:2], copy * 700)) :]


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", type=Path)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    clips = sorted(arguments.clips.glob("*.mp3"))  # a tuple below: datasets would spread a list over shards
    sound = {"bytes": Value("binary"), "path": Value("string")}
    features = Features(
        {"client_id": Value("string"), "accent": Value("string"), "path": Value("string"), "audio": sound}
    )
    with tempfile.TemporaryDirectory() as folder:
        table = Dataset.from_generator(
            rows, features=features, gen_kwargs={"clips": tuple(clips), "repeat": arguments.repeat}, cache_dir=folder
        )
        DatasetDict(train=table.cast_column("audio", Audio())).save_to_disk(f"{folder}/data")
        start, cpu = time.time(), _cpu_seconds()
        prepared = manifests.prepare(
            f"{folder}/data",
            f"{folder}/prepared",
            accents=ACCENTS,
            seed=0,
            balance="none",
            workers=arguments.workers,
            progress=False,
        )
        wall, cpu = time.time() - start, _cpu_seconds() - cpu
    seconds = sum(cell["seconds"] for split in prepared.counts.values() for cell in split.values())
    print(f"{seconds:.0f} s of audio kept; left out: {prepared.dropped}")
    print(f"{seconds / cpu:.0f} audio-seconds per CPU second, {seconds / wall:.0f} per second")
    print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def _cpu_seconds():
    return sum(
        getattr(resource.getrusage(who), kind)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        for kind in ("ru_utime", "ru_stime")
    )


if __name__ == "__main__":
    main()
