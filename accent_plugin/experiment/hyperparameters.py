"""Every hyperparameter of the recipe and the values that it takes."""

import dataclasses
import math

from accent_plugin.data.prepare import BALANCES, PreparationChoices
from accent_plugin.pooling import POOLINGS

# Checks of one value: a function that returns what is wanted where the value is not that, and None where it is.


def _switch(value):
    return None if isinstance(value, bool) else "True or False"


def _whole(low):
    def check(value):
        good = isinstance(value, int) and not isinstance(value, bool) and value >= low
        return None if good else f"a whole number, at least {low}"

    return check


def _number(low=-math.inf, high=math.inf, above=False):
    def check(value):
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        good = good and (low < value if above else low <= value) and value <= high
        bounds = f"{'above' if above else 'at least'} {low:g}" if low > -math.inf else ""
        bounds += f"{' and ' if bounds else ''}at most {high:g}" if high < math.inf else ""
        return None if good else f"a number {bounds}".strip()

    return check


def _one_of(*choices):
    return lambda value: None if value in choices else f"one of {', '.join(map(str, choices))}"


def _name_in(choices):
    """Looked up when a value is checked: a program may have added choices of its own by then."""
    return lambda value: _one_of(*choices)(value)


def _text(value):
    return None if isinstance(value, str) and value.strip() else "a text"


def _mapping(value):
    return None if isinstance(value, dict) else "a mapping such as {attention_dropout: 0.0}"


def _range(low):
    def check(value):
        good = isinstance(value, list) and len(value) == 2 and not any(_number(low, above=True)(v) for v in value)
        return None if good and value[0] <= value[1] else f"two numbers [from, to] above {low:g}, the smaller first"

    return check


def _layers(value):
    good = value == "all" or (isinstance(value, list) and value and not any(_whole(0)(v) for v in value))
    return None if good else "all, or a list of layer numbers such as [3, 4, 5]"


def _weights(value):
    good = value == "balanced" or (isinstance(value, list) and not any(_number(0, above=True)(v) for v in value))
    return None if good else "balanced, or a list with one weight per accent"


def _list_of(check, what):
    def check_all(value):
        good = isinstance(value, list) and value and not any(check(v) for v in value) and len(set(value)) == len(value)
        return None if good else what

    return check_all


def _or_nothing(check):
    def check_or_nothing(value):
        wanted = None if value is None else check(value)
        return wanted and f"{wanted}, or null"

    return check_or_nothing


_SHARE = _number(0, 1)


_PRECISIONS = ("fp32", "fp16", "bf16")


# Every plain key of a YAML of this recipe.
KEYS = {
    "name": _text,
    "seed": _whole(0),
    "seeds": _or_nothing(_list_of(_whole(0), "a list of different whole numbers such as 1,2,3")),
    "data_seed": _whole(0),
    "data_folder": _text,
    "prepared_folder": _or_nothing(_text),
    "output_folder": _text,
    "save_folder": _text,
    "train_log": _text,
    "skip_prep": _switch,
    "overwrite": _switch,
    "accents": _list_of(_text, "a list of different accents"),
    "split": _one_of("speaker", "random", "both"),
    "n_folds": _whole(0),
    "fold": _or_nothing(_whole(1)),
    "source_splits": _or_nothing(_list_of(_text, "a list of splits such as [train, validation]")),
    "disjoint_sentences": _switch,
    "balance": _one_of(*BALANCES),
    "max_clips_per_client": _or_nothing(_whole(1)),
    "min_seconds": _number(0),
    "max_seconds": _number(0, above=True),
    "max_unreadable_share": _SHARE,
    "valid_fraction": _number(0, 0.5, above=True),
    "test_fraction": _number(0, 0.5, above=True),
    "accent_column": _or_nothing(_text),
    "client_column": _or_nothing(_text),
    "sentence_column": _or_nothing(_text),
    "audio_column": _or_nothing(_text),
    "prepare_workers": _or_nothing(_whole(1)),
    "method": _one_of("fine_tuning", "logistic_regression"),
    "out_of_set": _or_nothing(_list_of(_text, "a list of accents such as [scotland, ireland]")),
    "out_of_set_folder": _or_nothing(_text),
    "bands": _switch,
    "test_speeds": _list_of(_number(0, above=True), "a list of different speed factors such as [0.9, 1.0, 1.1]"),
    "wav2vec2_hub": _text,
    "wav2vec2_folder": _or_nothing(_text),
    "from_bundle": _or_nothing(_text),
    "freeze_wav2vec2": _switch,
    "cache_features": _switch,
    "features_folder": _text,
    "freeze_feature_extractor": _switch,
    "freeze_layers": _whole(0),
    "freeze_encoder_steps": _whole(0),
    "num_layers": _or_nothing(_whole(1)),
    "weighted_layers": _or_nothing(_layers),
    "standardise_layers": _switch,
    "attn_implementation": _or_nothing(_one_of("sdpa", "eager", "flash_attention_2")),
    "gradient_checkpointing": _switch,
    "config_overrides": _mapping,
    "lora_rank": _or_nothing(_whole(1)),
    "lora_alpha": _or_nothing(_number(0, above=True)),
    "lora_dropout": _number(0, 0.95),
    "projector_size": _or_nothing(_whole(1)),
    "projector_activation": _switch,
    "pooling": _name_in(POOLINGS),
    "whitening_passes": _whole(0),
    "whitening_shrinkage": _SHARE,
    "dropout": _number(0, 0.95),
    "number_of_epochs": _whole(1),
    "batch_seconds": _number(0, above=True),
    "crop_seconds": _or_nothing(_number(0.1)),
    "lr_encoder": _number(0, 1),
    "lr_head": _number(0, 1, above=True),
    "weight_decay": _number(0),
    "warmup": _SHARE,
    "decay": _one_of("linear", "cosine", "none"),
    "max_grad_norm": _number(0, above=True),
    "grad_accumulation_factor": _whole(1),
    "label_smoothing": _number(0, 0.9),
    "class_weights": _or_nothing(_weights),
    "precision": _one_of("auto", *_PRECISIONS),
    "eval_precision": _one_of(*_PRECISIONS),
    "selection": _one_of("macro_f1", "loss", "last"),
    "early_stopping": _whole(0),
    "ckpt_interval_minutes": _whole(0),
    "num_workers": _whole(0),
    "tensorboard": _switch,
    "augment": _switch,
    "augment_probability": _SHARE,
    "augment_speed": _or_nothing(_range(0)),
    "augment_noise_snr": _or_nothing(_range(-100)),
    "augment_band": _or_nothing(_range(0)),
    "augment_mask_seconds": _or_nothing(_number(0, above=True)),
}


# Given on the command line they start at the working directory; left at their default, at the project's root.
PATHS = (
    *("data_folder", "prepared_folder", "out_of_set_folder", "output_folder", "save_folder", "train_log"),
    *("wav2vec2_folder", "features_folder", "from_bundle"),
)


# Fields of PreparationChoices; as hyperparameters they have the same names, but for the seed.
CHOICES = {field.name for field in dataclasses.fields(PreparationChoices)}


def wrong_values(values):
    """Key -> problem."""
    problems = {}
    for key, check in KEYS.items():
        if key not in values:
            problems[key] = f"{key} is missing"
        elif wanted := check(values[key]):
            problems[key] = f"{key} is {values[key]!r}; it should be {wanted}"
    missing = CHOICES - (values.get("preparation") or {}).keys()
    if missing:
        problems["preparation"] = f"preparation lacks {', '.join(sorted(missing))}: give each as !ref <its name>"
    return problems
