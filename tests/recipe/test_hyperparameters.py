"""SpeechBrain's switches and an override of every key; workers that are spawned; no link; whichever accelerator."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import soundfile
import torch
import yaml
from helpers import RECIPE, ROOT
from helpers import dataset_dicts as made
from helpers.recipe import metrics_of

from accent_plugin.errors import ConfigError
from accent_plugin.experiment.hyperparameters import TABLE
from accent_plugin.experiment.settings import _SHARED, read_settings

# Fixtures of the recipe's own tests.
HPARAMS = ROOT / "hparams/wav2vec2_base.yaml"
LORA = ("--lora_rank", "2")

# What has to go with the table's example.
WITH = {
    "skip_prep": ("--prepared_folder", "/x"),
    "fold": ("--n_folds", "3"),
    "out_of_set_folder": ("--out_of_set", "[scotland]"),
    "cache_features": ("--freeze_wav2vec2", "True"),
    "augment_copies": ("--augment", "True"),
    "lora_alpha": LORA,
    "lora_dropout": LORA,
    "whitening_passes": ("--freeze_wav2vec2", "True"),
}
# Examples that stand for something else than YAML 1.1 makes of them.
MEANT = {"seeds": [1, 2], "lr_encoder": 1e-4, "lr_head": 1e-3}


def read(*arguments):
    return read_settings([str(HPARAMS), *arguments], ROOT, look_at_data=False).values


@pytest.fixture(scope="module")
def source(tiny_encoder):
    return ["--wav2vec2_hub", str(tiny_encoder("wav2vec2-group"))]


@pytest.fixture(scope="module")
def defaults(source):
    return read(*source)


@pytest.mark.slow
@pytest.mark.parametrize("key", TABLE)
def test_every_hyperparameter_is_changed_on_the_command_line(key, source, defaults, tiny_bundle):
    if key.startswith("lora"):
        pytest.importorskip("peft", reason="adapters are an optional extra")
    text = str(tiny_bundle) if key == "from_bundle" else TABLE[key].example
    value = text if TABLE[key].is_text else MEANT.get(key, yaml.safe_load(text))
    found = read(*source, *WITH.get(key, ()), f"--{key}", text)
    assert found[key] == value and type(found[key]) is type(value)
    assert defaults[key] != value


def wrong(key):
    return "" if TABLE[key].is_text else "x"


def test_a_wrong_value_of_every_hyperparameter_is_named():
    # Those that SpeechBrain has, too, are below.
    own = [key for key in TABLE if key not in _SHARED]
    with pytest.raises(ConfigError) as caught:
        read(*(word for key in own for word in (f"--{key}", wrong(key))))
    assert [key for key in own if f"  {key} is {wrong(key)!r}; it should be " not in str(caught.value)] == []


@pytest.mark.parametrize(
    "key", ["ckpt_interval_minutes", "eval_precision", "grad_accumulation_factor", "max_grad_norm"]
)
def test_a_wrong_value_of_a_run_option_is_named(key, capsys):
    with pytest.raises(ConfigError, match="a run option"):
        read(f"--{key}", wrong(key))
    assert f"argument --{key}: " in capsys.readouterr().err


# Run options


def test_debug_runs_a_few_batches_and_keeps_no_checkpoint(train, words, tmp_path):
    # One clip a batch: all of them would be 24.
    small = ("--batch_seconds", "1.3", "--max_seconds", "1.25")
    assert train(*words, *small, "--number_of_epochs", "9", "--debug", "--debug_epochs", "1").code == 0
    log = (tmp_path / "out/train_log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[0] for line in log] == ["epoch: 1"]
    assert metrics_of(tmp_path / "out")["clip"]["accuracy"]["n"] < 12
    assert not list((tmp_path / "out/save").glob("CKPT*"))


def test_skip_prep_needs_the_prepared_folder_alone(train, words, corpus, tmp_path):
    assert train(*words, "--method", "logistic_regression").code == 0
    prepared = sorted(path for path in (tmp_path / "prepared").rglob("*"))
    gone = ("--skip_prep", "True", "--data_folder", tmp_path / "gone", "--output_folder", tmp_path / "again")
    assert train(*words, *gone, "--number_of_epochs", "3", "--early_stopping", "0").code == 0
    assert sorted(path for path in (tmp_path / "prepared").rglob("*")) == prepared
    history = json.loads((tmp_path / "again/save/history.json").read_text(encoding="utf-8"))
    assert [row["epoch"] for row in history] == [1, 2, 3]


def as_a_user(command, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++")
def test_a_compiled_model_trains(words, tmp_path):
    # Each new shape of a batch is compiled anew.
    less = ("--number_of_epochs", "1", "--num_layers", "1", "--debug", "--debug_persistently", "--debug_batches", "1")
    done = as_a_user(["recipes/CommonVoiceAccent/train.py", *words, *less, "--compile"], ROOT)
    assert "failed to compile" not in done.stderr
    assert metrics_of(tmp_path / "out")["clip"]["accuracy"]["n"] >= 1
    # What is kept of it is the model that was compiled, under its own names.
    as_a_user(["-m", "accent_plugin.cli", "export", tmp_path / "out", "--out", tmp_path / "bundle"], ROOT)


# SpeechBrain's Augmenter in the YAML, as docs/recipe.md shows it

AUGMENTER = re.compile(r"^    (augmentation: .*?rir\.csv\n)", re.M | re.S)


def test_the_recipe_trains_with_the_augmenter_of_the_documentation(train, words, tmp_path):
    files = {}
    for kind, samples in (("noise", 16_000), ("rir", 800)):
        soundfile.write(tmp_path / f"{kind}.wav", made.noise(samples / 16_000, seed=1), 16_000)
        files[kind] = tmp_path / f"{kind}.csv"
        row = f"{kind},{samples / 16_000},{tmp_path / kind}.wav,wav,"
        files[kind].write_text(f"ID,duration,wav,wav_format,wav_opts\n{row}\n", encoding="utf-8")
    shown = textwrap.dedent("    " + AUGMENTER.search((ROOT / "docs/recipe.md").read_text(encoding="utf-8")).group(1))
    for kind, path in files.items():
        shown = shown.replace(f"/data/{kind}.csv", str(path))
    text = re.sub(r"^augmentation: .*?\n\n", lambda _: f"{shown}\n", HPARAMS.read_text("utf-8"), flags=re.M | re.S)
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
    plain = train(*words, "--number_of_epochs", "1", "--output_folder", tmp_path / "plain")
    done = train(tmp_path / "own.yaml", *words[1:], "--number_of_epochs", "1")
    assert (plain.code, done.code) == (0, 0), done.err

    def loss(run):
        return json.loads((tmp_path / run / "save/history.json").read_text(encoding="utf-8"))[0]["train_loss"]

    assert loss("out") != loss("plain")


# Other systems: workers that are spawned, a checkout without links, paths, accelerators


@pytest.mark.slow
def test_spawned_workers_read_the_same_batches(tmp_path):
    from accent_plugin.audio.augment import make_augmentation
    from accent_plugin.audio.degradations import DEGRADATIONS
    from accent_plugin.data.manifests import Clip
    from accent_plugin.training.batches import BucketBatchSampler, ClipDataset, ClipLoader, collate
    from accent_plugin.training.loaders import ChainedChanges

    fields = dict.fromkeys(Clip.__dataclass_fields__, "")
    clips = []
    for number in range(4):
        path = tmp_path / f"{number}.flac"
        soundfile.write(path, made.noise(1 + number / 4, seed=number), 16_000)
        clips.append(Clip(**fields | {"id": str(number), "wav": str(path), "duration": 1 + number / 4, "accent": "a"}))
    augmentation = make_augmentation(True, 0.5, [0.9, 1.1], [10, 30], [2500, 8000], 0.5)
    dataset = ClipDataset(
        clips, ["a", "b"], 1.5, augmentation, seed=3, degrade=ChainedChanges(list(DEGRADATIONS.values()))
    )

    def batches(**choices):
        sampler = BucketBatchSampler(dataset.seconds(), 3.5, seed=3)
        sampler.set_epoch(2)
        return list(ClipLoader(dataset, batch_sampler=sampler, collate_fn=collate, **choices))

    here, there = batches(), batches(num_workers=1, multiprocessing_context="spawn")
    assert [batch.ids for batch in here] == [batch.ids for batch in there] and not any(batch.lost for batch in here)
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one.wavs, other.wavs)
        np.testing.assert_array_equal(one.labels, other.labels)


SPAWNING = """
import sys

if __name__ == "__main__":
    import torch

    torch.multiprocessing.set_start_method("spawn")
    import train

    sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_whose_workers_are_spawned(words, tmp_path):
    (tmp_path / "spawning.py").write_text(SPAWNING, encoding="utf-8")
    more = ("--num_workers", "1", "--number_of_epochs", "1", "--augment", "True", "--crop_seconds", "1")
    as_a_user([tmp_path / "spawning.py", *words, *more], ROOT, PYTHONPATH=str(RECIPE))
    assert metrics_of(tmp_path / "out")["clip"]["accuracy"]["n"] == 6


@pytest.mark.slow
def test_a_checkout_without_the_link_works_from_its_root(words, tmp_path):
    root, without = tmp_path / "checkout", shutil.ignore_patterns("__pycache__")
    for name in ("accent_plugin", "hparams", "recipes"):
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=without)
    (root / "recipes/CommonVoiceAccent/hparams").unlink()
    command = ["recipes/CommonVoiceAccent/train.py", *words, "--method", "logistic_regression"]
    as_a_user(command, root, PYTHONPATH=str(root))
    assert metrics_of(tmp_path / "out")["clip"]["accuracy"]["n"] == 6


def test_paths_are_joined_by_pathlib():
    code = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "accent_plugin").glob("*.py")}
    assert [name for name, text in code.items() if re.search(r"os\.path\.join|os\.sep\b|\.split\(os\.", text)] == []


@pytest.fixture
def accelerator(monkeypatch):
    """An accelerator named as no device is by default, and which is there: the processor."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cpu", 0))
    return "cpu:0"


def test_training_takes_the_accelerator_that_there_is(train, words, accelerator, monkeypatch):
    devices = []

    def fit(brain, *arguments):
        devices.append(brain.device)
        raise ConfigError("seen")

    monkeypatch.setattr("accent_plugin.training.brain.AccentBrain.fit", fit)
    place = words.index("--device")
    free = words[:place] + words[place + 2 :]
    assert "seen" in train(*free).err and devices == [accelerator]
    assert "seen" in train(*free, "--device", "cpu").err and devices == [accelerator, "cpu"]


def test_the_baseline_takes_the_accelerator_that_there_is(train, words, accelerator, monkeypatch):
    devices = []

    def layer_means(encoder, loader, device):
        devices.append(device)
        raise ConfigError("seen")

    monkeypatch.setattr("accent_plugin.experiment.baseline.layer_means", layer_means)
    place = words.index("--device")
    assert "seen" in train(*words[:place], *words[place + 2 :], "--method", "logistic_regression").err
    assert devices == [accelerator]


def test_classification_takes_the_accelerator_that_there_is(tiny_bundle, accelerator):
    from accent_plugin.inference.classifier import AccentClassifier

    assert AccentClassifier.from_bundle(tiny_bundle).device == accelerator
    assert AccentClassifier.from_bundle(tiny_bundle, "cpu").device == "cpu"


class OnMps:
    """A tensor of a device that has no float64, as Apple's."""

    device = torch.device("mps")

    def __init__(self, tensor):
        self.tensor = tensor

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    def cpu(self):
        return self.tensor


def test_a_device_without_float64_is_asked_for_none(tiny_bundle, monkeypatch):
    from accent_plugin.bundle.modules import change_batch_speed
    from accent_plugin.encoder.masking import sample_counts
    from accent_plugin.inference.classifier import AccentClassifier

    wavs, shares = torch.zeros(2, 1000), torch.tensor([1.0, 0.5])
    assert sample_counts(wavs, OnMps(shares)).tolist() == [1000, 500]
    classifier = AccentClassifier.from_bundle(tiny_bundle, "cpu")
    assert change_batch_speed(wavs, OnMps(shares), 0.5)[1].tolist() == [1.0, 0.5]
    monkeypatch.setattr(classifier, "classify_batch", lambda *_: (OnMps(torch.zeros(1, 3)),))
    assert classifier._log_probabilities([np.zeros(16000, np.float32)]).dtype == np.float64
