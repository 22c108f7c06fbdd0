"""Time and peak memory of `evaluate` on as many predictions as the largest Common Voice release has clips.

python benchmarks/report_1_9M.py --clips 1900000 --speakers 100000 --classes 16
"""

import argparse
import resource
import time

import numpy as np

from accent_plugin.evaluation.evaluate import evaluate
from accent_plugin.evaluation.predictions import ScoredClips


def peak():
    """Peak memory of this process, GiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def make(clips, speakers, classes, seed=0):
    """Make predictions with Common Voice's shape: a few speakers have most clips, a few accents most speakers."""
    rng = np.random.default_rng(seed)
    speaker = (speakers * rng.random(clips) ** 3).astype(int)
    accent = np.minimum((classes * rng.random(speakers) ** 2).astype(int), classes - 1)
    logits = rng.normal(size=(clips, classes)) + 2 * np.eye(classes)[accent[speaker]]
    return ScoredClips(
        ids=[f"common_voice_en_{i}" for i in range(clips)],
        client_ids=[f"{s:0128x}" for s in speaker] if speakers < clips else None,
        truth=accent[speaker],
        log_probabilities=logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)),
        labels=[f"accent{i}" for i in range(classes)],
        seconds=rng.gamma(5, 1.06, clips),
        gender=np.array(["", "male", "female"])[rng.integers(0, 3, clips)].tolist(),
        age=np.array(["", "teens", "twenties", "thirties", "fourties"])[rng.integers(0, 5, clips)].tolist(),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=1_900_000)
    parser.add_argument("--speakers", type=int, default=100_000, help="equal to --clips: without client IDs")
    parser.add_argument("--classes", type=int, default=16)
    parser.add_argument("--draws", type=int, default=1000)
    arguments = parser.parse_args()
    start = time.perf_counter()
    predictions = make(arguments.clips, arguments.speakers, arguments.classes)
    print(f"predictions made: {time.perf_counter() - start:.1f} s, peak so far {peak():.2f} GiB")
    start, cpu = time.perf_counter(), time.process_time()
    metrics = evaluate(predictions, draws=arguments.draws)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"evaluate:         {wall:.1f} s ({cpu:.1f} s of CPU), peak {peak():.2f} GiB")
    print(metrics["clip"]["unweighted_average_recall"])


if __name__ == "__main__":
    main()
