"""The recipe as a user calls it."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT
from helpers import dataset_dicts as made
from helpers.recipe import ACCENTS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small DatasetDict of noise with three accents."""
    return made.save(tmp_path_factory.mktemp("corpus") / "data", **made.three_splits(ACCENTS, clients=(4, 2, 2)))


@pytest.fixture(scope="module")
def words_of(corpus, tiny_encoder):
    """Function: folder of a run -> a command line that takes seconds."""
    return lambda folder: [
        "hparams/wav2vec2_base.yaml",
        *("--data_folder", str(corpus), "--prepared_folder", str(folder / "prepared")),
        *("--output_folder", str(folder / "out"), "--accents", f"[{', '.join(ACCENTS)}]"),
        *("--wav2vec2_hub", str(tiny_encoder("wav2vec2-group")), "--num_workers", "0", "--number_of_epochs", "2"),
        *("--precision", "fp32"),
        *("--device", "cpu", "--noprogressbar", "--lr_head", "0.01"),
    ]


@pytest.fixture
def words(words_of, tmp_path):
    return words_of(tmp_path)


@pytest.fixture(scope="module")
def typed(words_of, tmp_path_factory):
    """A run by a process of its own, from the root, without the link: what a newcomer types."""
    folder = tmp_path_factory.mktemp("typed")
    command = [sys.executable, "recipes/CommonVoiceAccent/train.py", *words_of(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    return SimpleNamespace(folder=folder, code=done.returncode, err=done.stderr)


@pytest.fixture
def finished(typed, tmp_path):
    """A copy of that run and its data, where `words` have them."""
    assert typed.code == 0, typed.err[-3000:]
    shutil.copytree(typed.folder, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"
