"""Recall on words that training has, and on words that it does not have, with a frozen encoder.

    python benchmarks/unseen_words.py DATASETDICT ENCODER [--layer 4] [--poolings mean statistics]

For a corpus in which every speaker reads the same text and the paths of their clips sort in the order of time, such as
the Speech Accent Archive. "other words": a classifier is trained on the first half of each training speaker's clips and
tested on the second half of other speakers' clips, and the other way round. "same words": trained and tested on all
clips, which are twice as many training clips; "same words, half": trained and tested on the same half. Folds are by
speaker. The classifier is a linear discriminant with equal priors and a covariance that is shrunk towards its diagonal,
fitted on the training clips alone.

Prints the unweighted average recall by clip and by speaker, the mean over several draws of the folds, with the interval
of the first draw over speakers.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from accent_plugin.audio import codecs
from accent_plugin.data import dataset_dict, splits
from accent_plugin.encoder import make_encoder
from accent_plugin.evaluation.evaluate import evaluate
from accent_plugin.evaluation.predictions import ScoredClips
from accent_plugin.pooling import make_pooling

ACCENTS = ("us", "england", "australia")
FOLDS = 5
# Name -> pairs of the half that is trained on and the half that is tested; None is all clips.
CONDITIONS = {"same words": ((None, None),), "same words, half": ((0, 0), (1, 1)), "other words": ((0, 1), (1, 0))}


def read_clips(folder, source_splits):
    """Return the clips as items and their waveforms, in the order of their paths."""
    loaded, _ = dataset_dict.open_splits(folder, source_splits, "--splits")
    clips = []
    for split, data in loaded.items():
        columns = dataset_dict.find_columns(split, data, folder, {})
        for number, cells in enumerate(dataset_dict.read_cells(data, columns)):
            content = dataset_dict.audio_bytes_or_path(data, columns, number)
            samples = codecs.load(content if isinstance(content, bytes) else folder / content)
            clips.append((splits.Item(cells["path"], cells["accent"], cells["client"]), samples))
    return tuple(zip(*sorted(clips, key=lambda clip: clip[0].id), strict=True))


def halves(items):
    """Return 0 for the first half of each speaker's clips and 1 for the second: (clips,) np.ndarray."""
    half = np.zeros(len(items), dtype=int)
    for speaker in {item.speaker for item in items}:
        own = [place for place, item in enumerate(items) if item.speaker == speaker]
        half[own[(len(own) + 1) // 2 :]] = 1
    return half


def embed(name, frames):
    """Pool the frames of all clips: (clips, features) np.ndarray."""
    pooling = make_pooling(name, frames[0].shape[1])
    with torch.inference_mode():
        vectors = [pooling(clip[None], torch.ones(1, len(clip), dtype=torch.bool)) for clip in frames]
    return torch.cat(vectors).numpy()


def scores_of(shrinkage, vectors, truth, tested):
    """Train a linear discriminant and return the log-probabilities of the tested vectors."""
    priors = np.full(len(ACCENTS), 1 / len(ACCENTS))
    classifier = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=priors)
    return classifier.fit(vectors, truth).predict_log_proba(tested)


def measure(options, name, frames, items, half):
    """Return the log-probabilities of all clips by (condition, shrinkage, draw)."""
    truth, speaker = np.array([ACCENTS.index(item.accent) for item in items]), np.array([i.speaker for i in items])
    found, vectors = {}, embed(name, frames)
    for draw in range(options.draws):
        for parts in splits.folds(items, FOLDS, valid_fraction=0.0, seed=draw):
            tested = np.isin(speaker, [item.speaker for item in parts[splits.TEST]])
            for condition, pairs in CONDITIONS.items():
                for trained_half, tested_half in pairs:
                    train = ~tested & (True if trained_half is None else half == trained_half)
                    test = tested & (True if tested_half is None else half == tested_half)
                    for shrinkage in options.shrinkages:
                        scores = found.setdefault((condition, shrinkage, draw), np.zeros((len(items), len(ACCENTS))))
                        scores[test] = scores_of(shrinkage, vectors[train], truth[train], vectors[test])
    return truth, found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("encoder")
    parser.add_argument("--layer", type=int, default=4, help="hidden state that is pooled")
    parser.add_argument("--poolings", nargs="+", choices=["mean", "statistics"], default=["mean", "statistics"])
    parser.add_argument("--shrinkages", nargs="+", type=float, default=[0.1, 0.3, 0.6, 0.9])
    parser.add_argument("--splits", nargs="+", help="splits to use; all by default")
    parser.add_argument("--draws", type=int, default=2)
    options = parser.parse_args()

    items, waves = read_clips(options.source, options.splits)
    half = halves(items)
    encoder = make_encoder(options.encoder, save_path=None, freeze=True, weighted_layers=[options.layer]).eval()
    with torch.inference_mode():
        frames = [encoder(torch.from_numpy(samples)[None])[0][0] for samples in waves]
    print(f"{len(items)} clips of {len({item.speaker for item in items})} speakers; layer {options.layer}", flush=True)
    print("| pooling | words | shrinkage | by clip | by speaker |\n|---|---|---|---|---|")
    for name in options.poolings:
        truth, found = measure(options, name, frames, items, half)
        for condition in CONDITIONS:
            for shrinkage in options.shrinkages:
                metrics = [
                    evaluate(
                        ScoredClips(
                            ids=[item.id for item in items],
                            client_ids=[item.speaker for item in items],
                            truth=truth,
                            log_probabilities=found[condition, shrinkage, draw],
                            labels=ACCENTS,
                            seconds=[len(samples) / 16_000 for samples in waves],
                        )
                    )
                    for draw in range(options.draws)
                ]
                cells = []
                for level in ("clip", "speaker"):
                    figures = [each[level]["unweighted_average_recall"] for each in metrics]
                    mean = np.mean([figure["value"] for figure in figures])
                    cells.append(f"{mean:.3f} ({figures[0]['low']:.3f} to {figures[0]['high']:.3f})")
                print(f"| {name} | {condition} | {shrinkage:g} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
