"""The recipe as a user runs it: prepare, train, evaluate, again, and what it refuses."""

import csv
import errno
import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.recipe import ACCENTS, metrics_of


def test_one_command_prepares_trains_and_evaluates(typed):
    assert typed.code == 0, typed.err[-3000:]
    out = typed.folder / "out"
    for name in ("hyperparams.yaml", "train_log.txt", "env.log", "save/history.json", "report/report.md"):
        assert (out / name).is_file(), name
    assert len(list((out / "report").glob("*.png"))) >= 5
    assert (out / "train_log.txt").read_text().startswith("epoch: 1, ")
    metrics = metrics_of(out)
    assert metrics["data"]["clips"] == 12 and metrics["data"]["speakers"] == 6
    assert metrics["data"]["speakers_disjoint"] is True and metrics["data"]["synthetic"] is False
    with open(out / "report/predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [name for name in rows[0] if name.startswith("p_")] == ["p_us", "p_england", "p_scotland"]
    assert all(abs(sum(float(row[f"p_{accent}"]) for accent in ACCENTS) - 1) < 1e-6 for row in rows)
    assert "train.py hparams/wav2vec2_base.yaml" in metrics["command"]


def test_two_runs_give_the_same_figures(train, words, finished, tmp_path):
    first = metrics_of(finished)
    assert train(*words, "--output_folder", tmp_path / "again").code == 0
    second = metrics_of(tmp_path / "again")
    for part in ("clip", "speaker", "per_accent", "confusion", "groups"):
        assert first[part] == second[part]


def test_a_finished_run_is_evaluated_again_alone(train, words, finished):
    first, log = metrics_of(finished), (finished / "train_log.txt").read_text()
    (finished / "report/metrics.json").unlink()
    assert train(*words, "--test_only", "True").code == 0
    assert metrics_of(finished)["clip"] == first["clip"]
    assert (finished / "train_log.txt").read_text() == log


@pytest.mark.parametrize("speeds", ["[1.0]", "[0.9, 1.1]"])
def test_a_run_leaves_a_bundle_with_the_scores_of_its_report(train, words, tmp_path, speeds):
    from accent_plugin.inference.classifier import AccentClassifier
    from accent_plugin.inference.labelled import WHOLE_CLIPS, evaluate_model, read_labelled
    from accent_plugin.report.predictions_csv import read_predictions

    head = ["--freeze_wav2vec2", "True", "--whitening_passes", "1"]
    assert train(*words, "--test_speeds", speeds, "--pooling", "statistics", *head).code == 0
    out = tmp_path / "out"
    classifier = AccentClassifier.from_bundle(out / "bundle", device="cpu", **WHOLE_CLIPS)
    rows = read_labelled(next(tmp_path.glob("prepared/test.csv")), ACCENTS).rows
    again, _ = evaluate_model(classifier, rows, progress=False)
    reported = read_predictions(out / "report")
    assert again.ids == reported.ids
    np.testing.assert_allclose(np.exp(again.log_probabilities), np.exp(reported.log_probabilities), atol=1e-5)
    assert metrics_of(out)["model"]["temperature"] == classifier.config["calibration"]["temperature"]


def test_one_fold_alone_is_trained_and_exported_again(train, words, tmp_path):
    from accent_plugin.cli import main

    assert train(*words, "--n_folds", "3", "--fold", "2", "--number_of_epochs", "1").code == 0
    (run,) = (tmp_path / "out").iterdir()
    assert run.name == "fold_2"
    for name in ("first", "second"):
        assert main.main(["export", str(run), "--out", str(tmp_path / name)]) == 0
    weights = [(tmp_path / name / "model.ckpt").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


def test_adapters_are_trained_resumed_and_exported_as_plain_weights(train, words, tmp_path, tiny_encoder):
    from accent_plugin.bundle.load import load_bundle
    from accent_plugin.encoder.factory import make_encoder
    from accent_plugin.experiment.run import export

    adapted = (*words, "--lora_rank", "2", "--lora_dropout", "0.1", "--selection", "last", "--early_stopping", "0")
    # With one batch an epoch, the only step of a first epoch would be at the end of the decay.
    adapted += ("--warmup_fraction", "0", "--lr_schedule", "none")
    assert train(*adapted, "--debug_epochs", "1", "--debug_batches", "99", "--debug", "--debug_persistently").code == 0
    assert train(*adapted).code == 0
    out = tmp_path / "out"
    log = (out / "train_log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[0] for line in log] == ["epoch: 1", "epoch: 2"]
    assert all("peak memory: " in line for line in log)
    model = metrics_of(out)["model"]
    # Two matrices in four layers of each of three blocks 32 wide; and the head.
    assert model["trained_parameters"] == 3 * 4 * 2 * (2 * 32) + 3 * (32 + 1)
    assert model["parameters"] > 10 * model["trained_parameters"] and model["peak_memory_bytes"] > 1e8
    export(out, tmp_path / "exported")
    states = [load_bundle(folder).model.wav2vec2.state_dict() for folder in (out / "bundle", tmp_path / "exported")]
    pretrained = make_encoder(str(tiny_encoder("wav2vec2-group"))).state_dict()
    assert states[0].keys() == states[1].keys() == pretrained.keys()
    changed = {key for key, value in states[0].items() if not np.array_equal(value, pretrained[key])}
    assert len(changed) == 3 * 4 and all("attention" in key and key.endswith("weight") for key in changed)
    assert all(np.array_equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.slow
def test_training_from_a_bundle_begins_with_its_scores(train, words, tmp_path):
    from accent_plugin.bundle import config as bundle_config

    head = ("--pooling", "attentive", "--projector_size", "8")
    assert train(*words, *head).code == 0
    source = tmp_path / "out/bundle"
    # So slow that nothing is learned.
    still = ("--lr_encoder", "0", "--lr_head", "1e-12", "--weight_decay", "0", "--number_of_epochs", "1")
    started = ("--output_folder", tmp_path / "again", "--from_bundle", source, "--wav2vec2_hub", "./nowhere")
    assert train(*words, *head, *still, *started).code == 0
    history = json.loads((tmp_path / "again/save/history.json").read_text(encoding="utf-8"))
    config = bundle_config.read(source)
    # The bundle's temperature is in its weights.
    assert history[0]["valid_loss"] == pytest.approx(config["calibration"]["log_loss"]["after"], abs=1e-5)
    described = metrics_of(tmp_path / "again")["model"]
    assert described["from_bundle"] == config["weights"]["sha256"][:12] and described["encoder"] == "wav2vec2-group"
    # Resumed, it goes on from its own checkpoint.
    assert train(*words, *head, *still, *started, "--test_only", "True").code == 0


def test_evaluating_what_was_never_trained_is_refused(train, words, tmp_path):
    done = train(*words, "--test_only", "True")
    assert done.code == 2 and "there is no checkpoint in" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        ["--pooling", "attentive_statistics", "--projector_size", "16", "--projector_activation", "True"],
        ["--balance", "sampler", "--crop_seconds", "0.8", "--augment", "True", "--grad_accumulation_factor", "2"],
        ["--balance", "none", "--class_weights", "balanced", "--weighted_layers", "all", "--freeze_wav2vec2", "True"],
        ["--precision", "bf16", "--freeze_feature_extractor", "False", "--lr_schedule", "cosine", "--num_layers", "1"],
        ["--early_stopping", "0", "--freeze_encoder_steps", "2", "--label_smoothing", "0.1", "--num_workers", "2"],
        ["--config_overrides", "{hidden_dropout: 0.0}", "--attn_implementation", "eager", "--tensorboard", "True"],
    ],
    ids=lambda changes: changes[0].removeprefix("--"),
)
def test_choices_of_the_yaml_work(train, words, tmp_path, changes):
    if "--tensorboard" in changes:
        pytest.importorskip("tensorboard", reason="TensorBoard is an optional extra")
    assert train(*words, "--number_of_epochs", "1", *changes).code == 0
    assert metrics_of(tmp_path / "out")["clip"]["accuracy"]["n"] == 6


def test_moonshine_trains(train, words, tmp_path, tiny_encoder):
    assert train(*words, "--wav2vec2_hub", tiny_encoder("moonshine"), "--number_of_epochs", "1").code == 0
    assert metrics_of(tmp_path / "out")["model"]["family"] == "moonshine"


# Ways to evaluate


def test_folds_test_every_speaker_once(train, words, tmp_path):
    assert train(*words, "--number_of_epochs", "1", "--n_folds", "3", "--balance", "none").code == 0
    pooled = metrics_of(tmp_path / "out")
    assert pooled["data"]["speakers"] == 24 and pooled["data"]["clips"] == 48
    assert sum(metrics_of(tmp_path / f"out/fold_{k}")["data"]["speakers"] for k in (1, 2, 3)) == 24
    assert "one per fold" in pooled["model"]["models"]


def test_seeds_are_summarised_by_the_recipe_and_compared_on_the_command_line(train, words, tmp_path, capsys):
    from accent_plugin.cli import main

    assert train(*words, "--number_of_epochs", "1", "--seeds", "3,4").code == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    values = [metrics_of(tmp_path / f"out/{seed}")["clip"]["accuracy"]["value"] for seed in (3, 4)]
    assert summary["clip"]["accuracy"]["values"] == values
    runs = [str(tmp_path / f"out/{seed}") for seed in (3, 4)]
    assert main.main(["compare", *runs, "--out", str(tmp_path / "compared")]) == 0
    assert "difference" in capsys.readouterr().out
    assert main.main(["summarise", *runs, "--out", str(tmp_path / "summary")]) == 0
    assert "standard deviation" in capsys.readouterr().out
    assert main.main(["compare", runs[0], str(tmp_path / "nowhere"), "--out", str(tmp_path / "x")]) == 2
    assert "no predictions in" in capsys.readouterr().err


def test_the_frozen_baseline_has_the_same_report_from_audio_and_from_kept_features(train, words, tmp_path, monkeypatch):
    from accent_plugin.training import feature_cache

    baseline = ("--method", "logistic_regression", "--features_folder", tmp_path / "features")
    assert train(*words, *baseline).code == 0
    metrics = metrics_of(tmp_path / "out")
    trials = json.loads((tmp_path / "out/save/trials.json").read_text())
    assert {trial["layer"] for trial in trials} == {0, 1, 2, 3}
    best = max(trials, key=lambda trial: (trial["valid_macro_f1"], -trial["valid_loss"]))
    assert metrics["model"]["layer"] == best["layer"] and metrics["clip"]["accuracy"]["n"] == 6
    for name in ("kept", "again"):
        assert train(*words, *baseline, "--output_folder", tmp_path / name, "--cache_features", "True").code == 0
        assert metrics_of(tmp_path / name)["clip"] == metrics["clip"]
        monkeypatch.setattr(feature_cache, "encode", None)


def test_the_baseline_can_be_held_to_one_layer(train, words, tmp_path):
    assert train(*words, "--method", "logistic_regression", "--weighted_layers", "[2]").code == 0
    assert metrics_of(tmp_path / "out")["model"]["layer"] == 2


@pytest.mark.slow
def test_the_leaky_split_says_so_and_is_compared_with_the_honest_one(train, words, tmp_path):
    arguments = ("--method", "logistic_regression", "--split", "both", "--n_folds", "3", "--balance", "none")
    assert train(*words, *arguments).code == 0
    assert (tmp_path / "out/random/report/report.md").read_text().splitlines()[0].count("LEAKY") == 1
    assert "LEAKY" not in (tmp_path / "out/speaker/report/report.md").read_text().splitlines()[0]
    assert "split by speaker" in (tmp_path / "out/leak.md").read_text()
    assert "difference" in json.loads((tmp_path / "out/comparison.json").read_text())["clip"]["accuracy"]


def test_frozen_features_are_whitened_and_scores_averaged_over_speeds(train, words, tmp_path):
    arguments = ("--freeze_wav2vec2", "True", "--pooling", "statistics", "--whitening_passes", "2")
    speeds = ("--test_speeds", "[0.9, 1.0, 1.1]", "--selection", "last", "--early_stopping", "0")
    assert train(*words, *arguments, *speeds).code == 0
    first = metrics_of(tmp_path / "out")
    assert train(*words, *arguments, *speeds, "--test_only", "True").code == 0
    assert metrics_of(tmp_path / "out")["clip"] == first["clip"]  # the whitening is part of the checkpoint
    assert train(*words, *arguments, "--selection", "last", "--early_stopping", "0", "--test_only", "True").code == 0
    assert metrics_of(tmp_path / "out")["clip"]["log_loss"] != first["clip"]["log_loss"]


def test_accents_that_are_no_classes_are_scored_for_rejection(train, words, tmp_path):
    done = train(*words, "--number_of_epochs", "1", "--accents", "[us, england]", "--out_of_set", "[scotland]")
    assert done.code == 0
    scored = metrics_of(tmp_path / "out")["out_of_set"]
    assert 0 <= scored["overall"]["auroc"] <= 1 and scored["overall"]["clips"] == 16


def test_the_test_split_can_be_degraded(train, words, tmp_path):
    from accent_plugin.audio.degradations import DEGRADATIONS

    assert train(*words, "--number_of_epochs", "1", "--test_degradations", "True").code == 0
    assert list(metrics_of(tmp_path / "out")["bands"]) == list(DEGRADATIONS)


def test_a_report_repeats_how_its_data_were_made():
    from accent_plugin.experiment.reports import describe_data

    prepared = SimpleNamespace(name="x", synthetic=False, speakers_disjoint=True, counts={}, dropped={})
    prepared.arguments, prepared.card = {"split": "speaker"}, {"dropped": {"client cap": 3}, "examples": [1]}
    assert describe_data(prepared)["made_before"] == {"dropped": {"client cap": 3}}


# What is refused: exit code 2, one message, no traceback, nothing written


def refused(done, tmp_path, *parts):
    assert done.code == 2
    assert "Traceback" not in done.err
    for part in parts:
        assert part in done.err
    assert not (tmp_path / "out").exists()


def test_missing_data_say_how_to_make_them_and_how_to_try_without(train, words, tmp_path):
    done = train(*words, "--data_folder", tmp_path / "nowhere")
    refused(done, tmp_path, "nowhere", "DatasetDict", "make demo")


def test_hyperparameters_are_refused_together_and_then_the_data(train, words, tmp_path):
    done = train(*words, "--accents", "[us, englnd]", "--pooling", "stats", "--lr_head", "fast")
    refused(done, tmp_path, "2 problems", "lr_head is 'fast'", "pooling is 'stats'")
    refused(train(*words, "--accents", "[us, englnd]"), tmp_path, "1 problem", "englnd", "did you mean 'england'?")


def test_a_dataset_in_place_of_a_datasetdict(train, words, corpus, tmp_path):
    refused(train(*words, "--data_folder", corpus / "train"), tmp_path, "DatasetDict")


def test_a_hub_name_without_a_network(train, words):
    done = train(*words, "--wav2vec2_hub", "facebook/wav2vec2-base")
    assert done.code == 2 and "Traceback" not in done.err
    assert "hf download facebook/wav2vec2-base" in done.err


def test_an_output_folder_that_cannot_be_written(train, words, tmp_path):
    (tmp_path / "file").write_text("")
    done = train(*words, "--output_folder", tmp_path / "file/out")
    assert done.code == 2 and "cannot write" in done.err and "output_folder" in done.err


def test_a_manifest_of_other_accents(train, words, finished, tmp_path):
    done = train(*words, "--skip_prep", "True", "--accents", "[us, england]", "--output_folder", tmp_path / "other")
    assert done.code == 2 and "has the accent(s) scotland; accents lists us, england" in done.err


def test_the_gpus_memory_is_full(train, words, monkeypatch):
    def full(*arguments):
        import torch

        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("accent_plugin.training.brain.AccentBrain.fit", full)
    done = train(*words)
    assert done.code == 2 and "lower batch_seconds" in done.err


def test_a_full_disk_is_named_and_what_was_made_stays(train, words, finished, monkeypatch):
    before = metrics_of(finished)

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device", str(finished))

    monkeypatch.setattr("accent_plugin.training.brain.AccentBrain.fit", full)
    done = train(*words)
    assert done.code == 2 and "No space left on device" in done.err and "Traceback" not in done.err
    assert metrics_of(finished) == before


# Real speech


@pytest.mark.slow
def test_real_speech_with_a_real_encoder(train, real_speech, real_moonshine, tmp_path):
    done = train(
        "hparams/wav2vec2_base.yaml",
        *("--data_folder", real_speech, "--wav2vec2_hub", real_moonshine, "--output_folder", tmp_path / "out"),
        *("--prepared_folder", tmp_path / "prepared", "--freeze_wav2vec2", "True", "--number_of_epochs", "2"),
        *("--weighted_layers", "[3, 4]", "--normalize_layers", "True", "--lr_head", "0.003", "--crop_seconds", "4"),
    )
    assert done.code == 0
    # Two epochs of a head are no result; chance is a third.
    assert metrics_of(tmp_path / "out")["clip"]["unweighted_average_recall"]["value"] > 0.4


# What stands in the way, or is spoilt in a run's folder


def a_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


def a_folder(path):
    path.mkdir(parents=True)


def a_link_to_nothing(path):
    path.symlink_to(path.with_name("nowhere") / "deeper")


def a_link_to_itself(path):
    path.symlink_to(path)


@pytest.mark.parametrize(
    "name, what",
    [(".", a_file), (".", a_link_to_nothing), (".", a_link_to_itself), ("hyperparams.yaml", a_folder),
     ("env.log", a_folder), ("log.txt", a_folder), ("train_log.txt", a_folder), ("run.json", a_folder),
     ("save", a_file), ("save/history.json", a_folder)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)  # fmt: skip
def test_what_stands_in_the_way_is_one_clear_error(train, words, tmp_path, name, what):
    what(tmp_path / "out" / name)
    done = train(*words, "--number_of_epochs", "1")
    assert done.code == 2 and "Traceback" not in done.err
    assert "output_folder" in done.err and str(tmp_path / "out" / name) in done.err


@pytest.mark.parametrize("content", [b'{"a', b"[1]", b'{"epoch": 1}', b'[{"x": 1}]', b"", b"null", b"\xff\xfe"])
def test_a_history_that_is_damaged_is_said_and_begun_anew(tmp_path, caplog, content):
    from accent_plugin.training.options import read_history

    (tmp_path / "history.json").write_bytes(content)
    assert read_history(tmp_path / "history.json") == [] and "history.json is damaged" in caplog.text


def test_where_every_checkpoint_is_damaged_nothing_is_evaluated(train, words, finished):
    report = (finished / "report/metrics.json").read_bytes()
    for path in (finished / "save").glob("CKPT*/model.ckpt"):
        path.write_bytes(b"")
    done = train(*words, "--test_only", "True")
    assert done.code == 2 and "no intact checkpoint" in done.err
    assert (finished / "report/metrics.json").read_bytes() == report


def test_a_run_goes_on_in_the_precision_that_it_found_fastest_when_it_began(train, words, tmp_path, monkeypatch):
    from accent_plugin import devices

    def trained_in(found, *more):
        monkeypatch.setattr(devices, "fastest_precision", lambda device: found)
        assert train(*words, "--number_of_epochs", "1", "--precision", "auto", *more).code == 0
        return json.loads((tmp_path / "out/run.json").read_text(encoding="utf-8"))["values"]["precision"]

    assert trained_in("bf16") == "bf16"
    assert "precision: bf16" in (tmp_path / "out/hyperparams.yaml").read_text(encoding="utf-8")
    # On a machine that is busy, the measurement may fall out differently.
    assert trained_in("fp32") == "bf16"
    assert trained_in("fp32", "--overwrite", "True") == "fp32"


# A fixed number of versions of each clip.
COPIES = ("--augment", "True", "--crop_seconds", "1", "--augment_copies", "2")


@pytest.mark.parametrize(
    ("options", "passes", "again"),
    [
        # Training and validation.
        (("--whitening_passes", "1"), 2, ("--seed", "3")),
        # Two copies for training, and validation.
        (("--pooling", "attentive_statistics", *COPIES), 3, ("--lr_head", "0.02")),
    ],
    ids=["means", "augmented frames"],
)
def test_a_head_on_kept_features_is_the_head_on_the_encoder(
    train, words, tmp_path, monkeypatch, options, passes, again
):
    from accent_plugin.training import feature_cache

    def history(folder, *more):
        frozen = ("--freeze_wav2vec2", "True", "--weighted_layers", "all", "--normalize_layers", "True")
        given = ("--output_folder", tmp_path / folder, "--features_folder", tmp_path / "features")
        assert train(*words, *frozen, *options, *given, *more).code == 0
        return json.loads((tmp_path / folder / "save/history.json").read_text(encoding="utf-8"))

    encoded, original = [], feature_cache.encode
    monkeypatch.setattr(feature_cache, "encode", lambda *how, **more: encoded.append(1) or original(*how, **more))
    for plain, kept in zip(history("plain"), history("kept", "--cache_features", "True"), strict=True):
        assert kept["train_loss"] == pytest.approx(plain["train_loss"], abs=1e-4)
        assert kept["valid_loss"] == pytest.approx(plain["valid_loss"], abs=1e-4)
    assert len(encoded) == passes
    history("again", "--cache_features", "True", *again)
    assert len(encoded) == passes
    kept, plain = (metrics_of(tmp_path / name)["clip"] for name in ("kept", "plain"))
    for name in ("accuracy", "macro_f1", "log_loss"):
        assert kept[name]["value"] == pytest.approx(plain[name]["value"], abs=1e-4)


def test_a_resumed_run_uses_the_cached_copies_of_its_epochs(train, words, tmp_path):
    steady = ("--warmup_fraction", "0", "--lr_schedule", "none", "--freeze_wav2vec2", "True", "--pooling", "statistics")
    kept = ("--cache_features", "True", "--features_folder", tmp_path / "features", *COPIES)
    for folder, epochs in (("whole", 3), ("parts", 2), ("parts", 3)):
        last = ("--output_folder", tmp_path / folder, "--number_of_epochs", epochs)
        assert train(*words, *steady, *kept, *last).code == 0
    whole, parts = ((tmp_path / name / "save/history.json").read_text(encoding="utf-8") for name in ("whole", "parts"))
    losses = [[row["train_loss"] for row in json.loads(text)] for text in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
