"""The recipe as a user calls it."""

import pytest
from helpers import dataset_dicts as made
from helpers.recipe import ACCENTS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small DatasetDict of noise with three accents."""
    return made.save(tmp_path_factory.mktemp("corpus") / "data", **made.three_splits(ACCENTS, clients=(4, 2, 2)))


@pytest.fixture
def words(corpus, tiny_encoder, tmp_path):
    """A command line that takes seconds."""
    return [
        "hparams/wav2vec2_base.yaml",
        *("--data_folder", str(corpus), "--prepared_folder", str(tmp_path / "prepared")),
        *("--output_folder", str(tmp_path / "out"), "--accents", f"[{', '.join(ACCENTS)}]"),
        *("--wav2vec2_hub", str(tiny_encoder("wav2vec2-group")), "--num_workers", "0", "--number_of_epochs", "2"),
        *("--precision", "fp32"),
        *("--device", "cpu", "--noprogressbar", "--lr_head", "0.01"),
    ]
