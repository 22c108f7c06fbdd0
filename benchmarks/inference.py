"""Files per second of this package's torch backend against transformers' pipeline and SpeechBrain's stock interface.

The model is wav2vec2-base with random weights; only the head, whose cost is negligible, differs between peers. All run
in one process on the same files, in turns on small groups, so that a change in the machine's speed affects all of them.

python benchmarks/inference.py FOLDER_OF_CLIPS --files 48 --group 12
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import soundfile
import torch
from speechbrain.inference.classifiers import EncoderClassifier
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification, pipeline

from accent_plugin.bundle.write import write_bundle
from accent_plugin.devices import bf16_is_faster
from accent_plugin.encoder.factory import make_encoder
from accent_plugin.inference.classifier import AccentClassifier
from accent_plugin.model import AccentModel

LABELS = ("us", "england", "australia")


def make(folder, **shape):
    """Write a Hugging Face checkpoint of wav2vec2-base's or another shape, and a bundle with the same encoder."""
    torch.manual_seed(0)
    names = {"num_labels": 3, "id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
    model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**names, **shape))
    model.save_pretrained(folder / "hf")
    model.wav2vec2.save_pretrained(folder / "encoder")
    for name in ("hf", "encoder"):
        Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder / name)
    accents = AccentModel(make_encoder(str(folder / "encoder"), freeze=True), LABELS, projector_size=256)
    write_bundle(folder / "bundle", accents, LABELS, encoder_name="wav2vec2-base, random weights", pooling="mean")


def decoded(path):
    """Decode a file for transformers' pipeline, which would need FFmpeg; the pipeline resamples."""
    samples, rate = soundfile.read(path, dtype="float32")
    return {"raw": samples if samples.ndim == 1 else samples.mean(axis=1), "sampling_rate": rate}


def peers(folder):
    """Make a dict: name -> function that classifies a list of paths."""
    pipe = pipeline("audio-classification", model=str(folder / "hf"), device="cpu")
    stock = EncoderClassifier.from_hparams(source=str(folder / "bundle"), savedir=str(folder / "saved"))

    def run_pipeline(paths):
        for path in paths:
            pipe(decoded(path))

    def run_stock(paths):
        for path in paths:
            stock.classify_file(str(path))

    found = {"transformers pipeline, defaults": run_pipeline, "SpeechBrain classify_file, one by one": run_stock}
    for precision in ("fp32", "auto"):
        ours = AccentClassifier.from_bundle(folder / "bundle", device="cpu", precision=precision)
        found[f"accent_plugin, torch {precision}"] = lambda paths, ours=ours: list(ours.predict_files(paths))
    return found


def in_turns(running, paths, group):
    """Measure each peer's seconds for each group of files, in turns, after a warm-up of two files each."""
    groups = [paths[i : i + group] for i in range(0, len(paths), group)]
    took = {name: [] for name in running}
    for run in running.values():
        run(groups[0][:2])
    for each in groups:
        for name, run in running.items():
            start = time.perf_counter()
            run(each)
            took[name].append(time.perf_counter() - start)
    return took


def ratios(took, name):
    """Format the speed-up over the first peer: median over groups, minimum and maximum."""
    found = [other / own for other, own in zip(next(iter(took.values())), took[name], strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def files_of(arguments):
    """Find the first files of a folder, and their total duration."""
    paths = sorted(path for path in arguments.clips.iterdir() if path.is_file())[: arguments.files]
    seconds = sum(soundfile.info(path).duration for path in paths)
    print(f"{len(paths)} files, {seconds:.0f} s of audio; {torch.get_num_threads()} threads", file=sys.stderr)
    return paths, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", type=Path, help="folder of audio files")
    parser.add_argument("--files", type=int, default=48)
    parser.add_argument("--group", type=int, default=12, help="files of one turn")
    arguments = parser.parse_args()
    paths, seconds = files_of(arguments)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        took = in_turns(peers(Path(folder)), paths, arguments.group)
    print(f"bf16 is faster on this CPU: {bf16_is_faster('cpu')}")
    print("| | audio seconds per second | ratio to the pipeline (median of groups, lowest to highest) |\n|---|---|---|")
    for name, times in took.items():
        print(f"| {name} | {seconds / sum(times):.1f} | {ratios(took, name)} |")


if __name__ == "__main__":
    main()
