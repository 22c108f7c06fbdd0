"""Contradictions between hyperparameters."""

import math

from accent_plugin.audio.augment import KINDS
from accent_plugin.audio.changes import require_codec
from accent_plugin.encoder import lora
from accent_plugin.encoder.sources import find_source
from accent_plugin.errors import AccentPluginError, ConfigError
from accent_plugin.exchange.start import find_start
from accent_plugin.experiment.run_options import run_option_problems
from accent_plugin.training import distributed


def _adapter_problems(values):
    if values["lora_rank"] is None:
        if values["lora_alpha"] is not None or values["lora_dropout"]:
            yield "lora_alpha or lora_dropout is given, but there are no adapters: give lora_rank"
        return
    if values["freeze_wav2vec2"] or not values["freeze_feature_extractor"]:
        yield (
            "lora_rank freezes the encoder's own weights and trains adapters: freeze_wav2vec2 must be False and "
            "freeze_feature_extractor True"
        )
    if values["freeze_layers"] == values["num_layers"]:
        yield f"freeze_layers {values['freeze_layers']} leaves no layer for the adapters of lora_rank"
    if values["method"] != "fine_tuning":
        yield f"method {values['method']} does not train the encoder: lora_rank must be null"


def _feature_problems(values):
    changed = values["augment"] or values["crop_seconds"] is not None
    if values["augment_copies"] is not None and not changed:
        yield "augment_copies is given, but clips are not changed: give augment or crop_seconds"
    if not values["cache_features"] or values["method"] != "fine_tuning":
        return
    if not values["freeze_wav2vec2"]:
        yield "cache_features caches the output of a frozen encoder: freeze_wav2vec2 must be True"
    if changed and values["augment_copies"] is None:
        yield (
            "cache_features cannot cache clips that are cropped or augmented anew in every epoch: give augment_copies, "
            "the number of versions of each clip, such as 5"
        )


def contradictions(values, run_opts):
    """Find conflicts between valid values, and missing folders."""
    problems = list(run_option_problems(run_opts))
    if len(values["accents"]) < 2:
        problems.append(f"accents is {values['accents']}: give at least two")
    if values["n_folds"] in (1, 2):
        problems.append(
            f"n_folds is {values['n_folds']}; give 0 for none, or at least 3: one part tests, one validates"
        )
    if values["fold"] is not None and values["fold"] > values["n_folds"]:
        problems.append(f"fold is {values['fold']}, but n_folds is {values['n_folds']}")
    if values["split"] == "both" and (values["seeds"] or values["skip_prep"] or values["fold"]):
        problems.append("split both compares two runs: it cannot be combined with seeds, fold or skip_prep")
    both = sorted(set(values["accents"]) & set(values["out_of_set"] or ()))
    if both:
        problems.append(f"{', '.join(both)} cannot be in accents and in out_of_set")
    if values["out_of_set_folder"] is not None and values["out_of_set"] is None:
        problems.append("out_of_set_folder is given without out_of_set, which lists the accents to score")
    if values["method"] != "fine_tuning" and (values["test_degradations"] or values["out_of_set"] or values["seeds"]):
        problems.append(f"method {values['method']} has no test_degradations, out_of_set or seeds")
    if values["min_seconds"] >= values["max_seconds"]:
        problems.append(f"min_seconds {values['min_seconds']:g} is not below max_seconds {values['max_seconds']:g}")
    longest = min(values["max_seconds"], values["crop_seconds"] or math.inf)
    if values["batch_seconds"] < longest:
        problems.append(
            f"batch_seconds {values['batch_seconds']:g} is less than one clip of {longest:g} s, which max_seconds and "
            "crop_seconds allow"
        )
    if isinstance(values["class_weights"], list) and len(values["class_weights"]) != len(values["accents"]):
        problems.append(f"class_weights has {len(values['class_weights'])} values for {len(values['accents'])} accents")
    if values["balance"] == "sampler" and values["class_weights"] == "balanced":
        problems.append("balance sampler and class_weights balanced would correct the same imbalance twice")
    if values["valid_fraction"] + values["test_fraction"] >= 1:
        problems.append("valid_fraction and test_fraction leave no speakers to train on")
    if values["freeze_wav2vec2"] and (values["freeze_layers"] or values["freeze_encoder_steps"]):
        problems.append("freeze_wav2vec2 freezes the whole encoder: freeze_layers and freeze_encoder_steps must be 0")
    if values["freeze_wav2vec2"] and values["gradient_checkpointing"]:
        problems.append("gradient_checkpointing is given, but with freeze_wav2vec2 the encoder has no backward pass")
    if values["num_layers"] is not None and values["freeze_layers"] > values["num_layers"]:
        problems.append(f"freeze_layers {values['freeze_layers']} is more than num_layers {values['num_layers']}")
    dropped = [key for key in ("layerdrop", "encoder_layerdrop") if values["config_overrides"].get(key)]
    if dropped and values["weighted_layers"] is not None:
        problems.append(f"weighted_layers needs all layers, but {dropped[0]} drops some at random: give one of them")
    problems += _adapter_problems(values)
    problems += _feature_problems(values)
    if values["selection"] == "last" and values["early_stopping"]:
        problems.append("selection last keeps the last epoch, not the best: early_stopping must be 0")
    if values["whitening_passes"] and not values["freeze_wav2vec2"]:
        problems.append("whitening_passes needs a frozen encoder: freeze_wav2vec2 must be True")
    if values["whitening_passes"] and values["projector_size"] is not None:
        problems.append(
            "whitening_passes needs fixed features, but a projector is trained: projector_size must be null"
        )
    if run_opts.ckpt_interval_steps and values["ckpt_interval_minutes"]:
        problems.append("ckpt_interval_steps and ckpt_interval_minutes were both given: leave one out")
    on_cpu = run_opts.device == "cpu"
    if on_cpu and "fp16" in (values["precision"], values["eval_precision"]):
        problems.append("fp16 does not work on a CPU; choose bf16 or fp32")
    if values["overwrite"] and run_opts.test_only:
        problems.append("overwrite deletes the run that test_only would evaluate: give one of the two")
    if values["skip_prep"] and values["prepared_folder"] is None:
        problems.append("skip_prep is True, but prepared_folder is not given")
    if values["augment"] and not any(values[f"augment_{kind}"] for kind in KINDS):
        problems.append("augment is True, but every augmentation is off")
    for codec in values["augment_codecs"] or () if values["augment"] else ():
        try:
            require_codec(codec)
        except ConfigError as error:
            problems.append(f"augment_codecs: {error}")
    # With from_bundle, the encoder comes from the bundle, and wav2vec2_hub is ignored.
    key, find = ("wav2vec2_hub", find_source) if values["from_bundle"] is None else ("from_bundle", find_start)
    try:
        find(values[key])
    except AccentPluginError as error:
        problems.append(f"{key}: {error}")
    return problems


def unmet_requirements(values, run_opts):
    """Find a device or a package that cannot be used; this imports PyTorch, so call it when all else is right."""
    from speechbrain.utils.distributed import infer_device

    from accent_plugin.devices import require_device

    problems = []
    # With several processes, each one uses its own GPU.
    if not distributed.is_launched():
        try:
            require_device(run_opts.device or infer_device())
        except ConfigError as error:
            problems.append(str(error))
    if values["lora_rank"] is not None:
        try:
            lora.require_peft()
        except AccentPluginError as error:
            problems.append(f"lora_rank: {error}")
    return problems
