"""Which hyperparameters make another run: those that change the data, the weights or the figures of two steps."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import speechbrain as sb
import torch
from helpers import RECIPE, ROOT, encoders
from helpers import dataset_dicts as made
from helpers.recipe import load_recipe

from accent_plugin.experiment import run as experiment_run
from accent_plugin.experiment import run_folder
from accent_plugin.experiment.hyperparameters import TABLE
from accent_plugin.experiment.settings import _value, read_settings

# Small, and such that every hyperparameter can make a difference.
BASE = {
    "accents": ["us", "england"],
    "max_clips_per_client": 2,
    "number_of_epochs": 1,
    "batch_seconds": 7.0,
    "max_seconds": 2.0,
    "precision": "fp32",
    "num_workers": 0,
    "prepare_workers": 1,
}
FROZEN = {"freeze_wav2vec2": True}
AUGMENTED = {"augment": True, "augment_probability": 1.0}
POOLED = {"source_splits": ["train"]}
# Nothing is learnt, so that the figure of the first epoch stays the best.
STILL = {"number_of_epochs": 3, "lr_encoder": 0.0, "lr_head": 1e-12, "early_stopping": 1}
# Only one accent is learnt, so that the loss of the second epoch is larger.
WORSE = {"number_of_epochs": 2, "lr_head": 0.3, "lr_schedule": "none", "class_weights": [1e-6, 1.0]}

# Where the table's example does not do: hyperparameter -> another value, and what has to go with both.
CHANGES = {
    "name": ("other", {}),
    "data_folder": ("{folder}/moved", {}),
    "prepared_folder": ("{folder}/prepared", {}),
    "output_folder": ("{folder}/output", {}),
    "save_folder": ("{folder}/save", {}),
    "train_log": ("{folder}/log.txt", {}),
    "skip_prep": (True, {"prepared_folder": "{folder}/before"}),
    "accents": (["england", "us"], {}),
    "n_folds": (3, {}),
    "fold": (2, {"n_folds": 3}),
    "max_clips_per_client": (None, {"balance": "none"}),
    "min_seconds": (1.1, {}),
    "max_seconds": (1.25, {}),
    "valid_fraction": (0.4, POOLED),
    "test_fraction": (0.4, POOLED),
    "accent_column": ("accent", {}),
    "client_column": ("client_id", {}),
    "sentence_column": ("sentence", {}),
    "audio_column": ("audio", {}),
    "prepare_workers": (2, {}),
    "out_of_set_folder": ("{folder}/moved", {"out_of_set": ["scotland"]}),
    "wav2vec2_hub": ("{folder}/hubert-group", {}),
    "wav2vec2_folder": ("{folder}/cache", {}),
    "from_bundle": ("{bundle}", {}),
    "cache_features": (True, FROZEN),
    "features_folder": ("{folder}/features", FROZEN | {"cache_features": True}),
    "freeze_encoder_steps": (1, {}),
    "normalize_layers": (True, {"weighted_layers": "all"}),
    "attn_implementation": ("eager", {"config_overrides": {"attention_dropout": 0.0}}),
    "lora_alpha": (8, {"lora_rank": 2}),
    "lora_dropout": (0.5, {"lora_rank": 2}),
    "projector_size": (8, {}),
    "projector_activation": (True, {"projector_size": 8}),
    "whitening_passes": (1, FROZEN),
    "whitening_shrinkage": (0.5, FROZEN | {"whitening_passes": 1}),
    "crop_seconds": (0.5, {}),
    "weight_decay": (0.0, {"lr_head": 0.1}),
    "warmup_fraction": (0.0, {"warmup_fraction": 1.0}),
    "max_grad_norm": (1e-3, {}),
    "class_weights": ([1.0, 2.0], {}),
    "selection": ("last", WORSE | {"selection": "loss"}),
    "early_stopping": (0, STILL),
    "num_workers": (1, {}),
    "augment_probability": ({"speed": 1.0}, {"augment": True}),
    "augment_speed": (None, AUGMENTED),
    "augment_noise_snr": ([0.0, 5.0], AUGMENTED),
    "augment_band": ([1000.0, 2000.0], AUGMENTED),
    "augment_mask_seconds": (0.1, AUGMENTED),
    **{
        f"augment_{kind}": (value, AUGMENTED)
        for kind, value in {
            "babble_snr": [0.0, 5.0],
            "reverberation": [0.2, 0.3],
            "codecs": ["mu-law"],
            "gain": [-9.0, 3.0],
            "clipping": [0.1, 0.2],
            "packet_loss": [0.5, 0.6],
            "formants": [0.8, 0.9],
        }.items()
    },
    "augment_copies": (1, AUGMENTED | {"number_of_epochs": 2}),
}
# They compute the same in another order; of a gradient that is only rounding, Adam makes a whole step all the same.
ROUNDED = {"cache_features", "attn_implementation", "gradient_checkpointing"}
# One or two for each way to count or not to; the others take half a minute.
QUICK = {
    *("accents", "augment", "balance", "data_seed", "from_bundle", "lr_head", "number_of_epochs", "pooling", "seed"),
    *("selection", "audio_column", "cache_features", "fold", "name", "test_speeds"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data in which every choice of them matters: shared sentences, uneven accents, clients and durations."""
    folder = tmp_path_factory.mktemp("runs")
    tables = made.three_splits(("us", "england", "scotland"), clients=(5, 1, 1))
    tables["train"] += made.rows("us", 2, clips=3, first=50)
    tables["train"][0]["sentence"] = tables["test"][0]["sentence"]
    for row, seconds in ((10, 1.05), (12, 1.3)):
        tables["train"][row]["audio"]["bytes"] = made.encode(made.noise(seconds))
    made.save(folder / "corpus", **tables)
    shutil.copytree(folder / "corpus", folder / "moved")
    for name in ("wav2vec2-group", "hubert-group"):
        encoders.make(name, folder / name)
    return folder


def keep_weights(run):
    """In place of the report: of the epoch that is chosen, which calibration has loaded."""
    run.weights = run.brain.modules.model.state_dict()


@pytest.fixture(scope="module")
def recipe():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPE))
        module = load_recipe()
        # What comes before and after training takes longest, and changes nothing of it.
        patch.setattr(sb, "create_experiment_directory", lambda **_: None)
        patch.setattr(experiment_run.Run, "report", keep_weights)
        patch.setattr(experiment_run.Run, "bundle", lambda run: None)
        patch.setattr(experiment_run, "write_run_report", lambda *_, **__: None)
        yield module


class Run:
    """What a run with some values other than `BASE` is: its identity, its data, and what it has trained."""

    def __init__(self, recipe, settings):
        self.recipe, self.settings = recipe, settings
        self.fold = 1 if settings.values["n_folds"] else None
        self.identity = run_folder.run_identity(settings.values, self.fold)

    @functools.cached_property
    def prepared(self):
        wanted = self.settings.located(self.settings.values["preparation"])
        return self.recipe.prepare_common_voice_accent(**wanted)

    @functools.cached_property
    def data(self):
        return run_folder.data_fingerprint(self.prepared.paths(self.fold))

    @functools.cached_property
    def outcome(self):
        """Figures of each epoch, and weights of the one that is chosen."""
        values = self.settings.values
        trained = self.recipe.train(self.settings, self.fold, "")
        if values["method"] == "logistic_regression":
            return {"log_probabilities": torch.from_numpy(trained.predictions.log_probabilities)}
        rows = json.loads((Path(values["save_folder"]) / "history.json").read_text(encoding="utf-8"))
        figures = [[figure for name, figure in row.items() if name != "peak_memory_bytes"] for row in rows]
        return {"figures": torch.tensor(figures), **trained.weights}


@pytest.fixture(scope="module")
def run(recipe, folder, tiny_bundle):
    """Function: values other than in `BASE` -> the run; none is made twice."""
    words = ["--data_folder", str(folder / "corpus"), "--wav2vec2_hub", str(folder / "wav2vec2-group")]
    words = [str(ROOT / "hparams/wav2vec2_base.yaml"), *words, "--device", "cpu", "--noprogressbar"]
    base, runs = read_settings(words, folder, look_at_data=False).with_values(**BASE), {}

    def make(changes):
        text = (
            json.dumps(changes, sort_keys=True).replace("{folder}", str(folder)).replace("{bundle}", str(tiny_bundle))
        )
        if text not in runs:
            output = {"output_folder": str(folder / f"run_{len(runs)}")}
            runs[text] = Run(recipe, base.with_values(**output | json.loads(text)))
        return runs[text]

    return make


def same(one, other, exact):
    """Whether two outcomes are the same."""
    shapes = [{name: tensor.shape for name, tensor in outcome.items()} for outcome in (one, other)]
    if shapes[0] != shapes[1]:
        return False
    compare = torch.equal if exact else lambda a, b: torch.allclose(a, b, atol=1e-3)
    return all(compare(one[name], other[name]) for name in one)


@pytest.mark.parametrize("key", [key if key in QUICK else pytest.param(key, marks=pytest.mark.slow) for key in TABLE])
def test_a_hyperparameter_counts_where_it_changes_what_is_trained(key, run):
    if key.startswith("lora"):
        pytest.importorskip("peft", reason="adapters are an optional extra")
    if key == "tensorboard":
        pytest.importorskip("tensorboard", reason="TensorBoard is an optional extra")
    value, context = CHANGES.get(key) or (_value(key, TABLE[key].example), {})
    before, now = run(context), run(context | {key: value})
    counts = run_folder.differences(before.identity, now.identity) != []
    differs = before.data != now.data or not same(before.outcome, now.outcome, exact=key not in ROUNDED)
    assert counts == differs


def test_one_probability_of_augmentation_is_the_same_as_a_number_or_a_mapping():
    """Version 0.1.0 had a number."""
    identities = [
        run_folder.run_identity(read_settings([str(ROOT / "hparams/wav2vec2_base.yaml"), *words], ROOT, False).values)
        for words in ([], ["--augment_probability", "0.5"], ["--augment_probability", "{speed: 0.5}"])
    ]
    assert run_folder.differences(identities[0], identities[1]) == []
    assert run_folder.differences(identities[0], identities[2]) != []
