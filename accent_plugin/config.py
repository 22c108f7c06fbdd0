"""Check all hyperparameters before anything is built: every problem of a run is named at once, within seconds.

Only plain values are checked. They are read from the YAML's text with its references resolved, so that no object is
made and no file written.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
from pathlib import Path

import yaml
from hyperpyyaml import resolve_references
from speechbrain.utils.distributed import infer_device
from speechbrain.utils.run_opts import RunOptions

from accent_plugin import manifests, processes
from accent_plugin.errors import AccentPluginError, ConfigError
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
    "balance": _one_of(*manifests.BALANCES),
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

# Groups of hyperparameters in the YAML, each a mapping.
_GROUPS = ("preparation", "evaluation")

# Given on the command line they start at the working directory; left at their default, at the project's root.
PATHS = (
    *("data_folder", "prepared_folder", "out_of_set_folder", "output_folder", "save_folder", "train_log"),
    *("wav2vec2_folder", "features_folder", "from_bundle"),
)


# Fields of accent_plugin.manifests.Choices; as hyperparameters they have the same names, but for the seed.
_CHOICES = {field.name for field in dataclasses.fields(manifests.Choices)}
_PREPARATION = _CHOICES - {"seed"} | {"data_seed", "skip_prep", "prepared_folder", "data_folder"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """A checked configuration.

    Attributes
    ----------
    hparams_file : str
    run_opts : speechbrain.utils.run_opts.RunOptions
    overrides : dict
        For `load_hyperpyyaml`: what the command line changed, and every path made absolute.
    root : Path
        Where default paths start.
    """

    hparams_file: str
    run_opts: RunOptions
    overrides: dict
    root: Path

    @functools.cached_property
    def values(self):
        """Every plain value of the YAML after the overrides."""
        values = _plain(_read_yaml(self.hparams_file), self.overrides)
        return values | {key: getattr(self.run_opts, key) for key in _SHARED & self.run_opts.overridden_args}

    def but(self, **changes):
        """The same configuration with some values changed, and what refers to them."""
        return dataclasses.replace(self, overrides={**self.overrides, **changes})

    def splits(self):
        """This configuration, or one for each way to split where both are asked for."""
        if self.values["split"] != "both":
            return [self]
        return [self.but(split=kind, **self._below(kind)) for kind in ("speaker", "random")]

    def _below(self, name):
        """Folders of a part of a run that has several."""
        folders = {"output_folder": str(Path(self.values["output_folder"]) / name)}
        if self.values["prepared_folder"] is not None:
            folders["prepared_folder"] = str(Path(self.values["prepared_folder"]) / name)
        return folders

    def located(self, preparation):
        """Arguments of the recipe's preparation, with the folder that they stand for where none was given."""
        choices = {field: value for field, value in preparation.items() if field in _CHOICES}
        prepared_folder = preparation["prepared_folder"]
        if prepared_folder is None and not preparation["skip_prep"]:
            prepared_folder = self.root / "data" / "prepared"
            # Where there are no such data, that is said when they are looked for.
            with contextlib.suppress(AccentPluginError):
                prepared_folder = manifests.default_folder(preparation["data_folder"], prepared_folder, **choices)
        return preparation | {"prepared_folder": prepared_folder}

    def outsiders(self):
        """The same for speech of accents that are not among the classes; None where none is asked for."""
        if self.values["out_of_set"] is None:
            return None
        folder = self.values["out_of_set_folder"] or self.values["data_folder"]
        changes = {"accents": self.values["out_of_set"], "split": "all", "balance": "none", "n_folds": 0}
        folders = {"data_folder": folder, "prepared_folder": None, "skip_prep": False}
        return self.located(self.values["preparation"] | changes | folders)


# Run options of SpeechBrain that have their default in the YAML.
_SHARED = {"eval_precision", "grad_accumulation_factor", "max_grad_norm", "ckpt_interval_minutes"}


def read(argv, root, look_at_data=True):
    """Read a command line and the YAML it names, and check all of it.

    Arguments
    ---------
    argv : list of str
        A YAML's path, then `--key value` for hyperparameters and SpeechBrain's run options.
    root : Path
        Where default paths start.
    look_at_data : bool
        Also check what only the data can tell, such as whether they have the accents; nothing is decoded.

    Returns
    -------
    Settings

    Raises
    ------
    ConfigError
        With every problem, each on a line of its own.
    """
    hparams_file, own, others = _split(argv)
    text = _read_yaml(hparams_file)
    known = _plain(text, {})
    run_opts, stray = _run_options(hparams_file, others)
    problems = [_unknown(word, known) for word in stray]
    overrides = {}
    for key, words in own.items():
        if key not in known or key not in KEYS:
            problems.append(_unknown(f"--{key}", known))
        elif not words:
            problems.append(f"--{key} was given without a value")
        else:
            overrides[key] = _value(key, " ".join(words))
    for key in PATHS:
        # An empty one is no folder, and not the working directory either.
        if isinstance(overrides.get(key), str) and overrides[key].strip():
            overrides[key] = str(Path.cwd() / Path(overrides[key]).expanduser())
    defaults = _plain(text, overrides)
    for key in PATHS:
        # One after the other: a path that refers to one before it becomes absolute with it, and is left alone.
        default = defaults.get(key)
        if isinstance(default, str) and default.strip() and not Path(default).is_absolute():
            overrides[key] = str(root / default)
            defaults = _plain(text, overrides)
    if overrides.get("seeds") and "output_folder" not in own:
        # One folder per seed below it, where a single run with that seed would be.
        overrides["output_folder"] = str(Path(overrides["output_folder"]).parent)
    if run_opts.ckpt_interval_steps and "ckpt_interval_minutes" not in run_opts.overridden_args:
        # SpeechBrain takes one or the other, and minutes have their default in the YAML.
        overrides["ckpt_interval_minutes"] = 0
    settings = Settings(hparams_file, run_opts, overrides, Path(root))
    wrong = _wrong_values(settings.values)
    problems += wrong.values()
    if not wrong:
        problems += _contradictions(settings.values, run_opts)
    if look_at_data and not wrong.keys() & {*_PREPARATION, "preparation"}:
        problems += _trouble_with_data(settings)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "\n".join(problems).replace("\n", "\n  ")
        raise ConfigError(f"{count} in {hparams_file} and its command line\n  {lines}")
    return settings


def _trouble_with_adapters(values):
    """Yield what does not go with adapters, or has no meaning without them."""
    from accent_plugin import adapters

    if values["lora_rank"] is None:
        if values["lora_alpha"] is not None or values["lora_dropout"]:
            yield "lora_alpha and lora_dropout are of adapters, but there are none: give lora_rank"
        return
    if values["freeze_wav2vec2"] or not values["freeze_feature_extractor"]:
        yield (
            "lora_rank trains adapters in an encoder whose own weights are all frozen: freeze_wav2vec2 must be False "
            "and freeze_feature_extractor True"
        )
    if values["freeze_layers"] == values["num_layers"]:
        yield f"freeze_layers {values['freeze_layers']} leaves no layer for the adapters of lora_rank"
    if values["method"] != "fine_tuning":
        yield f"method {values['method']} does not train the encoder: lora_rank must be null"
    try:
        adapters.require_peft()
    except AccentPluginError as error:
        yield f"lora_rank: {error}"


def _trouble_with_features(values):
    """Yield why what an encoder makes of a clip cannot be kept."""
    if not values["cache_features"] or values["method"] != "fine_tuning":
        return
    if not values["freeze_wav2vec2"]:
        yield "cache_features keeps what an encoder makes of a clip: it needs freeze_wav2vec2 True"
    if values["pooling"] != "mean" or values["projector_activation"]:
        yield "cache_features keeps means over a clip: pooling must be mean and projector_activation False"
    if values["augment"] or values["crop_seconds"] is not None:
        yield "cache_features keeps whole clips as they are: augment must be False and crop_seconds null"


def _trouble_with_data(settings):
    problems = []
    for one in settings.splits():
        problems += _refusals(one.located(one.values["preparation"]))
    if settings.values["out_of_set"] is not None and not problems:
        problems += _refusals(settings.outsiders())
    return problems


def _refusals(wanted):
    """What `accent_plugin.manifests` has against arguments of a preparation."""
    wanted = dict(wanted)
    del wanted["workers"]
    try:
        if not wanted.pop("skip_prep"):
            manifests.check(**wanted)
        elif wanted["prepared_folder"] is not None:
            manifests.load(wanted["prepared_folder"])
    except AccentPluginError as error:
        return [str(error)]
    return []


def _split(argv):
    """The YAML's path, words of each `--key` of ours, and SpeechBrain's options."""
    options = {field.name: field.default for field in dataclasses.fields(RunOptions)}
    if not argv or argv[0].startswith("--"):
        raise ConfigError("the first argument is a YAML of hyperparameters: train.py hparams/wav2vec2_base.yaml")
    own, others, place = {}, [], 1
    while place < len(argv):
        word = argv[place]
        place += 1
        words = []
        if word.startswith("--") and "=" in word:
            word, value = word.split("=", 1)
            words = [value]
        else:
            while word.startswith("--") and place < len(argv) and not argv[place].startswith("--"):
                words.append(argv[place])
                place += 1
        name = word.removeprefix("--")
        if not word.startswith("--"):
            others.append(word)
        elif name not in options or name == "precision":
            # SpeechBrain's own option does not know "auto".
            own[name] = words
        elif options[name] is False and words and words[0].lower() in ("true", "false"):
            others += [word] * (words[0].lower() == "true") + words[1:]
        else:
            others += [word, *words]
    return argv[0], own, others


def _run_options(hparams_file, words):
    try:
        _, run_opts, rest = RunOptions.from_command_line_args([hparams_file, *words])
    except SystemExit as error:
        # argparse has already said on stderr which option is wrong.
        raise ConfigError("a run option of SpeechBrain has a wrong value, see above") from error
    return run_opts, rest.split()


def _read_yaml(hparams_file):
    try:
        return Path(hparams_file).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the hyperparameters {hparams_file} cannot be read: {error.strerror}") from error


class _PlainLoader(yaml.SafeLoader):
    """Reads values and leaves out what a tag would build."""


_PlainLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _plain(text, overrides):
    """Plain values of the YAML, references resolved and nothing built."""
    try:
        resolved = resolve_references(text, overrides).getvalue()
        values = yaml.load(resolved, Loader=_PlainLoader)
    except Exception as error:
        # ruamel, PyYAML and HyperPyYAML each raise their own.
        raise ConfigError(f"the YAML cannot be read: {error}") from error
    return _values(values)


def _values(mapping):
    # A hyperparameter that is handed on in a group has its own name there, too.
    return {key: _values(value) if key in _GROUPS else _value(key, value) for key, value in mapping.items()}


def _value(key, value):
    """What a text stands for; 1e-5 is a number to people, and a text to YAML 1.1."""
    if isinstance(value, str):
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            return value
        if key in _TEXTS:
            return None if parsed is None and value in ("null", "~", "None") else value
        value = None if parsed == "None" else parsed
    if isinstance(value, str) and key in KEYS:
        try:
            return [int(part) for part in value.split(",")] if key == "seeds" else float(value)
        except ValueError:
            return value
    if key == "seeds" and isinstance(value, int) and not isinstance(value, bool):
        return [value]
    return value


# Folders and names stay as they were typed, though YAML might see a number in them.
_TEXTS = {"name", "wav2vec2_hub", "accent_column", "client_column", "sentence_column", "audio_column", *PATHS}


def _unknown(word, known):
    name = word.removeprefix("--")
    close = difflib.get_close_matches(name, [key for key in known if key in KEYS] + list(_OPTION_NAMES), n=1)
    return f"{word!r} is no hyperparameter or run option" + (f" (did you mean --{close[0]}?)" if close else "")


_OPTION_NAMES = tuple(field.name for field in dataclasses.fields(RunOptions))


def _wrong_values(values):
    """Key -> problem."""
    problems = {}
    for key, check in KEYS.items():
        if key not in values:
            problems[key] = f"{key} is missing"
        elif wanted := check(values[key]):
            problems[key] = f"{key} is {values[key]!r}; it should be {wanted}"
    missing = _CHOICES - (values.get("preparation") or {}).keys()
    if missing:
        problems["preparation"] = f"preparation lacks {', '.join(sorted(missing))}: give each as !ref <its name>"
    return problems


def _contradictions(values, run_opts):
    """Pairs of values that are each right and do not go together, and folders that are not there."""
    from accent_plugin.devices import require_device
    from accent_plugin.encoder import find_source, find_start

    problems = []
    if len(values["accents"]) < 2:
        problems.append(f"accents is {values['accents']}; there is nothing to tell apart")
    if values["n_folds"] in (1, 2):
        problems.append(
            f"n_folds is {values['n_folds']}; give 0 for none, or at least 3: one part tests, one validates"
        )
    if values["fold"] is not None and values["fold"] > values["n_folds"]:
        problems.append(f"fold {values['fold']} was asked for, but n_folds is {values['n_folds']}")
    if values["split"] == "both" and (values["seeds"] or values["skip_prep"] or values["fold"]):
        problems.append("split both compares two runs: seeds, fold and skip_prep do not go with it")
    both = sorted(set(values["accents"]) & set(values["out_of_set"] or ()))
    if both:
        problems.append(f"{', '.join(both)} cannot be in accents and in out_of_set")
    if values["out_of_set_folder"] is not None and values["out_of_set"] is None:
        problems.append("out_of_set_folder is given, but out_of_set does not say which accents to score")
    if values["method"] != "fine_tuning" and (values["bands"] or values["out_of_set"] or values["seeds"]):
        problems.append(f"method {values['method']} has no bands, out_of_set or seeds")
    if values["min_seconds"] >= values["max_seconds"]:
        problems.append(f"min_seconds {values['min_seconds']:g} is not below max_seconds {values['max_seconds']:g}")
    longest = min(values["max_seconds"], values["crop_seconds"] or math.inf)
    if values["batch_seconds"] < longest:
        problems.append(
            f"batch_seconds {values['batch_seconds']:g} holds no clip of {longest:g} s, which max_seconds and "
            "crop_seconds allow"
        )
    if isinstance(values["class_weights"], list) and len(values["class_weights"]) != len(values["accents"]):
        problems.append(f"class_weights has {len(values['class_weights'])} values for {len(values['accents'])} accents")
    if values["balance"] == "sampler" and values["class_weights"] == "balanced":
        problems.append("balance sampler and class_weights balanced would correct the same imbalance twice")
    if values["valid_fraction"] + values["test_fraction"] >= 1:
        problems.append("valid_fraction and test_fraction leave nothing to train on")
    if values["freeze_wav2vec2"] and (values["freeze_layers"] or values["freeze_encoder_steps"]):
        problems.append("freeze_wav2vec2 freezes the whole encoder: freeze_layers and freeze_encoder_steps must be 0")
    if values["freeze_wav2vec2"] and values["gradient_checkpointing"]:
        problems.append("gradient_checkpointing is for the encoder's backward pass, and freeze_wav2vec2 leaves it none")
    if values["num_layers"] is not None and values["freeze_layers"] > values["num_layers"]:
        problems.append(f"freeze_layers {values['freeze_layers']} is more than num_layers {values['num_layers']}")
    dropped = [key for key in ("layerdrop", "encoder_layerdrop") if values["config_overrides"].get(key)]
    if dropped and values["weighted_layers"] is not None:
        problems.append(f"weighted_layers sums what {dropped[0]} leaves out at random: give one of them alone")
    problems += _trouble_with_adapters(values)
    problems += _trouble_with_features(values)
    if values["selection"] == "last" and values["early_stopping"]:
        problems.append("selection last takes the last epoch, whatever it is: early_stopping must be 0")
    if values["whitening_passes"] and not values["freeze_wav2vec2"]:
        problems.append("whitening_passes whitens features that do not move: it needs freeze_wav2vec2 True")
    if values["whitening_passes"] and values["projector_size"] is not None:
        problems.append("whitening_passes needs features that do not move: projector_size must be null")
    if run_opts.ckpt_interval_steps and values["ckpt_interval_minutes"]:
        problems.append("ckpt_interval_steps and ckpt_interval_minutes were both given: leave one out")
    # Of several processes each will have a GPU of its own.
    if not processes.launched():
        try:
            require_device(run_opts.device or infer_device())
        except ConfigError as error:
            problems.append(str(error))
    on_cpu = run_opts.device == "cpu"
    if on_cpu and "fp16" in (values["precision"], values["eval_precision"]):
        problems.append("fp16 does not work on a CPU; choose bf16 or fp32")
    if values["overwrite"] and run_opts.test_only:
        problems.append("overwrite deletes the run that test_only would evaluate: give one of the two")
    if values["skip_prep"] and values["prepared_folder"] is None:
        problems.append("skip_prep is True, but prepared_folder does not say what to take")
    if values["augment"] and not any(
        values[f"augment_{kind}"] for kind in ("speed", "noise_snr", "band", "mask_seconds")
    ):
        problems.append("augment is True, but every augmentation is off")
    # Where a bundle's encoder is taken, wav2vec2_hub is not looked at.
    key, find = ("wav2vec2_hub", find_source) if values["from_bundle"] is None else ("from_bundle", find_start)
    try:
        find(values[key])
    except AccentPluginError as error:
        problems.append(f"{key}: {error}")
    return problems
