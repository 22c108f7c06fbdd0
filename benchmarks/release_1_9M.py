"""Time and peak memory of reading, selecting, splitting and writing a release as large as Common Voice 27 in English.

The release is generated: 1.9 million rows with the columns of version 27, the same numbers of clips of the three
accents, of compound values and of distinct strings, durations for all, and an empty file for each clip. Audio is not
read; all text is synthetic.

python benchmarks/release_1_9M.py FOLDER                          # makes FOLDER/release, then measures
python benchmarks/release_1_9M.py FOLDER --accents sixteen
python benchmarks/release_1_9M.py FOLDER --rows 60000 --clients 5000 --clip FILE --embed   # memory while embedding
"""

import argparse
import os
import random
import resource
import shutil
import time
from pathlib import Path

from accent_plugin.corpus.build import build_corpus
from accent_plugin.data import labels

HEADER = (
    "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant locale segment"
).split()
# Rows of version 27; the remaining rows have no accent, like about half of the real ones.
KNOWN = {"United States English": 460_977, "England English": 163_648, "Australian English": 56_516}
COMPOUND = 81_035
FREE_STRINGS = 868
WORDS = [f"word{i}" for i in range(20_000)]


def make(folder, rows, clients, clip):
    """Write the release, with each speaker's rows scattered over the table."""
    rng = random.Random(0)
    release = folder / "cv-corpus-27.0-generated" / "en"
    (release / "clips").mkdir(parents=True)
    share = rows / 1_900_000
    others = [labels.SPELLINGS[name][0] for name in labels.PRESETS["sixteen"] if name not in labels.PRESETS["three"]]
    values = [value for value, count in KNOWN.items() for _ in range(int(count * share))]
    values += [
        f"{rng.choice(list(KNOWN))}|free text {rng.randrange(FREE_STRINGS)}" for _ in range(int(COMPOUND * share))
    ]
    values += sorted(rng.choice(others) for _ in range(int(200_000 * share)))
    values += [f"free text {rng.randrange(FREE_STRINGS)}" for _ in range(int(5_000 * share))]
    values += [""] * (rows - len(values))
    # One accent per speaker; a few speakers have most of the clips.
    numbers = sorted(int(clients * rng.random() ** 2) for _ in range(rows))
    pairs = list(zip(numbers, values, strict=True))
    rng.shuffle(pairs)
    with open(release / "validated.tsv", "w") as table, open(release / "clip_durations.tsv", "w") as durations:
        table.write("\t".join(HEADER) + "\n")
        durations.write("clip\tduration[ms]\n")
        for row, (client, value) in enumerate(pairs):
            name = f"common_voice_en_{40_000_000 + row}.mp3"
            sentence = " ".join(rng.choices(WORDS, k=9)).capitalize() + "."
            gender = ("", "male_masculine", "female_feminine")[client % 3]
            cells = (
                f"{client:0128x}",
                name,
                f"{row:064x}",
                sentence,
                "",
                "2",
                "0",
                "twenties",
                gender,
                value,
                "",
                "en",
                "",
            )
            table.write("\t".join(cells) + "\n")
            durations.write(f"{name}\t{rng.randrange(1500, 9500)}\n")
            if clip:
                os.link(clip, release / "clips" / name)
            else:
                open(release / "clips" / name, "w").close()


def peak():
    """Peak memory of this process, GiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=Path, help="folder of the release, or to create it in: 1 GB and one file per row"
    )
    parser.add_argument("--rows", type=int, default=1_900_000)
    parser.add_argument("--clients", type=int, default=100_000)
    parser.add_argument("--accents", default="three")
    parser.add_argument("--clip", help="file on the same disk to which every clip is linked (default: empty files)")
    parser.add_argument("--embed", action="store_true")
    arguments = parser.parse_args()
    release = arguments.folder / "cv-corpus-27.0-generated" / "en"
    if not release.exists():
        make(arguments.folder, arguments.rows, arguments.clients, arguments.clip)
        print("created the release; run again to measure, because creating it takes memory")
        return
    out = arguments.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    start, cpu = time.perf_counter(), time.process_time()
    built = build_corpus(release, out, accents=arguments.accents, embed=arguments.embed, progress=False)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    clips = sum(n["clips"] for by_accent in built.counts.values() for n in by_accent.values())
    print(f"{clips:,} clips selected in {wall:.1f} s ({cpu:.1f} s of CPU), peak {peak():.2f} GiB")
    print(built.dropped)


if __name__ == "__main__":
    main()
