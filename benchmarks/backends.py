"""Size, load time and speed of every backend on the same files, and the accuracy of lower precisions.

The model is wav2vec2-base with random weights; the peers take turns as in inference.py. Optimum's ONNX path needs an
older transformers than this package, so it runs in a separate environment, if one is given.

python benchmarks/backends.py FOLDER_OF_CLIPS --files 96 --group 16 --optimum OTHER_ENVIRONMENT/bin/python
python benchmarks/backends.py --bundle BUNDLE --data DATASETDICT
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import inference
from transformers import pipeline

from accent_plugin.devices import bf16_is_faster
from accent_plugin.exchange import onnx_export
from accent_plugin.exchange.onnx_classifier import OnnxAccentClassifier
from accent_plugin.inference.classifier import AccentClassifier

# Reads a JSON list of files per line, and prints a line when they are classified.
OPTIMUM = """
import json, sys
import soundfile
from optimum.onnxruntime import ORTModelForAudioClassification
from transformers import AutoFeatureExtractor, pipeline
folder, target = sys.argv[1:]
model = ORTModelForAudioClassification.from_pretrained(folder, export=True)
model.save_pretrained(target)
model = ORTModelForAudioClassification.from_pretrained(target)
pipe = pipeline("audio-classification", model, feature_extractor=AutoFeatureExtractor.from_pretrained(folder))
print("ready", flush=True)
for line in sys.stdin:
    for path in json.loads(line):
        samples, rate = soundfile.read(path, dtype="float32")
        pipe({"raw": samples if samples.ndim == 1 else samples.mean(axis=1), "sampling_rate": rate})
    print("done", flush=True)
"""


class Optimum:
    """Optimum's ONNX path in another environment."""

    def __init__(self, python, folder):
        command = [python, "-c", OPTIMUM, folder / "hf", folder / "optimum"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self._process = subprocess.Popen(command, **pipes)
        self._wait("ready")

    def __call__(self, paths):
        print(json.dumps(list(map(str, paths))), file=self._process.stdin, flush=True)
        self._wait("done")

    def _wait(self, word):
        for line in self._process.stdout:
            if line.strip() == word:
                return
        raise SystemExit(f"Optimum's process ended with {self._process.wait()}")

    def close(self):
        """End the process."""
        self._process.communicate()


def megabytes(folder):
    """Size of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def speeds(arguments):
    """Print the table of size, load time and speed."""
    paths, seconds = inference.files_of(arguments)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        inference.make(folder)
        pipe = pipeline("audio-classification", model=str(folder / "hf"), device="cpu")
        running = {"transformers pipeline": lambda paths: [pipe(inference.decoded(path)) for path in paths]}
        about = {"transformers pipeline": (megabytes(folder / "hf"), None)}
        if arguments.optimum:
            running["Optimum, ONNX fp32"] = Optimum(arguments.optimum, folder)
            about["Optimum, ONNX fp32"] = megabytes(folder / "optimum"), None
        loaders = {"accent_plugin, torch fp32": (folder / "bundle", AccentClassifier, {"device": "cpu"})}
        if bf16_is_faster("cpu"):
            loaders["accent_plugin, torch bf16"] = *loaders["accent_plugin, torch fp32"][:2], {"precision": "bf16"}
        for precision in onnx_export.PRECISIONS:
            out = onnx_export.export(folder / "bundle", folder / precision, precision, unchecked=True)
            loaders[f"accent_plugin, ONNX {precision}"] = out, OnnxAccentClassifier, {}
        for name, (source, kind, options) in loaders.items():
            start = time.perf_counter()
            classifier = kind.from_bundle(source, **options)
            about[name] = megabytes(source), time.perf_counter() - start
            running[name] = lambda paths, classifier=classifier: list(classifier.predict_files(paths))
        took = inference.in_turns(running, paths, arguments.group)
        if arguments.optimum:
            running["Optimum, ONNX fp32"].close()
    print(
        "| | MB | loads in s | audio seconds per second | real-time factor | ratio to the pipeline |\n"
        "|---|---|---|---|---|---|"
    )
    for name, times in took.items():
        size, load = about[name]
        speed = seconds / sum(times)
        load = "" if load is None else f"{load:.1f}"
        print(f"| {name} | {size:.0f} | {load} | {speed:.1f} | {1 / speed:.3f} | {inference.ratios(took, name)} |")


def accuracy(arguments):
    """Print the accuracy of each precision on the test split."""
    print("| ONNX | MB | unweighted average recall | same label as fp32 |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        exact = onnx_export.export(arguments.bundle, Path(folder, "fp32"))
        for precision in onnx_export.PRECISIONS:
            out = onnx_export.export(arguments.bundle, Path(folder, precision), precision, unchecked=True)
            found = onnx_export.compare(exact, out, arguments.data, split="test")
            print(f"| {precision} | {megabytes(out):.1f} | {found.smaller:.3f} | {found.same_label:.1%} |", flush=True)
    print(f"{found.clips} clips of the test split", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", type=Path, nargs="?", help="folder of audio files")
    parser.add_argument("--files", type=int, default=48)
    parser.add_argument("--group", type=int, default=12, help="files of one turn")
    parser.add_argument("--optimum", metavar="PYTHON", help="Python of an environment with optimum-onnx[onnxruntime]")
    parser.add_argument("--bundle", help="trained bundle, to measure the accuracy of lower precisions")
    parser.add_argument("--data", help="DatasetDict with a test split")
    arguments = parser.parse_args()
    if arguments.clips:
        speeds(arguments)
    if arguments.bundle:
        accuracy(arguments)


if __name__ == "__main__":
    main()
