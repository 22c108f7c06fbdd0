"""Requests per second of `accent-plugin serve` with and without dynamic batching.

Two servers serve the same bundle. Clients send one file per request, several at once, to the two servers in turns, so
that a change in the machine's speed affects both. The answers of both are compared. To turn dynamic batching off, the
batch size is set to almost no audio, so that a batch holds one window.

    python benchmarks/serving.py BUNDLE FOLDER_OF_CLIPS
"""

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The tests' server and client.
sys.path.insert(0, str(ROOT / "tests"))

from helpers.servers import serving  # noqa: E402

ALONE = ("--batch_seconds", "0.01")


def ask(server, clients, files):
    """Classify all files, and return the seconds taken and the probabilities."""
    started = time.perf_counter()
    answers = list(clients.map(server.classify, files))
    seconds = time.perf_counter() - started
    wrong = [said for status, said in answers if status != 200]
    if wrong:
        sys.exit(f"refused: {wrong[0]['error']}")
    return seconds, [said["answers"][0]["probabilities"] for _, said in answers]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("source", type=Path)
    parser.add_argument("--requests", type=int, default=60, help="requests in a turn")
    parser.add_argument("--at_once", type=int, default=16)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--precision", default="fp32")
    options = parser.parse_args()

    paths = sorted(path for path in options.source.rglob("*") if path.suffix in (".mp3", ".flac", ".wav"))
    if not paths:
        sys.exit(f"no audio under {options.source}")
    files = [(path.name, path.read_bytes()) for path in paths[: options.requests]]
    common = ("--model", options.bundle, "--no_page", "--precision", options.precision)
    with (
        serving(*common) as together,
        serving(*common, *ALONE) as alone,
        ThreadPoolExecutor(options.at_once) as clients,
    ):
        ratios, speeds, most = [], {"together": [], "alone": []}, 0.0
        for _ in range(options.turns + 1):
            one, scores = ask(together, clients, files)
            other, same = ask(alone, clients, files)
            ratios.append(other / one)
            speeds["together"].append(len(files) / one)
            speeds["alone"].append(len(files) / other)
            most = max(abs(a[k] - b[k]) for a, b in zip(scores, same, strict=True) for k in a)
        # The first turn warms up.
        ratios, speeds = ratios[1:], {name: values[1:] for name, values in speeds.items()}
        about = json.loads(together.get("/api/model")[1])
        memory = {"together": together.memory(), "alone": alone.memory()}
    print(f"{about['encoder']}, {options.precision}: {len(files)} requests, {options.at_once} concurrent, medians of "
          f"{len(ratios)} turns")  # fmt: skip
    print("| | requests per second | ratio | MiB |")
    print("|---|---|---|---|")
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    for name, shown in (("alone", "1.00"), ("together", ratio)):
        values = speeds[name]
        speed = f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
        print(f"| {name} | {speed} | {shown} | {memory[name] >> 20} |")
    print(f"probabilities differ by at most {most:.1e}")


if __name__ == "__main__":
    main()
