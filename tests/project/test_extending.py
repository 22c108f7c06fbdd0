"""The examples of docs/extending.md run, and do what the page says of them."""

import importlib
import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from helpers import dataset_dicts as made

from accent_plugin.corpus.build import build_corpus
from accent_plugin.encoder.factory import FAMILIES, make_encoder
from accent_plugin.errors import BundleError, ConfigError, EncoderError, ManifestError
from accent_plugin.inference.classifier import AccentClassifier
from accent_plugin.model import AccentModel
from accent_plugin.pooling import POOLINGS

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
# Name of a file -> its content, in the order of the page.
EXAMPLES = {name: text for text, name in re.findall(r"```python\n(# (\S+\.py)\n.*?)```", PAGE, re.S)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the page's files in it; what they register is forgotten afterwards."""
    for name, text in EXAMPLES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = [(names, dict(names)) for names in (POOLINGS, FAMILIES)]
    yield tmp_path
    for names, content in before:
        names.clear()
        names.update(content)
    for name in (*EXAMPLES, "train.py", "common_voice_accent_prepare.py"):
        sys.modules.pop(name.removesuffix(".py"), None)


def test_every_block_of_the_page_is_run_here():
    assert list(EXAMPLES) == [
        *("max_pooling.py", "train_max.py", "unispeech.py", "check_family.py", "by_speaker.py", "build.py")
    ]
    assert PAGE.count("```python") == len(EXAMPLES)


def test_a_pooling_of_ones_own_is_independent_of_padding(folder, tiny_encoder):
    importlib.import_module("max_pooling")
    pooling = POOLINGS["max"](2)
    frames = torch.tensor([[[1.0, -5.0], [3.0, -7.0], [torch.nan, 99.0]]])
    assert torch.equal(pooling(frames, torch.tensor([[True, True, False]])), torch.tensor([[3.0, -5.0]]))
    assert pooling(frames.bfloat16(), torch.tensor([[True, True, False]])).dtype == torch.float32
    model = AccentModel(make_encoder(str(tiny_encoder("wav2vec2-group"))), ["us", "england"], pooling="max").eval()
    wavs = 0.1 * torch.randn(2, 16000)
    with torch.no_grad():
        together = model(wavs, torch.tensor([1.0, 0.4]))
        alone = model(wavs[1:, :6400])
    assert torch.allclose(together[1], alone[0], atol=1e-5)


def test_the_recipe_trains_with_a_pooling_of_ones_own_and_its_bundle_needs_it(folder, tiny_encoder, monkeypatch):
    data = made.save(folder / "data", **made.three_splits())
    words = [
        *("train_max.py", "hparams/wav2vec2_base.yaml", "--pooling", "max", "--number_of_epochs", "1"),
        *("--data_folder", str(data), "--prepared_folder", str(folder / "prepared"), "--num_workers", "0"),
        *("--output_folder", str(folder / "out"), "--accents", "[us, england]"),
        *("--wav2vec2_hub", str(tiny_encoder("wav2vec2-group")), "--device", "cpu", "--noprogressbar"),
    ]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # SpeechBrain replaces it
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(folder / "train_max.py"))
    POOLINGS.pop("max")
    del sys.modules["max_pooling"]
    assert (folder / "out/report/report.md").is_file()
    with pytest.raises(BundleError, match="pooling 'max' is unknown"):
        AccentClassifier.from_bundle(folder / "out/bundle")
    importlib.import_module("max_pooling")
    prediction = AccentClassifier.from_bundle(folder / "out/bundle").predict(made.noise(), 16_000)
    assert prediction.accent in ("us", "england")


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("name", ["UniSpeech", "UniSpeechSat"])
def test_a_family_is_refused_until_it_is_registered_and_then_independent_of_the_batch(folder, name, norm):
    check = importlib.import_module("check_family")
    values = {"feat_extract_norm": norm, "do_stable_layer_norm": norm == "layer"}
    tiny = check.make_tiny(name, folder / "tiny", **values)
    with pytest.raises(EncoderError, match="has not been shown to be independent"):
        make_encoder(tiny)
    importlib.import_module("unispeech")
    assert check.largest_difference(tiny) < 1e-5


@pytest.mark.parametrize(("name", "family"), [("SEW", "sew"), ("Wav2Vec2Conformer", "wav2vec2-conformer")])
def test_the_check_finds_families_that_the_class_does_not_fit(folder, name, family):
    check = importlib.import_module("check_family")
    FAMILIES[family] = FAMILIES["wav2vec2"]
    assert check.largest_difference(check.make_tiny(name, folder / "tiny")) > 0.1


def write_speech(folder, speakers=20):
    """20 speakers of three accents, two clips each, one more who is in no table."""
    lines = []
    accents = [(accent, number) for accent in ("American", "English", "Australian") for number in range(speakers)]
    for accent, number in accents:
        lines.append(f"{accent[:2]}{number} {'female' if number % 2 else 'male'} {accent}")
    (folder / "wav").mkdir(parents=True)
    (folder / "speakers.txt").write_text("\n".join(lines), encoding="utf-8")
    for seed, (name, clip) in enumerate(itertools.product([*(line.split()[0] for line in lines), "xx"], range(2))):
        (folder / "wav" / name).mkdir(exist_ok=True)
        sound = made.encode(made.noise(0.1, seed=seed), format="WAV")
        (folder / "wav" / name / f"{clip}.wav").write_bytes(sound)


def test_a_corpus_of_ones_own_becomes_a_dataset(folder):
    from datasets import load_from_disk

    write_speech(folder / "speech")
    built = importlib.import_module("build").built
    assert built.dropped["speaker not in speakers.txt"] == 2
    kept = [cell["clips"] for accents in built.counts.values() for cell in accents.values()]
    assert sum(kept) == 120 and set(built.counts["train"]) == {"us", "england", "australia"}
    data = load_from_disk(str(built.folder))
    clients = [set(split["client_id"]) for split in data.values()]
    assert len(clients) == 3 and not any(one & other for one, other in itertools.combinations(clients, 2))
    assert set(data["train"]["gender"]) == {"female", "male"}

    reader = importlib.import_module("by_speaker").BySpeaker
    options = {"accents": "three", "mapping": {"English": "england"}}
    assert build_corpus(reader("speech"), "data/by_speaker", **options).card == built.card
    table = folder / "speech/speakers.txt"
    table.write_text(table.read_text(encoding="utf-8").replace("Am0 male", "Am0 female"), encoding="utf-8")
    with pytest.raises(ManifestError, match="changed since"):
        build_corpus(reader("speech"), "data/by_speaker", **options)
    with pytest.raises(ConfigError, match="client_pattern does not apply to a reader of folders by speaker"):
        build_corpus(reader("speech"), "data/other", client_pattern="(.*)")


ADDED = """
import runpy, sys
from pathlib import Path

from hyperpyyaml import load_hyperpyyaml

from accent_plugin.experiment.run_folder import differences, run_identity
from accent_plugin.experiment.settings import read_settings

root, encoder, old = map(Path, sys.argv[1:])
runpy.run_path(str(root / "docs/hyperparameters.py"), run_name="__main__")
assert "0  # epochs before early stopping counts" in (root / "hparams/wav2vec2_base.yaml").read_text(encoding="utf-8")
page = (root / "docs/hyperparameters.md").read_text(encoding="utf-8")
assert "| `early_stopping_warmup` | `0` | a whole number, at least 0 | epochs before early stopping counts |" in page


def read(yaml, *words):
    words = [*words, "--wav2vec2_hub", str(encoder), "--output_folder", str(root / "out")]
    return read_settings([str(yaml), *words], root, look_at_data=False)


settings = read(root / "hparams/hubert_base.yaml", "--early_stopping_warmup", "2")
with open(settings.hparams_file, encoding="utf-8") as file:
    hparams = load_hyperpyyaml(file, settings.overrides)
assert hparams["epoch_counter"].limit_warmup == 2
made = run_identity(read(root / "hparams/hubert_base.yaml").values)
assert differences(made, run_identity(settings.values)) == ["early_stopping_warmup: 0 in the folder, 2 now"]
assert read(old).values["early_stopping_warmup"] == 0
try:
    read(root / "hparams/hubert_base.yaml", "--early_stopping_warmup", "x")
except Exception as error:
    assert "early_stopping_warmup is 'x'; it should be a whole number, at least 0" in str(error)
    print("done")
"""


def apply_diffs(heading, folder):
    """Copy the package to a folder, apply the diffs below a heading of the page, and return the changed files."""
    for name in ("accent_plugin", "hparams", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    changes = re.findall(r"```diff\n--- (\S+)\n(.*?)```", section, re.S)
    for name, change in changes:
        lines = change.splitlines(keepends=True)
        before, after = ("".join(line[1:] for line in lines if line[0] in kind) for kind in (" -", " +"))
        text = (folder / name).read_text(encoding="utf-8")
        assert text.count(before) == 1, name
        (folder / name).write_text(text.replace(before, after), encoding="utf-8")
    return {name for name, _ in changes}


def run_code(code, folder, *words):
    """Run code with the package in a folder; it prints "done" last."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]


def test_a_hyperparameter_is_added_in_three_files_and_a_test(tmp_path, tiny_encoder):
    assert len(apply_diffs("A hyperparameter", tmp_path)) == 3
    old = ROOT / "tests/golden/0.1.0/finished/hyperparams.yaml"
    run_code(ADDED, tmp_path, tmp_path, tiny_encoder("wav2vec2-group"), old)


COLUMN = """
import dataclasses

import numpy as np

from accent_plugin.data.manifests import Clip
from accent_plugin.evaluation.compare import compare_models
from accent_plugin.evaluation.predictions import ScoredClips, pool_clips
from accent_plugin.report.predictions_csv import read_predictions, write_predictions

clips = [Clip(str(i), 2.0, f"/audio/{i}.flac", "us", "ann", "female", "20") for i in range(2)]
made = ScoredClips.from_clips(clips, ["us", "us"], np.log(np.full((2, 2), 0.5)), ["us", "wales"], seconds=[2.0, 2.0])
write_predictions("predictions.csv", made)
assert read_predictions("predictions.csv").wav == ("/audio/0.flac", "/audio/1.flac")
assert made.select(np.array([1])).wav == ("/audio/1.flac",)
assert pool_clips([made, dataclasses.replace(made, ids=("2", "3"))]).wav == 2 * made.wav
assert compare_models(made, made.select(np.array([1, 0])), draws=2)["clip"]["accuracy"]["a"] == 1
print("done")
"""


def test_a_column_of_predictions_is_added_in_one_file_and_a_test(tmp_path):
    assert len(apply_diffs("A column of predictions.csv", tmp_path)) == 1
    run_code(COLUMN, tmp_path)
