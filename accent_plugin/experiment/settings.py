"""Check all hyperparameters before anything is built or PyTorch is imported, and report all problems at once.

Only plain values are checked. They are read from the text of the YAML with its references resolved, without building
objects or writing files. A YAML may be an overlay: `base: wav2vec2_base.yaml` and the hyperparameters that differ.

Two checks take seconds of imports, and wait until all else is right: whether the content of the data fits, which takes
the library `datasets`, and then whether the device can be used, which takes PyTorch.
"""

import contextlib
import dataclasses
import difflib
import functools
import logging
import re
from pathlib import Path
from typing import Any

import yaml
from hyperpyyaml import resolve_references

from accent_plugin import files
from accent_plugin.data import dataset_dict
from accent_plugin.data.manifests import load_prepared
from accent_plugin.data.prepare import check_preparation, default_prepared_folder
from accent_plugin.errors import DASHES, AccentPluginError, ConfigError, misspelt_option
from accent_plugin.experiment import run_options
from accent_plugin.experiment.cross_checks import contradictions, unmet_requirements
from accent_plugin.experiment.hyperparameters import CHOICES, RENAMED, TABLE, wrong_values

logger = logging.getLogger(__name__)

# Groups of hyperparameters in the YAML, each a mapping.
_GROUPS = ("preparation", "evaluation")

# Hyperparameters that are passed to the preparation: all but two have the name of the field.
_PREPARATION = {{"seed": "data_seed", "max_unreadable_share": "max_unreadable_fraction"}.get(f, f) for f in CHOICES}
_PREPARATION |= {"skip_prep", "prepared_folder", "data_folder"}

_SCIENTIFIC = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)e[-+]?\d+", re.IGNORECASE)

# SpeechBrain's run options with a default in the YAML. SpeechBrain's own precision does not support "auto".
_SHARED = (TABLE.keys() & set(run_options.NAMES)) - {"precision"}

_PATHS = tuple(one.name for one in TABLE.values() if one.path)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A checked configuration.

    Attributes
    ----------
    hparams_file : str
        A complete YAML; for an overlay, its base.
    run_opts : accent_plugin.experiment.run_options.RunOptions
    overrides : dict
        For `load_hyperpyyaml`: the changes of an overlay and the command line, and all paths, made absolute.
    root : Path
        Default paths are relative to it.
    """

    hparams_file: str
    run_opts: Any
    overrides: dict
    root: Path

    @functools.cached_property
    def values(self):
        """All plain values of the YAML after the overrides, under their present names."""
        values = _plain(_read_yaml(self.hparams_file), self.overrides)
        return values | {key: getattr(self.run_opts, key) for key in _SHARED & self.run_opts.overridden_args}

    def with_values(self, **changes):
        """Return a copy with some values changed, and the values that refer to them."""
        text = _read_yaml(self.hparams_file)
        return dataclasses.replace(self, overrides={**self.overrides, **_as_spelled(text, changes)})

    def splits(self):
        """Return one configuration for each kind of split; two if `split` is "both"."""
        if self.values["split"] != "both":
            return [self]
        return [self.with_values(split=kind, **self._below(kind)) for kind in ("speaker", "random")]

    def runs(self):
        """Yield (settings, fold) for every split, seed and fold; the fold is None without folds."""
        for split in self.splits():
            output = Path(split.values["output_folder"])
            for seed in split.values["seeds"] or [None]:
                one = split if seed is None else split.with_values(seed=seed, output_folder=str(output / str(seed)))
                values = one.values
                if not values["n_folds"]:
                    yield one, None
                    continue
                for fold in [values["fold"]] if values["fold"] else range(1, values["n_folds"] + 1):
                    yield one.with_values(output_folder=str(Path(values["output_folder"]) / f"fold_{fold}")), fold

    def _below(self, name):
        """Folders of one of several runs."""
        folders = {"output_folder": str(Path(self.values["output_folder"]) / name)}
        if self.values["prepared_folder"] is not None:
            folders["prepared_folder"] = str(Path(self.values["prepared_folder"]) / name)
        return folders

    def located(self, preparation):
        """Return the arguments of the recipe's preparation, with the default folder for them if none was given."""
        choices = {field: value for field, value in preparation.items() if field in CHOICES}
        prepared_folder = preparation["prepared_folder"]
        if prepared_folder is None and not preparation["skip_prep"]:
            prepared_folder = self.root / "data" / "prepared"
            # Missing data are reported when they are read.
            with contextlib.suppress(AccentPluginError):
                prepared_folder = default_prepared_folder(preparation["data_folder"], prepared_folder, **choices)
        return preparation | {"prepared_folder": prepared_folder}

    def out_of_set(self):
        """Return the arguments of the preparation of accents outside the classes; None if `out_of_set` is not used."""
        if self.values["out_of_set"] is None:
            return None
        folder = self.values["out_of_set_folder"] or self.values["data_folder"]
        changes = {"accents": self.values["out_of_set"], "split": "all", "balance": "none", "n_folds": 0}
        folders = {"data_folder": folder, "prepared_folder": None, "skip_prep": False}
        return self.located(self.values["preparation"] | changes | folders)


def read_settings(argv, root, look_at_data=True):
    """Read a command line and the YAML it names, and check all of it.

    Arguments
    ---------
    argv : list of str
        The path of a YAML, then `--key value` for hyperparameters and SpeechBrain's run options.
    root : Path
        Default paths are relative to it.
    look_at_data : bool
        Also check the configuration against the data, such as whether they contain the accents. Nothing is decoded.
        If anything else is wrong, only their folders are checked, because reading them takes seconds.

    Returns
    -------
    Settings

    Raises
    ------
    ConfigError
        With all problems, one per line.
    """
    given_file, own, others, problems = _split(argv)
    hparams_file, changed = read_overlay(given_file)
    text = _read_yaml(hparams_file)
    references = _references(text)
    known = dict.fromkeys(references)
    added = {one.name: one.earlier for one in TABLE.values() if one.name not in known and one.earlier is not ...}
    known |= added
    run_opts = run_options.read_run_options(hparams_file, others)
    _warn_of_old_names(f"--{key}" for key in own)
    _warn_of_old_names(re.findall(r"^(\w+):", text, re.M))
    overrides = {}
    for typed, words in own.items():
        key = RENAMED.get(typed, typed)
        if key not in known or key not in TABLE:
            problems.append(_unknown(f"--{typed}"))
        elif key in added:
            problems.append(f"{hparams_file} does not use {key}: it was written for an older version")
        elif not words:
            problems.append(f"--{typed} was given without a value")
        elif typed != key and key in own:
            problems.append(f"--{typed} is now called --{key}, and both were given: leave one out")
        else:
            overrides[key] = _value(key, " ".join(words))
    # HyperPyYAML cannot put a mapping in the place of a plain value.
    wrong = {key: problem for key, value in (changed | overrides).items() if (problem := TABLE[key].problem(value))}
    changed, overrides = ({key: values[key] for key in values if key not in wrong} for values in (changed, overrides))
    for key in _PATHS:
        # An empty path is not a folder; do not resolve it to the working directory.
        if isinstance(overrides.get(key), str) and overrides[key].strip():
            overrides[key] = str(Path.cwd() / Path(overrides[key]).expanduser())
    overrides = _as_spelled(text, added | changed | overrides)
    below = _paths_below_others(references)
    for keys in ([key for key in _PATHS if key not in below], below):
        # A path that refers to another one becomes absolute with it and needs no change.
        defaults = _plain(text, overrides)
        for key in keys:
            default = defaults.get(key)
            if isinstance(default, str) and default.strip() and not Path(default).is_absolute():
                overrides[key] = str(root / default)
    if overrides.get("seeds") and "output_folder" not in own:
        # Each seed gets the same folder below it as in a single run.
        overrides["output_folder"] = str(Path(overrides["output_folder"]).parent)
    if run_opts.ckpt_interval_steps and "ckpt_interval_minutes" not in run_opts.overridden_args:
        # SpeechBrain accepts only one of the two, and the YAML has a default for minutes.
        overrides["ckpt_interval_minutes"] = 0
    settings = Settings(hparams_file, run_opts, overrides, Path(root))
    wrong = wrong_values(settings.values) | wrong
    problems += wrong.values()
    if not wrong:
        problems += contradictions(settings.values, run_opts)
    if look_at_data and not wrong.keys() & {*_PREPARATION, "preparation"}:
        problems += _data_problems(settings, read=not problems)
    problems = problems or unmet_requirements(settings.values, run_opts)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "\n".join(problems).replace("\n", "\n  ")
        raise ConfigError(f"{count} in {given_file} and its command line\n  {lines}")
    return settings


def _data_problems(settings, read):
    """Return the problems of the data; unless they are to be read, which takes seconds, only those of their folders."""
    problems = []
    for one in settings.splits():
        problems += _preparation_problems(one.located(one.values["preparation"]), read)
    if settings.values["out_of_set"] is not None and not problems:
        problems += _preparation_problems(settings.out_of_set(), read)
    return problems


def _preparation_problems(wanted, read):
    """Return the problems that `accent_plugin.data.prepare` finds in arguments of a preparation."""
    wanted = dict(wanted)
    del wanted["workers"]
    try:
        if wanted.pop("skip_prep"):
            if wanted["prepared_folder"] is not None:
                load_prepared(wanted["prepared_folder"])
        elif read:
            check_preparation(**wanted)
        else:
            dataset_dict.fingerprint(Path(wanted["data_folder"]))
    except AccentPluginError as error:
        return [str(error)]
    return []


def _split(argv):
    """Split a command line into the YAML's path, this recipe's options, SpeechBrain's options and problems."""
    if not argv or argv[0].startswith(tuple(DASHES)):
        raise ConfigError("the first argument is a YAML of hyperparameters: train.py hparams/wav2vec2_base.yaml")
    names = {*TABLE, *RENAMED, *run_options.NAMES}
    own, others, problems, place, option = {}, [], [], 1, argv[0]
    while place < len(argv):
        word = argv[place]
        place += 1
        if not word.startswith("--"):
            problems.append(_stray(word, names, option))
            # Its value is no problem of its own.
            place += _is_dashed(word) and "=" not in word and place < len(argv) and not _is_dashed(argv[place])
            continue
        option, equals, value = word.partition("=")
        words, name = [value] if equals else [], option.removeprefix("--")
        while not equals and place < len(argv) and _continues(argv[place], words, names, name in run_options.LISTS):
            words.append(argv[place])
            place += 1
        if name not in run_options.NAMES or name == "precision":
            # SpeechBrain's own option does not support "auto".
            own[name] = words
        elif getattr(run_options.RunOptions(), name) is not False:
            others += [option, *words]
        elif not words or words[0].lower() in ("true", "false"):
            others += [option] * (not words or words[0].lower() == "true")
        else:
            problems.append(f"{option} is {words[0]!r}; it should be True or False")
    return argv[0], own, others, problems


def _continues(word, words, names, several):
    """Whether a word is the value of an option, or the next word of a value that opens a bracket."""
    if words and words[0].startswith(("[", "{")):
        text = " ".join(words)
        return not word.startswith("--") and sum(map(text.count, "[{")) > sum(map(text.count, "]}"))
    return (several or not words) and not _is_dashed(word) and misspelt_option(word, names) is None


def _is_dashed(word):
    """Whether a word begins like an option, unlike a negative number."""
    return word.startswith(tuple(DASHES)) and word.lstrip(DASHES)[:1].isalpha()


def _stray(word, names, option):
    """Describe a word that is neither an option nor a value."""
    if problem := misspelt_option(word, names):
        return problem
    if _is_dashed(word):
        return _unknown(word)
    return f"{word!r} is no hyperparameter or run option: a value is one word, so quote the value of {option}"


def _read_yaml(hparams_file):
    try:
        content = Path(hparams_file).read_bytes()
        if what := files.describe_content(content[: files.BEGINNING]):
            raise ConfigError(f"{hparams_file} is {what}")
        return content.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"the hyperparameters {hparams_file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{hparams_file} is not a YAML of hyperparameters: {error}") from None


def read_overlay(hparams_file):
    """Follow `base:` from an overlay to a complete YAML; return its path, and the values that the overlays change.

    An unreadable file, or an overlay with anything but hyperparameters, is a ConfigError.
    """
    changed, seen = {}, set()
    while True:
        text = _read_yaml(hparams_file)
        if not re.search("^base:", text, re.M):
            return str(hparams_file), changed
        try:
            values = yaml.load(text, Loader=_OverlayLoader)
            base = Path(hparams_file).parent / values.pop("base")
        except (yaml.YAMLError, TypeError) as error:
            raise ConfigError(f"the overlay {hparams_file} cannot be read: {error}") from error
        if base in seen:
            raise ConfigError(f"{hparams_file}: its base {base} refers back to it; give a complete YAML as base")
        seen.add(base)
        _warn_of_old_names(values)
        values = _values(_renamed({key: value for key, value in values.items() if value is not _PLACEHOLDER}))
        if unknown := sorted(values.keys() - TABLE.keys()):
            raise ConfigError(
                f"{hparams_file} has a base: it can contain only hyperparameters, not {', '.join(unknown)}"
            )
        changed, hparams_file = values | changed, base


class _OverlayLoader(yaml.SafeLoader):
    """Reads plain values only: tags belong in the base."""


# For programs that load an overlay without its base, as SpeechBrain's tests do.
_PLACEHOLDER = object()
_OverlayLoader.add_constructor("!PLACEHOLDER", lambda loader, node: _PLACEHOLDER)


class _PlainLoader(yaml.SafeLoader):
    """Reads plain values and skips tagged objects."""


_PlainLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


# (text of a YAML, overrides) -> the text with its references resolved, which takes HyperPyYAML most of the time.
_resolved: dict[tuple[str, str], str] = {}


def _plain(text, overrides):
    """Return the plain values of the YAML, with references resolved and nothing built."""
    key = text, repr(overrides)
    try:
        if key not in _resolved:
            _resolved[key] = resolve_references(text, overrides).getvalue()
        values = yaml.load(_resolved[key], Loader=_PlainLoader)
    except Exception as error:
        # ruamel, PyYAML and HyperPyYAML raise different errors.
        raise ConfigError(f"the YAML cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError("the YAML cannot be read: it holds no names of hyperparameters")
    return _values(_renamed(values))


def _references(text):
    """Map each hyperparameter or object of the YAML, under its present name, to the names in its value."""
    try:
        node = yaml.compose(text, Loader=_PlainLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"the YAML cannot be read: {error}") from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError("the YAML cannot be read: it holds no names of hyperparameters")
    found = {str(key.value): re.findall(r"<(\w+)", str(value.value)) for key, value in node.value}
    return _renamed({key: [RENAMED.get(name, name) for name in names] for key, names in found.items()})


def _paths_below_others(references):
    """Return the paths whose value refers to another path, directly or not."""
    reaching = set(_PATHS)
    while more := {name for name, names in references.items() if not reaching.isdisjoint(names)} - reaching:
        reaching |= more
    return [key for key in _PATHS if not reaching.isdisjoint(references.get(key, ()))]


def _renamed(values):
    return {RENAMED.get(key, key): value for key, value in values.items()}


def _as_spelled(text, overrides):
    """Return overrides under the names in a YAML, which may be those of version 0.1.0."""
    old = {RENAMED[key]: key for key in re.findall(r"^(\w+):", text, re.M) if key in RENAMED}
    return {old.get(key, key): value for key, value in overrides.items()}


def _warn_of_old_names(words):
    for word in words:
        name = word.removeprefix("--")
        if name in RENAMED:
            _warn_once(word, word.replace(name, RENAMED[name]))


@functools.cache
def _warn_once(word, new):
    logger.warning("%s is now called %s; the old name will be removed in the next release", word, new)


def _values(mapping):
    # Inside a group, a hyperparameter has the same name.
    return {key: _values(value) if key in _GROUPS else _value(key, value) for key, value in mapping.items()}


def _value(key, value):
    """Parse a text value; YAML 1.1 reads 1e-5 as text."""
    if isinstance(value, str):
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            return value
        if key in TABLE and TABLE[key].is_text:
            return None if parsed is None and value in ("null", "~", "None") else value
        value = None if parsed == "None" else parsed
    if isinstance(value, list | dict) and key in TABLE and TABLE[key].problem(["text"]):
        return _numbers(value)
    if isinstance(value, str) and (key in TABLE or key in RENAMED):
        try:
            return [int(part) for part in value.split(",")] if key == "seeds" else float(value)
        except ValueError:
            return value
    if key == "seeds" and isinstance(value, int) and not isinstance(value, bool):
        return [value]
    return value


def _numbers(value):
    """Convert scientific notation in a list or a mapping to numbers."""
    if isinstance(value, dict):
        return {key: _numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


def _unknown(word):
    close = difflib.get_close_matches(word.lstrip(DASHES), [*TABLE, *run_options.NAMES], n=1)
    return f"{word!r} is no hyperparameter or run option" + (f" (did you mean --{close[0]}?)" if close else "")
