"""Hyperparameters: every problem of a run at once, before anything is built or written."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from accent_plugin.errors import ConfigError
from accent_plugin.experiment import settings as experiment_settings
from accent_plugin.experiment.hyperparameters import RENAMED, TABLE
from accent_plugin.experiment.settings import read_settings
from accent_plugin.pooling import POOLINGS

HPARAMS = str(ROOT / "hparams/wav2vec2_base.yaml")


@pytest.fixture
def read(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = str(tiny_encoder("wav2vec2-group"))

    def call(*words, hparams=HPARAMS):
        return read_settings([hparams, "--wav2vec2_hub", encoder, *words], ROOT, look_at_data=False)

    return call


def problems(read, *words, **keywords):
    with pytest.raises(ConfigError) as caught:
        read(*words, **keywords)
    return str(caught.value).splitlines()


def test_defaults_are_right(read):
    values = read().values
    assert values["accents"] == ["us", "england", "australia"]
    assert (values["lr_encoder"], values["lr_head"]) == (1e-5, 1e-4)


def test_every_key_of_the_yaml_is_checked_and_every_checked_key_is_in_the_yaml(read):
    objects = {"wav2vec2", "model", "modules", "epoch_counter", "augmentation", "checkpointer", "train_logger"}
    objects |= {"tensorboard_logger", "__set_seed", "loading", "training", "preparation", "evaluation"}
    text = re.sub(r"!(new|apply|ref)\S*", "", Path(HPARAMS).read_text(encoding="utf-8"))
    assert set(yaml.safe_load(text)) == set(TABLE) | objects


def test_the_device_that_is_taken_by_itself_is_tried_as_well(read, monkeypatch):
    monkeypatch.setattr("speechbrain.utils.distributed.infer_device", lambda: "tpu")
    assert any("device 'tpu' cannot be used here" in line for line in problems(read))


def test_all_problems_are_named_at_once(read):
    lines = problems(read, "--pooling", "stats", "--lr_hed", "0.1", "--dropout", "2", "--balance")
    assert "4 problems" in lines[0]
    assert "  '--lr_hed' is no hyperparameter or run option (did you mean --lr_head?)" in lines
    assert f"  pooling is 'stats'; it should be one of {', '.join(POOLINGS)}" in lines
    assert "  dropout is 2; it should be a number at least 0 and at most 0.95" in lines
    assert "  --balance was given without a value" in lines


# A frozen encoder whose features are kept.
KEPT = ("--cache_features", "True", "--freeze_wav2vec2", "True")


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--seed", "-1"], "seed is -1; it should be a whole number, at least 0"),
        (["--seed", "True"], "seed is True; it should be a whole number"),
        (["--number_of_epochs", "2.5"], "number_of_epochs is 2.5"),
        (["--accents", "[us]"], "accents is .'us'.: give at least two"),
        (["--accents", "[us, us]"], "a list of different accents"),
        (["--n_folds", "2"], "n_folds is 2; give 0 for none, or at least 3"),
        (["--fold", "4", "--n_folds", "3"], "fold is 4, but n_folds is 3"),
        (["--seeds", "1,x"], "seeds is '1,x'; it should be a list of different whole numbers"),
        (["--accents", "us"], "accents is 'us'"),
        (["--lr_head", "fast"], "lr_head is 'fast'; it should be a number"),
        (["--lr_head", "nan"], "lr_head is nan"),
        (["--augment", "perhaps"], "augment is 'perhaps'; it should be True or False"),
        (["--augment_speed", "[1.1, 0.9]"], "augment_speed is .*the smaller first"),
        (["--weighted_layers", "some"], "weighted_layers is 'some'; it should be all, or a list"),
        (["--config_overrides", "7"], "config_overrides is 7; it should be a mapping"),
        (["--min_seconds", "5", "--max_seconds", "2"], "min_seconds 5 is not below max_seconds 2"),
        (["--batch_seconds", "3"], "batch_seconds 3 is less than one clip of 20 s"),
        (["--class_weights", "[1, 2]"], "class_weights has 2 values for 3 accents"),
        (["--balance", "sampler", "--class_weights", "balanced"], "the same imbalance twice"),
        (["--freeze_wav2vec2", "True", "--freeze_layers", "2"], "freezes the whole encoder"),
        (["--freeze_wav2vec2", "True", "--gradient_checkpointing", "True"], "the encoder has no backward pass"),
        (["--whitening_passes", "2"], "needs a frozen encoder: freeze_wav2vec2 must be True"),
        (["--cache_features", "True"], "the output of a frozen encoder: freeze_wav2vec2 must be True"),
        ([*KEPT, "--augment", "True"], "augmented anew in every epoch: give augment_copies"),
        ([*KEPT, "--crop_seconds", "3"], "cropped or augmented anew in every epoch: give augment_copies"),
        (["--augment_copies", "3"], "clips are not changed: give augment or crop_seconds"),
        (["--lora_rank", "0"], "lora_rank is 0; it should be a whole number, at least 1, or null"),
        (["--lora_rank", "4", "--lora_alpha", "0"], "lora_alpha is 0; it should be a number above 0"),
        (["--lora_rank", "4", "--lora_dropout", "1"], "lora_dropout is 1; it should be a number at least 0"),
        (["--lora_alpha", "16"], "lora_alpha or lora_dropout is given, but there are no adapters"),
        (["--lora_rank", "4", "--freeze_wav2vec2", "True"], "freeze_wav2vec2 must be False"),
        (["--lora_rank", "4", "--freeze_feature_extractor", "False"], "freeze_feature_extractor True"),
        (
            ["--weighted_layers", "all", "--config_overrides", "{layerdrop: 0.1}"],
            "weighted_layers needs all layers, but layerdrop drops some",
        ),
        (["--lora_rank", "4", "--num_layers", "2", "--freeze_layers", "2"], "leaves no layer for the adapters"),
        (["--lora_rank", "4", "--method", "logistic_regression"], "does not train the encoder: lora_rank must be null"),
        (["--selection", "last"], "early_stopping must be 0"),
        (["--test_speeds", "[1, 1]"], "test_speeds is .*a list of different speed factors"),
        (["--out_of_set_folder", "x"], "out_of_set_folder is given without out_of_set"),
        (["--out_of_set", "[us, scotland]"], "us cannot be in accents and in out_of_set"),
        (["--num_layers", "2", "--freeze_layers", "3"], "freeze_layers 3 is more than num_layers 2"),
        (["--device", "tpu:7"], "device 'tpu:7' cannot be used here"),
        (["--precision", "fp16", "--device", "cpu"], "fp16 does not work on a CPU"),
        (["--skip_prep", "True"], "skip_prep is True, but prepared_folder is not given"),
        (["--overwrite", "True", "--test_only"], "overwrite deletes the run that test_only would evaluate"),
        (["--wav2vec2_hub", "./nowhere"], "wav2vec2_hub: there is no folder"),
        (["--class_weights", "{us: 1, england: 2}"], "class_weights is {'us': 1, 'england': 2}; it should be balanced"),
        (["--number_of_epochs", "{a: 1}"], "number_of_epochs is {'a': 1}; it should be a whole number"),
        (["--jit"], "--jit is not supported: .* use --compile"),
        (["--jit_module_keys", "model"], "--jit_module_keys is not supported"),
        (["--data_parallel_backend"], "--data_parallel_backend is not supported: .* use torchrun"),
        (["--auto_mix_prec"], "--auto_mix_prec is not supported: .* --precision fp16"),
        (["--bfloat16_mix_prec"], "--bfloat16_mix_prec is not supported: .* --precision bf16"),
        (["--remove_vector_weight_decay"], "--remove_vector_weight_decay is not supported"),
        (["--augment_probability", "{tempo: 0.5}"], "augment_probability is .* from default, speed, formants"),
        (["--augment_probability", "{speed: 1.5}"], "augment_probability is .* to probabilities"),
        (["--augment_codecs", "[mp3, vorbis]"], "augment_codecs is .* a list of mp3, opus, gsm, mu-law, amr"),
        (["--augment_packet_loss", "[0.2, 0.95]"], "augment_packet_loss is .* two fractions"),
        (["--augment_clipping", "[0.2, 0.1]"], "augment_clipping is .* the smaller first"),
        (["--compile_mode", "fast"], "compile_mode is 'fast'; it should be one of default, reduce-overhead"),
        (["--distributed_backend", "tcp"], "distributed_backend is 'tcp'; it should be one of nccl"),
        (["--compile_module_keys", "model", "head"], "the only module is model"),
        (["--optimizer_step_limit", "few"], "optimizer_step_limit is 'few'; it should be a whole number"),
        (["--debug_batches", "0"], "debug_batches is 0; it should be at least 1"),
        (["--param_file", "x"], "'--param_file' is no hyperparameter or run option"),
        (["--debug", "perhaps"], "--debug is 'perhaps'; it should be True or False"),
    ],
)
def test_a_wrong_value_is_named(read, words, problem):
    assert re.search(problem, "\n".join(problems(read, *words)))


def test_a_start_that_is_none(read, tiny_encoder, tiny_bundle, tmp_path):
    assert "from_bundle: there is no folder" in "\n".join(problems(read, "--from_bundle", "nowhere"))
    encoder = str(tiny_encoder("hubert-group"))
    assert "holds a HubertModel, which is not a classifier" in "\n".join(problems(read, "--from_bundle", encoder))
    cut = shutil.copytree(tiny_bundle, tmp_path / "cut")
    (cut / "model.ckpt").write_bytes(b"")
    assert re.search("from_bundle: .*is empty", "\n".join(problems(read, "--from_bundle", str(cut))))


def test_a_start_takes_the_place_of_the_encoders_source(read, tiny_bundle, monkeypatch):
    monkeypatch.chdir(tiny_bundle.parent)
    values = read("--from_bundle", tiny_bundle.name, "--wav2vec2_hub", "./nowhere").values
    assert values["from_bundle"] == str(tiny_bundle)


def test_a_hyperparameter_that_an_older_yaml_does_not_use(read, tmp_path):
    lines = Path(HPARAMS).read_text(encoding="utf-8").splitlines(keepends=True)
    older = tmp_path / "older.yaml"
    older.write_text("".join(line for line in lines if "augment_copies" not in line), encoding="utf-8")
    assert read(hparams=str(older)).values["augment_copies"] is None
    found = "\n".join(problems(read, "--augment_copies", "2", "--augment", "True", hparams=str(older)))
    assert re.search("older.yaml does not use augment_copies: it was written for an older version", found)


def test_adapters_without_peft(read, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install 'accent_plugin[lora]'" in "\n".join(problems(read, "--lora_rank", "4"))
    assert read().values["lora_rank"] is None


def test_a_switch_with_every_augmentation_off_is_a_contradiction(read):
    off = [w for kind in ("speed", "noise_snr", "band", "mask_seconds") for w in (f"--augment_{kind}", "null")]
    assert "every augmentation is off" in "\n".join(problems(read, "--augment", "True", *off))


def test_a_kind_of_augmentation_can_have_its_own_probability(read):
    assert read().values["augment_probability"] == {"default": 0.5}
    assert read("--augment_probability", "0.9").values["augment_probability"] == 0.9
    found = read("--augment_probability", "{speed: 0.8, default: 0.25}").values["augment_probability"]
    assert found == {"speed": 0.8, "default": 0.25}


def test_a_codec_without_its_package_is_a_problem_before_training(read, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    words = ["--augment_codecs", "[amr, mp3]"]
    assert r'augment_codecs: the codec amr needs PyAV: pip install "accent_plugin[media]"' in "\n".join(
        problems(read, "--augment", "True", *words)
    )
    assert read(*words).values["augment"] is False


def test_a_wrong_run_option_is_an_error_of_ours(read, capsys):
    assert "run option" in "\n".join(problems(read, "--eval_precision", "fp8"))
    assert "precision is 'fp8'; it should be one of auto" in "\n".join(problems(read, "--precision", "fp8"))


def test_missing_yaml(read):
    assert "cannot be read: No such file" in "\n".join(problems(read, hparams="nowhere.yaml"))


def test_a_yaml_that_is_none(read, tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1, 2\n b: }")
    assert "the YAML cannot be read" in "\n".join(problems(read, hparams=str(tmp_path / "bad.yaml")))


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--name", "x", "\u2014lr_head", "0.1"], "'\u2014lr_head' does not begin with two hyphens: type --lr_head"),
        (["--name", "x", "\u2013\u2013lr_head=0.1"], "does not begin with two hyphens: type --lr_head=0.1"),
        (["--name", "\u2212lr_head", "0.1"], "type --lr_head"),
        (["--name", "x", "-lr_head", "0.1"], "'-lr_head' does not begin with two hyphens: type --lr_head"),
        (["--name", "x", "lr_head=0.1"], "'lr_head=0.1' does not begin with two hyphens: type --lr_head=0.1"),
        (["--debug", "\u2014noprogressbar"], "type --noprogressbar"),
        (["--name", "x", "bands=True"], "type --bands=True"),
        (["--name", "x", "-lr_hed", "0.1"], "'-lr_hed' is no hyperparameter or run option .did you mean --lr_head"),
        (["--name", "my", "run"], "'run' is no hyperparameter or run option: .*quote the value of --name"),
        (
            ["--accents", "us,", "england"],
            "'england' is no hyperparameter or run option: .*quote the value of --accents",
        ),
        (["--accents", "[us,", "england]", "wales"], "'wales' is no hyperparameter or run option"),
    ],
)
def test_a_word_that_is_neither_an_option_nor_a_value_is_a_problem(read, words, problem):
    found = "\n".join(problems(read, *words))
    assert re.search(problem, found)
    # The value of a misspelt option is no problem of its own.
    assert "'0.1'" not in found


@pytest.mark.parametrize(
    "words, key, value",
    [
        (["--accents", "[us,", "england]"], "accents", ["us", "england"]),
        (["--augment_noise_snr", "[-5,", "1e1]"], "augment_noise_snr", [-5, 10.0]),
        (["--config_overrides", "{hidden_dropout: 1e-1}"], "config_overrides", {"hidden_dropout": 0.1}),
        (["--name=\u2014x y"], "name", "\u2014x y"),
        (["--name", "a=b"], "name", "a=b"),
        (["--accents", "[us, 1e5]"], "accents", ["us", "1e5"]),
    ],
)
def test_a_value_is_one_word_or_a_bracket(read, words, key, value):
    assert read(*words).values[key] == value


def test_a_limit_on_steps_is_a_number(read):
    assert read("--optimizer_step_limit", "3").run_opts.optimizer_step_limit == 3


@pytest.mark.parametrize(
    "content, problem", [(b"<html><title>404</title>", "is an HTML page"), (b"just text", "no names")]
)
def test_a_file_that_is_no_yaml_of_hyperparameters(read, tmp_path, content, problem):
    (tmp_path / "bad.yaml").write_bytes(content)
    assert problem in "\n".join(problems(read, hparams=str(tmp_path / "bad.yaml")))


def test_a_stray_word():
    with pytest.raises(ConfigError, match="'stray' is no hyperparameter or run option"):
        read_settings([HPARAMS, "stray"], ROOT, look_at_data=False)


def test_no_yaml_at_all():
    with pytest.raises(ConfigError, match="the first argument is a YAML"):
        read_settings([], ROOT)


def test_words_of_the_command_line_become_values(read):
    """Scientific notation, null where that has a meaning, an equals sign."""
    values = read("--lr_encoder", "3e-4", "--max_clips_per_client", "null", "--pooling=attentive").values
    assert (values["lr_encoder"], values["max_clips_per_client"], values["pooling"]) == (3e-4, None, "attentive")


@pytest.mark.parametrize("text, seeds", [("1,2,3", [1, 2, 3]), ("[4, 5]", [4, 5]), ("7", [7]), ("null", None)])
def test_seeds(read, text, seeds):
    assert read("--seeds", text).values["seeds"] == seeds


def test_runs_with_several_seeds_stand_where_single_runs_would(read):
    assert read("--seeds", "1,2").values["output_folder"] == str(ROOT / "results/wav2vec2_base")


def test_changing_the_output_folder_moves_what_lies_below_it(read, tmp_path):
    values = read("--seed", "3").with_values(output_folder=str(tmp_path)).values
    assert values["save_folder"] == str(tmp_path / "save") and values["seed"] == 3


def test_flags_of_speechbrain_may_carry_a_truth_value(read):
    assert read("--test_only", "True").run_opts.test_only
    assert read("--debug").run_opts.debug
    assert not read("--test_only", "False").run_opts.test_only


def test_run_options_reach_the_checked_values(read):
    given = {"eval_precision": "bf16", "grad_accumulation_factor": 4, "max_grad_norm": 2.5, "ckpt_interval_minutes": 7}
    settings = read(*(str(word) for key, value in given.items() for word in (f"--{key}", value)))
    for key, value in given.items():
        assert settings.values[key] == getattr(settings.run_opts, key) == value


def test_the_precision_is_a_hyperparameter_and_no_run_option(read):
    settings = read("--precision", "bf16")
    assert settings.values["precision"] == "bf16" and settings.run_opts.precision == "fp32"


def test_paths_of_the_command_line_start_at_the_working_directory(read, tmp_path):
    settings = read("--data_folder", "here", "--output_folder", "out")
    assert settings.values["data_folder"] == str(tmp_path / "here")
    assert settings.values["save_folder"] == str(tmp_path / "out" / "save")


def test_default_paths_start_at_the_root(read):
    values = read("--seed", "5").values
    assert values["data_folder"] == str(ROOT / "data/common_voice_accent")
    assert values["output_folder"] == str(ROOT / "results/wav2vec2_base/5")


def test_a_folder_that_looks_like_a_number_stays_a_text(read, tmp_path):
    assert read("--output_folder", "1e5").values["output_folder"] == str(tmp_path / "1e5")


def test_no_tag_of_the_yaml_is_executed(read, tmp_path):
    text = Path(HPARAMS).read_text(encoding="utf-8") + f"\nevil: !apply:os.mkdir ['{tmp_path}/made']\n"
    (tmp_path / "evil.yaml").write_text(text)
    read(hparams=str(tmp_path / "evil.yaml"))
    assert not (tmp_path / "made").exists()


# ---- overlays


def overlay(folder, text, name="mine.yaml"):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_an_overlay_changes_its_base_and_the_command_line_changes_both(read, tmp_path):
    mine = overlay(tmp_path, f"base: {HPARAMS}\nname: mine\nlr_head: 1e-3\ndropout: 0.3\ndata_folder: !PLACEHOLDER\n")
    settings = read("--dropout", "0.2", hparams=mine)
    values = settings.values
    assert (values["name"], values["lr_head"], values["dropout"]) == ("mine", 1e-3, 0.2)
    assert values["data_folder"] == read().values["data_folder"]
    assert values["output_folder"] == str(ROOT / "results/mine/1986")
    assert settings.hparams_file == HPARAMS and settings.overrides["name"] == "mine"


def test_paths_of_an_overlay_start_at_the_root(read, tmp_path):
    mine = overlay(tmp_path, f"base: {HPARAMS}\nwav2vec2_folder: cache\n")
    assert read(hparams=mine).values["wav2vec2_folder"] == str(ROOT / "cache")


def test_an_overlay_may_have_an_overlay_as_its_base(read, tmp_path):
    overlay(tmp_path, f"base: {HPARAMS}\nname: first\ndropout: 0.3\n", "first.yaml")
    values = read(hparams=overlay(tmp_path, "base: first.yaml\nname: second\n")).values
    assert (values["name"], values["dropout"]) == ("second", 0.3)


def test_the_yaml_that_was_given_is_named_in_errors(read, tmp_path):
    mine = overlay(tmp_path, f"base: {HPARAMS}\ndropout: 3\n")
    lines = problems(read, hparams=mine)
    assert lines[0] == f"1 problem in {mine} and its command line" and "dropout is 3" in lines[1]


@pytest.mark.parametrize(
    "text, problem",
    [
        ("base: nowhere.yaml", "nowhere.yaml cannot be read: No such file"),
        ("base: mine.yaml", "refers back to it"),
        ("base: [1]", "the overlay .* cannot be read"),
        (f"base: {HPARAMS}\nmodel: 3\nmixup: 0.5", "it can contain only hyperparameters, not mixup, model"),
        (f"base: {HPARAMS}\nname: !ref <seed>", "the overlay .* cannot be read: .*!ref"),
    ],
)
def test_an_overlay_that_is_none(read, tmp_path, text, problem):
    assert re.search(problem, "\n".join(problems(read, hparams=overlay(tmp_path, text))), re.S)


# ---- names of version 0.1.0


@pytest.fixture
def warnings(caplog):
    experiment_settings._warn_once.cache_clear()
    return caplog


def old_yaml(folder):
    """The YAML with the names of version 0.1.0."""
    text = Path(HPARAMS).read_text(encoding="utf-8")
    for old, new in RENAMED.items():
        text = re.sub(rf"^{new}:", f"{old}:", text, flags=re.M).replace(f"<{new}>", f"<{old}>")
    return overlay(folder, text, "old.yaml")


def test_names_of_version_0_1_0_stay_accepted():
    assert RENAMED == {
        "bands": "test_degradations",
        "standardise_layers": "normalize_layers",
        "warmup": "warmup_fraction",
        "decay": "lr_schedule",
        "max_unreadable_share": "max_unreadable_fraction",
    }


def test_an_old_name_on_the_command_line_is_warned_of_once(read, warnings):
    for _ in range(2):
        settings = read("--warmup", "2e-1", "--decay=cosine")
    assert (settings.values["warmup_fraction"], settings.values["lr_schedule"]) == (0.2, "cosine")
    assert settings.overrides["warmup_fraction"] == 0.2
    assert [record.getMessage().partition(";")[0] for record in warnings.records] == [
        "--warmup is now called --warmup_fraction",
        "--decay is now called --lr_schedule",
    ]


def test_both_names_at_once_are_a_problem(read):
    lines = problems(read, "--warmup", "0.2", "--warmup_fraction", "0.3")
    assert "--warmup is now called --warmup_fraction, and both were given" in lines[1]


def test_a_yaml_with_old_names_is_changed_by_new_ones(read, warnings, tmp_path):
    settings = read("--warmup_fraction", "0.3", hparams=old_yaml(tmp_path)).with_values(test_degradations=True)
    assert settings.values["warmup_fraction"] == 0.3
    assert settings.values["test_degradations"] is settings.values["evaluation"]["bands"] is True
    # They are for load_hyperpyyaml, and references of that YAML.
    assert settings.overrides["warmup"] == 0.3 and "warmup_fraction" not in settings.overrides
    assert "bands is now called test_degradations" in warnings.text


def test_an_overlay_with_an_old_name_is_read(read, warnings, tmp_path):
    mine = overlay(tmp_path, f"base: {HPARAMS}\nstandardise_layers: True\n")
    assert read(hparams=mine).values["normalize_layers"] is True
    assert "standardise_layers is now called normalize_layers" in warnings.text


def test_the_yaml_is_resolved_before_and_after_its_paths_are_made_absolute(read, monkeypatch):
    monkeypatch.setattr(experiment_settings, "_resolved", {})
    resolve, calls = experiment_settings.resolve_references, []
    monkeypatch.setattr(
        experiment_settings, "resolve_references", lambda *words: calls.append(words) or resolve(*words)
    )
    assert Path(read().values["save_folder"]).is_absolute()
    assert len(calls) == 2


def test_a_path_moves_with_the_path_that_it_refers_to_by_another_name(read, tmp_path):
    text = Path(HPARAMS).read_text(encoding="utf-8")
    line = re.search("^save_folder: .*", text, re.M).group()
    between = "kept: !ref <output_folder>/kept\nsave_folder: !ref <kept>/save"
    (tmp_path / "own.yaml").write_text(text.replace(line, between), encoding="utf-8")
    settings = read(hparams=str(tmp_path / "own.yaml"))
    assert settings.values["save_folder"] == settings.values["output_folder"] + "/kept/save"
    assert settings.with_values(output_folder="/moved").values["save_folder"] == "/moved/kept/save"
