"""A wrong configuration is reported without importing PyTorch, which takes longer than all checks."""

import subprocess
import sys

import pytest
from helpers import RECIPE
from helpers.dataset_dicts import save, three_splits

RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    heavy = "torch torchaudio speechbrain transformers scipy sympy sklearn matplotlib pandas datasets peft".split()
    print(end.code, *(name for name in heavy if name in sys.modules))
"""
BASE = "hparams/wav2vec2_base.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save(tmp_path_factory.mktemp("data") / "data", **three_splits())


def train(*words):
    """Run the recipe; return its exit code, the heavy packages that it has imported, and its errors."""
    command = [sys.executable, "-c", RUN, "train.py", *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=RECIPE)
    code, *loaded = run.stdout.split()
    return code, loaded, run.stderr


@pytest.mark.parametrize(
    "words, problem",
    [
        ([BASE, "--lr_hed", "0.1"], "'--lr_hed' is no hyperparameter or run option (did you mean --lr_head?)"),
        ([BASE, "--dropout", "2"], "dropout is 2; it should be a number"),
        ([BASE, "--pooling", "stats"], "pooling is 'stats'; it should be one of mean, "),
        ([BASE, "--debug_batches", "0"], "debug_batches is 0; it should be at least 1"),
        ([BASE, "--device", "tpu", "--jit"], "--jit is not supported"),
        ([BASE, "--lora_rank", "4", "--freeze_wav2vec2", "True"], "lora_rank freezes the encoder's own weights"),
        ([BASE, "--data_folder", "nowhere"], "there is no folder"),
        ([BASE, "--from_bundle", "nowhere"], "from_bundle: there is no folder"),
        ([BASE, "--wav2vec2_hub", "./nowhere"], "wav2vec2_hub: there is no folder"),
        (["nowhere.yaml"], "the hyperparameters nowhere.yaml cannot be read"),
        (["broken.yaml"], "the YAML cannot be read: while parsing a flow sequence"),
        (["unknown_reference.yaml"], "the YAML cannot be read"),
    ],
)
def test_the_first_error_needs_no_pytorch(words, problem, data, tmp_path):
    (tmp_path / "broken.yaml").write_text("seed: [1\nname: x\n", encoding="utf-8")
    (tmp_path / "unknown_reference.yaml").write_text("seed: !ref <sed>\n", encoding="utf-8")
    written = tmp_path / words[0]
    code, loaded, error = train(written if written.is_file() else words[0], "--data_folder", data, *words[1:])
    assert problem in error
    assert (code, loaded) == ("2", [])


def test_the_data_are_read_before_pytorch_is_imported(data):
    code, loaded, error = train(BASE, "--data_folder", data, "--accents", "[us, klingon]")
    assert "klingon" in error
    assert code == "2" and "torch" not in loaded and "datasets" in loaded


def test_a_wrong_hyperparameter_and_a_missing_folder_are_named_at_once(tmp_path):
    error = train(BASE, "--data_folder", tmp_path / "nowhere", "--dropout", "2")[2]
    assert "2 problems" in error and "dropout is 2" in error and f"there is no folder {tmp_path / 'nowhere'}" in error
