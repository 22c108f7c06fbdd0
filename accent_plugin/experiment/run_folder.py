"""A run folder belongs to one configuration, and to one process at a time.

Beside what a run makes stands ``run.json``: the hyperparameters that decide what is trained, and a fingerprint of the
data. Another configuration is refused with a list of differences, as its checkpoints would be resumed, mixed or
evaluated as what they are not. A folder in which nothing has been trained yet belongs to nobody.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from pathlib import Path

from accent_plugin import files
from accent_plugin.bundle import config as bundle_config
from accent_plugin.errors import ConfigError
from accent_plugin.experiment.hyperparameters import RENAMED, TABLE

logger = logging.getLogger(__name__)


IDENTITY_FILE = "run.json"


LOCK_FILE = ".run.lock"


# Not the lock's file: on Windows nobody else can read that.
HOLDER_FILE = ".run.holder.json"

_NOT_COUNTED = {one.name for one in TABLE.values() if one.free}


_OF_DATA = {one.name for one in TABLE.values() if one.data}


# Hyperparameters that count in some configurations only, see `identity`.
_SOMETIMES = {*_OF_DATA, "number_of_epochs", "wav2vec2_hub"}


# What test_only may change: how much fits into memory, and how exactly is reckoned.
_FREE_IN_TESTS = {"eval_precision", "batch_seconds", "batches_per_step"}


_WEIGHTS = (".safetensors", ".bin", ".ckpt")


_WAYS_OUT = "choose another --output_folder, or delete that run and begin anew with --overwrite True"


_WAYS_OUT_OF_A_TEST = "give what it was trained with, or the --output_folder of the run that you mean"


# What was trained, and what of it makes a folder worth protecting.
_CHECKPOINTS = "CKPT*/CKPT.yaml"


_TRAINED = ("history.json", "trials.json")


# Whole checkpoints, those that were set aside, and what a killed process has left of others.
_CHECKPOINT_FOLDERS = ("CKPT*", "damaged+CKPT*", ".CKPT*", ".writing*", ".deleted+*")


# First words of the hyperparams.yaml that SpeechBrain writes into a run folder.
_GENERATED = "# Generated "


# -------------------------------------------------------------------------------------------------------- what is it


def run_identity(values, fold=None, processes=1):
    """Choose from hyperparameters those that decide what is trained.

    Arguments
    ---------
    values : dict
        Every plain value of the YAML, as `accent_plugin.experiment.settings.Settings.values` gives them.
    fold : int
        Which one is trained, counted from 1; None for none.
    processes : int
        That share the work. A run may go on with fewer of them and as many more batches per step in each.

    Returns
    -------
    dict
        Plain values of JSON.
    """
    # Objects of the YAML are built from its values; other values that somebody added to it may be what changed one.
    chosen = {
        key: value
        for key, value in values.items()
        if key not in _NOT_COUNTED and (key in TABLE or isinstance(value, bool | int | float | str))
    }
    chosen["batches_per_step"] = chosen.pop("grad_accumulation_factor") * processes
    chosen["fold"] = fold
    if values["skip_prep"]:
        chosen = {key: value for key, value in chosen.items() if key not in _OF_DATA}
    if not values["warmup_fraction"] and values["lr_schedule"] == "none":
        # Learning rates that do not depend on the end: such a run may be prolonged.
        del chosen["number_of_epochs"]
    if values["from_bundle"] is None:
        chosen["wav2vec2_hub"] = _source(values["wav2vec2_hub"])
    else:
        # The encoder is the bundle's.
        del chosen["wav2vec2_hub"]
        chosen["from_bundle"] = _source(values["from_bundle"])
    return json.loads(json.dumps(chosen, default=str))


def _source(source):
    """A name on the Hub as it is; a folder by its own name and what it holds, as it may be moved."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return source
    folder = folder.resolve()
    config = folder / bundle_config.CONFIG_FILE
    digest = _digest([config.read_bytes()]) if config.is_file() else "missing"
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in _WEIGHTS)
    return f"{folder.name} ({config.name} {digest}, {size:,} bytes of weights)"


def data_fingerprint(paths):
    """Digest of manifests: of clips, their accents and their splits, wherever they are and whenever they were made.

    Arguments
    ---------
    paths : dict
        Split -> CSV, as `accent_plugin.data.manifests.Prepared.paths` gives it.

    Returns
    -------
    str
    """
    return _digest(part for split, path in sorted(paths.items()) for part in (split.encode(), Path(path).read_bytes()))


def _digest(parts):
    """Twenty hexadecimal digits that stand for pieces of bytes."""
    digest = hashlib.blake2b(digest_size=10)
    for part in parts:
        digest.update(b"%d:" % len(part) + part)
    return digest.hexdigest()


def differences(made, now):
    """One line for each hyperparameter that is another now than in the folder.

    One that the folder does not name was not known when it was made: it counts as it is now, or each new hyperparameter
    would end every run that was begun before. One that is not known now asks for something that nobody would do.
    """
    lines = []
    for key in sorted(made):
        if key in now and made[key] != now[key]:
            lines.append(f"{key}: {_shown(made[key])} in the folder, {_shown(now[key])} now")
        elif key not in now and key not in _SOMETIMES:
            lines.append(f"{key}: {_shown(made[key])} in the folder, unknown to this version and YAML")
    return lines


def _shown(value):
    """As one would type it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return "null" if value is None else str(value)


# ------------------------------------------------------------------------------------------------------- whose is it


def begin(folder, identity, data, *, save_folder, test_only=False):
    """Refuse a folder that belongs to another configuration; otherwise write down that it belongs to this one.

    Arguments
    ---------
    folder : str or Path
        The run's, which exists.
    identity : dict
        As `identity` gives it.
    data : str
        As `fingerprint` gives it; None while the data are not known, when nothing is written yet.
    save_folder : str or Path
        Where the checkpoints are.
    test_only : bool
        Whether nothing is trained: then nothing is written, and what only changes how tests are reckoned may differ.

    Raises
    ------
    ConfigError
        With one line for each difference, and the ways out.
    """
    folder = Path(folder)
    ways_out = _WAYS_OUT_OF_A_TEST if test_only else _WAYS_OUT
    made = _read(folder / IDENTITY_FILE, ways_out)
    if made is None and any(Path(save_folder).glob(_CHECKPOINTS)):
        unknown = f"{save_folder} holds checkpoints, but {folder} no {IDENTITY_FILE} that says how they were trained"
        if not test_only:
            raise ConfigError(f"{unknown}\n{ways_out}")
        logger.warning("%s: taking them for a run with these hyperparameters", unknown)
    if made is not None and _holds_work(folder, Path(save_folder)):
        free = _FREE_IN_TESTS if test_only else ()
        lines = differences({key: value for key, value in made["values"].items() if key not in free}, identity)
        if data is not None and data != made["data"]:
            lines.append("the data: other clips or another split than it was trained on")
        if lines:
            raise ConfigError("\n  ".join([f"{folder} belongs to another configuration:", *lines]) + f"\n{ways_out}")
        unsaid = sorted(identity.keys() - made["values"].keys() - _SOMETIMES)
        if unsaid:
            logger.warning("%s does not name %s: taken as now", folder / IDENTITY_FILE, ", ".join(unsaid))
        identity = made["values"] | identity
    wanted = {"data": data, "values": identity}
    if data is not None and not test_only and made != wanted:
        with files.atomic_write(folder / IDENTITY_FILE) as file:
            json.dump(wanted, file, indent=1, sort_keys=True)
            file.write("\n")


def begun(folder):
    """The identity of the run in a folder, as `identity` gives it; None where there is none, or it cannot be read."""
    try:
        made = _read(Path(folder) / IDENTITY_FILE, "")
    except (ConfigError, OSError):
        # `begin` says so.
        return None
    return None if made is None else made["values"]


def _read(path, ways_out):
    """The content of run.json; None where there is none."""
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise ConfigError(f"{path} is damaged ({error})\n{ways_out}") from None
    if not isinstance(made, dict) or not isinstance(made.get("values"), dict) or not isinstance(made.get("data"), str):
        raise ConfigError(f"{path} is damaged (it does not hold values and data)\n{ways_out}")
    return made | {"values": {RENAMED.get(key, key): value for key, value in made["values"].items()}}


def _holds_work(folder, save_folder):
    """Whether anything was trained: a first try that ran out of memory binds nobody to its batch_seconds."""
    from accent_plugin.report.write import METRICS_FILE

    saved = any(save_folder.glob(_CHECKPOINTS)) or any((save_folder / name).exists() for name in _TRAINED)
    return saved or (folder / "report" / METRICS_FILE).exists()


# ------------------------------------------------------------------------------------------------------ who is in it


@contextlib.contextmanager
def claimed(folder):
    """Make a folder, and be the only process that works in it; the claim ends with the process, however that ends.

    Raises
    ------
    ConfigError
        When another process works there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.lock(folder, LOCK_FILE, wait=False))
        except BlockingIOError:
            raise ConfigError(
                f"{folder} is in use by {_holder(folder)}\n"
                "wait until it has ended, end it there, or choose another --output_folder"
            ) from None
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        (folder / HOLDER_FILE).write_text(json.dumps(me), encoding="utf-8")
        _sweep(folder)
        yield folder


def _sweep(folder):
    """Remove what a killed process was writing; nobody else works here."""
    for left in folder.glob(".bundle.[0-9]*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    with contextlib.suppress(OSError):
        for left in folder.glob(f".{IDENTITY_FILE}.*.tmp"):
            left.unlink()
    # Bundles that another was about to replace; foreign files in them stay.
    for left in folder.glob(".bundle.[0-9]*.old"):
        with contextlib.suppress(OSError):
            for name in bundle_config.BUNDLE_FILES:
                (left / name).unlink(missing_ok=True)
            left.rmdir()


def _holder(folder):
    """Name the process that holds a folder's lock."""
    try:
        held_by = json.loads((folder / HOLDER_FILE).read_text(encoding="utf-8"))
        return "process {pid} on {host}, since {since}".format_map(held_by)
    except (OSError, ValueError, KeyError, TypeError):
        # It has the lock, and has not written yet.
        return "another process"


# ------------------------------------------------------------------------------------------------------ begin anew


def clear(folder, save_folder, train_log):
    """Delete what a run has made in its folder, and nothing else; log and return what it was.

    A folder that is not known for a run's is left as it is. Links are not followed. train.py stays: the next run copies
    its own over it, and in a folder that is a recipe's it is no copy.

    Arguments
    ---------
    folder : str or Path
        Claimed by this process.
    save_folder, train_log : str or Path
        Of the hyperparameters.

    Returns
    -------
    list of str
        Paths, relative to the folder where they are in it.

    Raises
    ------
    ConfigError
        When a link leads from the folder to the checkpoints: they may be another run's.
    """
    folder, save_folder, train_log = (Path(path).absolute() for path in (folder, save_folder, train_log))
    if _led_out(save_folder, folder):
        raise ConfigError(
            f"{save_folder} is a link to {save_folder.resolve()}, where --overwrite True deletes nothing\n"
            "remove that link, give that folder as --save_folder, or choose another --output_folder"
        )
    if not _is_run(folder, save_folder):
        return []
    bundle, tensorboard = folder / "bundle", folder / "tensorboard"
    checkpoints = [path for pattern in _CHECKPOINT_FOLDERS for path in sorted(save_folder.glob(pattern))]
    paths = [*(path for path in checkpoints if path.is_dir()), *(save_folder / name for name in _TRAINED)]
    if bundle_config.is_bundle(bundle):
        # Its config.json, by which it is known, at the end.
        paths += [bundle / name for name in reversed(bundle_config.BUNDLE_FILES)]
    paths += [*sorted(tensorboard.glob("events.out.tfevents.*")), train_log]
    # The last two say whose folder it is: after a deletion that was cut short, it can be asked for again.
    paths += [folder / name for name in ("log.txt", "env.log", "hyperparams.yaml", IDENTITY_FILE)]
    deleted = _clear_report(folder / "report")
    for path in paths:
        if not _led_out(path.parent, folder) and _delete(path, path in checkpoints):
            deleted.append(str(path.relative_to(folder) if path.is_relative_to(folder) else path))
    for place in (bundle, tensorboard, save_folder):
        with contextlib.suppress(OSError):
            # Only where it is empty.
            place.rmdir()
    logger.info("deleted from %s: %s", folder, ", ".join(deleted) or "nothing")
    return deleted


def _delete(path, with_content):
    """Remove a file or a link, or a folder where that is meant; whether it was there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir() and with_content:
        shutil.rmtree(path)
    else:
        return False
    return True


def _led_out(path, folder):
    """Whether a link leads a path that is below a folder to somewhere else."""
    return path.is_relative_to(folder) and not path.resolve().is_relative_to(folder.resolve())


def _is_run(folder, save_folder):
    """Whether a run has worked in a folder: log.txt alone could be anybody's."""
    if (folder / IDENTITY_FILE).exists() or any(save_folder.glob(_CHECKPOINTS)):
        return True
    try:
        with open(folder / "hyperparams.yaml", encoding="utf-8", errors="replace") as file:
            return file.read(len(_GENERATED)) == _GENERATED
    except OSError:
        return False


def _clear_report(place):
    from accent_plugin.report.predictions_csv import PREDICTIONS_FILE
    from accent_plugin.report.write import MARKDOWN_FILE, METRICS_FILE, remove_report

    signs = (METRICS_FILE, PREDICTIONS_FILE, MARKDOWN_FILE)
    if place.is_symlink() or not any((place / name).is_file() for name in signs):
        return []
    remove_report(place)
    with contextlib.suppress(OSError):
        place.rmdir()
    return [place.name]


def restarted():
    """Whether torchrun or Slurm started this job again: then it has to go on, even where --overwrite True is given."""
    counts = (os.environ.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(count.isdecimal() and int(count) > 0 for count in counts)
