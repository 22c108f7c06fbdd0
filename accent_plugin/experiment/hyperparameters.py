"""The table of hyperparameters.

The table is the only place that defines the name, the valid values and the description of each hyperparameter, and
whether changing it makes a different run. The command-line checks, docs/hyperparameters.md, the comments of the YAML,
the comparison of run folders and the values in tests are derived from it. Defaults are in hparams/wav2vec2_base.yaml,
because SpeechBrain, the benchmarks and the copy in a run folder load that file without this package's reader.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable

from accent_plugin.audio.augment import DEFAULT, KINDS
from accent_plugin.audio.changes import CODECS
from accent_plugin.data.prepare import BALANCES, PreparationChoices
from accent_plugin.pooling_names import POOLING_NAMES

# Checks of one value: each function returns a description of the valid values if the value is invalid, otherwise None.


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


def _pooling(value):
    # A program that has added its own poolings has imported the module; a check alone needs no PyTorch.
    module = sys.modules.get("accent_plugin.pooling")
    return _one_of(*(POOLING_NAMES if module is None else module.POOLINGS))(value)


def _text(value):
    return None if isinstance(value, str) and value.strip() else "a string"


def _mapping(value):
    return None if isinstance(value, dict) else "a mapping such as {attention_dropout: 0.0}"


def _range(low):
    def check(value):
        good = isinstance(value, list) and len(value) == 2 and not any(_number(low, above=True)(v) for v in value)
        return None if good and value[0] <= value[1] else f"two numbers [from, to] above {low:g}, the smaller first"

    return check


def _fractions(value):
    good = isinstance(value, list) and len(value) == 2 and not any(_number(0, 0.9)(v) for v in value)
    return None if good and value[0] <= value[1] else "two fractions [from, to] of at most 0.9, the smaller first"


def _probabilities(value):
    kinds = value if isinstance(value, dict) else {DEFAULT: value}
    good = kinds and kinds.keys() <= {DEFAULT, *KINDS} and not any(_SHARE(v) for v in kinds.values())
    return None if good else f"a probability, or a mapping from {DEFAULT}, {', '.join(KINDS)} to probabilities"


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

# Reason why changing a hyperparameter does not make a different run.
_PLACE = "names and locations: a run folder may be moved"
_RUNS = "selects the runs of one command; each run records its own seed and fold"
_MACHINE = "affects the machine's work, not its result"
_FOUND = "selects the source of the data; their fingerprint is compared"
_AFTER = "affects only what follows training"


@dataclasses.dataclass(frozen=True)
class Hyperparameter:
    """One hyperparameter.

    Attributes
    ----------
    name : str
    check : Callable
        Maps a value to a description of the valid values, or to None if the value is valid.
    example : str
        A value other than the default, as typed on the command line.
    text : str
        One-line description. With name and default it fits into the 80 characters of a YAML line.
    free : str
        Why a run may be resumed with another value. If this is empty, another value makes a different run. The default
        is the safe one: a forgotten reason causes an error message, whereas the opposite would silently mix two runs.
    path : bool
        Whether it is a path. Paths are relative to the working directory on the command line, and to the project's root
        in the YAML.
    data : bool
        Whether it decides which clips are used. The fingerprint of the clips would also differ, but comparing the
        value names the hyperparameter and takes place before hours of preparation. With skip_prep, it is not compared.
    was : str
        Its name in version 0.1.0, which is still accepted.
    earlier : object
        The value for YAML files that lack it, such as those in run folders of older versions. Without this value, such
        a YAML is an error.
    """

    name: str
    check: Callable
    example: str
    text: str
    free: str = ""
    path: bool = False
    data: bool = False
    was: str = ""
    earlier: object = ...

    @property
    def is_text(self):
        """Whether any text is valid. The text then stays as typed, because YAML might read it as a number."""
        return self.check("any text") is None

    @property
    def values(self):
        """Describe the valid values."""
        return self.check(object())

    def problem(self, value):
        """Describe what is wrong with a value; None if it is valid."""
        wanted = self.check(value)
        return wanted and f"{self.name} is {value!r}; it should be {wanted}"


_H = Hyperparameter
_path = functools.partial(Hyperparameter, free=_PLACE, path=True)
_data = functools.partial(Hyperparameter, data=True)
_new = functools.partial(Hyperparameter, earlier=None)

_seed_list = _list_of(_whole(0), "a list of different whole numbers such as 1,2,3")
_split_list = _list_of(_text, "a list of splits such as [train, validation]")
_accent_list = _list_of(_text, "a list of accents such as [scotland, ireland]")
_speed_list = _list_of(_number(0, above=True), "a list of different speed factors such as [0.9, 1.0, 1.1]")
_codec_list = _list_of(_one_of(*CODECS), f"a list of {', '.join(CODECS)}")
_attention = _one_of("sdpa", "eager", "flash_attention_2")

# Heading in docs/hyperparameters.md -> its hyperparameters, in the order of the YAML.
GROUPS = {
    "Names": (
        _H("name", _text, "1e5", "names the results folder", free=_PLACE),
        _H("seed", _whole(0), "3", "seed of weights, batches, crops, dropout, augmentation"),
        _H("seeds", _or_nothing(_seed_list), "1,2", "1,2,3: one run per seed, and a summary", free=_RUNS),
    ),
    "Folders": (
        _path("data_folder", _text, "/x/data", "DatasetDict on disk; never changed"),
        _path(
            "prepared_folder", _or_nothing(_text), "/x/prepared", "prepared clips; null: data/prepared/<fingerprint>"
        ),
        _path("output_folder", _text, "/x/out", "folder of this run"),
        _path("save_folder", _text, "/x/save", "checkpoints"),
        _path("train_log", _text, "/x/log.txt", "one line per epoch"),
        _H("skip_prep", _switch, "True", "True: use prepared_folder as it is", free=_MACHINE),
        _H("overwrite", _switch, "True", "True: delete the run in output_folder and start again", free=_MACHINE),
    ),
    "Data": (
        _H(
            "accents",
            _list_of(_text, "a list of different accents"),
            "[wales, us]",
            "labels, in the order of the output",
        ),
        _data("data_seed", _whole(0), "3", "seed of splits, caps and balancing"),
        _data(
            "split",
            _one_of("speaker", "random", "both"),
            "random",
            "random: speakers leak into test; both: compare the two",
        ),
        _H("n_folds", _whole(0), "5", "5: five-fold cross-validation over all splits; 0: none"),
        _H("fold", _or_nothing(_whole(1)), "2", "run only this fold, counted from 1", free=_RUNS),
        _data("source_splits", _or_nothing(_split_list), "[train]", "splits of data_folder to use; null: all"),
        _data("disjoint_sentences", _switch, "False", "False: splits may share sentences"),
        _H("balance", _one_of(*BALANCES), "none", "how to balance the accents in training"),
        _data(
            "max_clips_per_client", _or_nothing(_whole(1)), "null", "maximum number of clips per speaker; null: none"
        ),
        _data("min_seconds", _number(0), "2", "shorter clips are dropped"),
        _data("max_seconds", _number(0, above=True), "9.5", "longer clips are dropped"),
        _H(
            *("max_unreadable_fraction", _SHARE, "0", "stop if more files cannot be read"),
            free=_FOUND,
            was="max_unreadable_share",
        ),
        _data(
            "valid_fraction", _number(0, 0.5, above=True), "0.2", "fraction of speakers, if the data lack this split"
        ),
        _data("test_fraction", _number(0, 0.5, above=True), "0.2", "fraction of speakers, if the data lack this split"),
        _H("accent_column", _or_nothing(_text), "7", "column of accents; null: found by its name", free=_FOUND),
        _H("client_column", _or_nothing(_text), "who", "column of speakers", free=_FOUND),
        _H("sentence_column", _or_nothing(_text), "text", "column of sentences", free=_FOUND),
        _H("audio_column", _or_nothing(_text), "sound", "column of audio: Audio, or {bytes, path}", free=_FOUND),
        _H("prepare_workers", _or_nothing(_whole(1)), "1", "processes; null: one per core", free=_MACHINE),
        _H(
            "method",
            _one_of("fine_tuning", "logistic_regression"),
            "logistic_regression",
            "logistic_regression: a baseline on frozen features",
        ),
    ),
    "Evaluation": (
        _H(
            "out_of_set",
            _or_nothing(_accent_list),
            "[scotland]",
            "[scotland]: accents that the model should reject",
            free=_AFTER,
        ),
        _path("out_of_set_folder", _or_nothing(_text), "/x/others", "a DatasetDict with them; null: data_folder"),
        _H(
            *("test_degradations", _switch, "True", "True: also test in noise, rooms, codecs, ..."),
            free=_AFTER,
            was="bands",
        ),
        _H("test_speeds", _speed_list, "[0.9, 1.0]", "average log-probabilities over these speeds", free=_AFTER),
    ),
    "Encoder": (
        _H("wav2vec2_hub", _text, "facebook/hubert-base-ls960", "encoder: name on the Hub, or folder"),
        _path("wav2vec2_folder", _or_nothing(_text), "/x/cache", "folder for downloads; null: Hugging Face's cache"),
        _H(
            *("from_bundle", _or_nothing(_text), "/x/bundle", "start from the weights of a bundle or HF classifier"),
            path=True,
        ),
        _H("freeze_wav2vec2", _switch, "True", "True: train only the head"),
        _H("cache_features", _switch, "True", "True: run a frozen encoder once per clip", free=_MACHINE),
        _path("features_folder", _text, "/x/features", "where cache_features keeps features"),
        _H("freeze_feature_extractor", _switch, "False", "True: do not train the CNN"),
        _H("freeze_layers", _whole(0), "2", "number of lowest transformer layers to freeze"),
        _H("freeze_encoder_steps", _whole(0), "10", "number of first steps with a frozen encoder"),
        _H("num_layers", _or_nothing(_whole(1)), "2", "number of lowest layers to keep; null: all"),
        _H("weighted_layers", _or_nothing(_layers), "all", "learned weighted sum of these hidden states"),
        _H(
            *("normalize_layers", _switch, "True", "layer norm of each hidden state before the sum"),
            was="standardise_layers",
        ),
        _H("attn_implementation", _or_nothing(_attention), "eager", "null: the fastest on this machine", free=_MACHINE),
        _H("gradient_checkpointing", _switch, "True", "True: less memory, slower steps", free=_MACHINE),
        _H(
            "config_overrides", _mapping, "{hidden_dropout: 0.0}", "changes to the encoder's Hugging Face configuration"
        ),
        _H("lora_rank", _or_nothing(_whole(1)), "2", "rank of adapters in a frozen encoder; null: none"),
        _H(
            "lora_alpha",
            _or_nothing(_number(0, above=True)),
            "8",
            "scale of the adapters, times rank; null: twice the rank",
        ),
        _H("lora_dropout", _number(0, 0.95), "0.1", "dropout of the adapters' input"),
    ),
    "Head": (
        _H("projector_size", _or_nothing(_whole(1)), "256", "width of a layer before pooling; null: none; HF: 256"),
        _H("projector_activation", _switch, "True", "True: GELU after the projector, unlike HF"),
        _H("pooling", _pooling, "attentive", "pooling of frames over time"),
        _H("whitening_passes", _whole(0), "2", "passes over the training clips to fit whitening; 0: off"),
        _H("whitening_shrinkage", _SHARE, "0.5", "covariance shrinkage towards a scaled identity"),
        _H("dropout", _number(0, 0.95), "0", "dropout of the head's input"),
    ),
    "Training": (
        _H("number_of_epochs", _whole(1), "2", "maximum; early_stopping may stop sooner"),
        _H("batch_seconds", _number(0, above=True), "30", "seconds per batch, including padding; fits 16 GB"),
        _H("crop_seconds", _or_nothing(_number(0.1)), "4", "train on random crops of this length; null: no crops"),
        _H("lr_encoder", _number(0, 1), "1e-4", "peak learning rate of the encoder"),
        _H("lr_head", _number(0, 1, above=True), "1e-3", "peak learning rate of the head and of adapters"),
        _H("weight_decay", _number(0), "0", "applies to matrices, not to biases and norms"),
        _H("warmup_fraction", _SHARE, "0", "fraction of training used for warm-up", was="warmup"),
        _H(
            "lr_schedule",
            _one_of("linear", "cosine", "none"),
            "none",
            "decay of the learning rates after warm-up",
            was="decay",
        ),
        _H("max_grad_norm", _number(0, above=True), "2.5", "gradient clipping: maximum norm over all parameters"),
        _H("grad_accumulation_factor", _whole(1), "2", "batches per optimizer step"),
        _H("label_smoothing", _number(0, 0.9), "0.1", "probability spread evenly over all classes"),
        _H("class_weights", _or_nothing(_weights), "[1, 2, 3]", "loss weights; balanced: inverse to the clip counts"),
        _H("precision", _one_of("auto", *_PRECISIONS), "bf16", "auto: the fastest on this machine; fp16 needs a GPU"),
        _H("eval_precision", _one_of(*_PRECISIONS), "bf16", "precision of validation and test"),
        _H("selection", _one_of("macro_f1", "loss", "last"), "loss", "epoch to keep: best on validation, or the last"),
        _H("early_stopping", _whole(0), "0", "epochs without improvement; 0: never stop early"),
        _H("ckpt_interval_minutes", _whole(0), "0", "time between checkpoints in an epoch; 0: none", free=_MACHINE),
        _H("num_workers", _whole(0), "0", "processes that read audio", free=_MACHINE),
        _H("tensorboard", _switch, "True", "also log to <output_folder>/tensorboard", free=_MACHINE),
    ),
    "Augmentation": (
        _H("augment", _switch, "True", "True: change training waveforms at random"),
        _H("augment_probability", _probabilities, "1", "per kind, or {speed: 0.8, default: 0.2}"),
        _H("augment_speed", _or_nothing(_range(0)), "null", "range of speed factors; null: off"),
        _H("augment_noise_snr", _or_nothing(_range(-100)), "[0, 5]", "range of SNRs in dB; null: off"),
        _H("augment_band", _or_nothing(_range(0)), "[1000, 2000]", "range of the upper cut-off in Hz; null: off"),
        _H(
            "augment_mask_seconds",
            _or_nothing(_number(0, above=True)),
            "0.1",
            "maximum length of a silenced part; null: off",
        ),
        _new("augment_babble_snr", _or_nothing(_range(-100)), "[0, 5]", "range of SNRs of other speakers in dB"),
        _new("augment_reverberation", _or_nothing(_range(0)), "[0.2, 0.3]", "range of reverberation times in seconds"),
        _new("augment_codecs", _or_nothing(_codec_list), "[mp3, gsm]", f"any of {', '.join(CODECS)}"),
        _new("augment_gain", _or_nothing(_range(-100)), "[-9, 3]", "range of changes of level in dB"),
        _new("augment_clipping", _or_nothing(_fractions), "[0, 0.1]", "range of the fraction of clipped samples"),
        _new("augment_packet_loss", _or_nothing(_fractions), "[0, 0.2]", "range of the fraction of packets lost"),
        _new("augment_formants", _or_nothing(_range(0)), "[0.9, 1.1]", "range of McAdams coefficients"),
        _new("augment_copies", _or_nothing(_whole(1)), "5", "copies per clip, augmented or cropped; null: unlimited"),
    ),
}

# Name -> hyperparameter, in the order of the YAML.
TABLE = {one.name: one for group in GROUPS.values() for one in group}

# Name in version 0.1.0 -> present name.
RENAMED = {one.was: one.name for one in TABLE.values() if one.was}

# Fields of PreparationChoices, as in the YAML's mapping `preparation`.
CHOICES = {field.name for field in dataclasses.fields(PreparationChoices)}


def wrong_values(values):
    """Check the values of a YAML; return a dict, name -> problem."""
    problems = {}
    for key, hyperparameter in TABLE.items():
        if key not in values:
            problems[key] = f"{key} is missing"
        elif problem := hyperparameter.problem(values[key]):
            problems[key] = problem
    missing = CHOICES - (values.get("preparation") or {}).keys()
    if missing:
        problems["preparation"] = f"preparation lacks {', '.join(sorted(missing))}: give each as !ref <its name>"
    return problems
