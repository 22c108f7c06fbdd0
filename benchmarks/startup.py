"""Seconds, CPU seconds and memory of processes that classify one file, and of the first error about a wrong YAML.

Every command is a process of its own, as on a command line. The commands take turns, so that a change in the machine's
speed affects all; ratios are within a turn. The peers are transformers' pipeline, which gets decoded samples because it
would need FFmpeg to read files, and SpeechBrain's stock interface on this package's bundle. Without BUNDLE, the models
are wav2vec2-base with random weights.

    python benchmarks/startup.py CLIP [--bundle BUNDLE] [--turns 5]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PIPELINE = """
import sys
import soundfile
from transformers import pipeline
samples, rate = soundfile.read(sys.argv[2], dtype="float32")
print(pipeline("audio-classification", model=sys.argv[1], device="cpu")({"raw": samples, "sampling_rate": rate})[0])
"""
SPEECHBRAIN = """
import sys
from speechbrain.inference.classifiers import EncoderClassifier
classifier = EncoderClassifier.from_hparams(source=sys.argv[1], savedir=sys.argv[3])
print(classifier.classify_file(sys.argv[2])[3])
"""
MAKE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import inference
inference.make(Path(sys.argv[2]))
"""
WRONG = "--lr_head", "fast"
WRONG_CODE = 2


@dataclass(frozen=True)
class Took:
    """Wall and CPU seconds, and peak memory in MiB, of one process and those that it waited for."""

    wall: float
    cpu: float
    memory: float


def run(command, code=0):
    """Run a command, and return what it took."""
    started = time.perf_counter()
    pid = os.posix_spawn(
        command[0],
        command,
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, each, os.devnull, os.O_WRONLY, 0) for each in (1, 2)],
    )
    _, status, usage = os.wait4(pid, 0)
    if os.waitstatus_to_exitcode(status) != code:
        sys.exit(f"exit code {os.waitstatus_to_exitcode(status)} of {' '.join(command)}")
    return Took(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def commands(arguments, folder):
    """Make a dict: name -> command and its exit code. The first is what the others are compared with."""
    python, clip = sys.executable, str(arguments.clip)
    found, bundle = {}, arguments.bundle
    if bundle is None:
        # In a process of its own: the memory of a process that starts others counts as theirs.
        subprocess.run([python, "-c", MAKE, str(ROOT / "benchmarks"), str(folder)], check=True)
        bundle = folder / "bundle"
        found["transformers pipeline"] = [python, "-c", PIPELINE, str(folder / "hf"), clip], 0
    classify = [python, "-m", "accent_plugin.cli", "classify", clip, "--model", str(bundle)]
    found = {"accent_plugin": (classify, 0)} | found
    found["SpeechBrain's interface"] = [python, "-c", SPEECHBRAIN, str(bundle), clip, str(folder / "saved")], 0
    found["accent_plugin, --backend torch"] = [*classify, "--backend", "torch", "--device", "cpu"], 0
    recipe = [str(ROOT / "recipes/CommonVoiceAccent/train.py"), str(ROOT / "hparams/wav2vec2_base.yaml")]
    found["train.py, to the error about a wrong YAML"] = [python, *recipe, *WRONG], WRONG_CODE
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clip", type=Path, help="an audio file")
    parser.add_argument("--bundle", type=Path, help="a trained bundle, instead of wav2vec2-base with random weights")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        running = commands(arguments, Path(folder))
        took = {name: [] for name in running}
        # The first turn fills the page cache, and is not counted.
        for turn in range(arguments.turns + 1):
            for name, (command, code) in running.items():
                found = run(command, code)
                if turn:
                    took[name].append(found)
    ours = next(iter(took.values()))
    print("| | seconds | CPU seconds | peak memory, MiB | seconds, relative to the first row |\n|---|---|---|---|---|")
    for name, found in took.items():
        walls, cpus = ([getattr(each, key) for each in found] for key in ("wall", "cpu"))
        ratios = [each.wall / own.wall for each, own in zip(found, ours, strict=True)]
        print(
            f"| {name} | {spread(walls, '.2f')} | {spread(cpus, '.1f')} | {max(each.memory for each in found):.0f} "
            f"| {spread(ratios, '.1f')} |"
        )


def spread(values, form):
    """Format the median, the minimum and the maximum."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
