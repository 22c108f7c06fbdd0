"""The recipe register of SpeechBrain, and the samples that its flags name, made by this project."""

import csv
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REGISTER = ROOT / "tests/recipes/CommonVoiceAccent.csv"
# Where the flags of the register look for samples, and where SpeechBrain's runner writes; not part of the repository.
OUTPUTS = ROOT / "tests/tmp"
SAMPLES = OUTPUTS / "samples"
ACCENTS = ("us", "england", "australia")


def rows():
    """The register's rows, as dictionaries."""
    with open(REGISTER, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, skipinitialspace=True))


def make_samples():
    """A corpus of noise and a tiny encoder of each family that a row names, under `SAMPLES`."""
    from helpers import dataset_dicts as made
    from helpers import encoders

    shutil.rmtree(OUTPUTS, ignore_errors=True)
    SAMPLES.mkdir(parents=True)
    made.save(SAMPLES / "corpus", **made.three_splits(ACCENTS, clients=(4, 2, 2)))
    for name in encoders.TINY:
        encoders.make(name, SAMPLES / name)


def command(row, row_number, python="python"):
    """What SpeechBrain's runner types for a row, at the root of the tree: the environment, and the words."""
    output = f"tests/tmp/{REGISTER.stem}_row_{row_number:02d}"
    words = [python, row["Script_file"], row["Hparam_file"], *row["test_debug_flags"].split(), "--device=cpu"]
    words.append(f"--output_folder={output}")
    if "performance_check" not in row["test_debug_checks"]:
        words += ["--debug", "--debug_persistently"]
    return {"PYTHONPATH": str(ROOT / Path(row["Script_file"]).parent)}, words, ROOT / output
