"""A run folder belongs to one configuration, and one process at a time may use it.

The file ``run.json`` in the folder contains the hyperparameters that decide what is trained, and a fingerprint of the
data. Another configuration raises an error that lists the differences; otherwise it would resume or evaluate
checkpoints of a different run. A folder without trained weights may be used by any configuration.
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
from accent_plugin.audio.augment import DEFAULT
from accent_plugin.bundle import config as bundle_config
from accent_plugin.errors import ConfigError
from accent_plugin.experiment.hyperparameters import RENAMED, TABLE

logger = logging.getLogger(__name__)

IDENTITY_FILE = "run.json"
LOCK_FILE = ".run.lock"

# A file besides the lock: on Windows, other processes cannot read a locked file.
HOLDER_FILE = ".run.holder.json"

_NOT_COUNTED = {one.name for one in TABLE.values() if one.free}
_OF_DATA = {one.name for one in TABLE.values() if one.data}

# Hyperparameters that are compared only in some configurations, see `run_identity`.
_SOMETIMES = {*_OF_DATA, "number_of_epochs", "wav2vec2_hub"}

# Hyperparameters that may change with test_only: they affect memory and numerical precision.
_FREE_IN_TESTS = {"eval_precision", "batch_seconds", "batches_per_step"}

_WEIGHTS = (".safetensors", ".bin", ".ckpt")
_WAYS_OUT = "choose another --output_folder, or delete that run and start again with --overwrite True"
_WAYS_OUT_OF_A_TEST = "give the values it was trained with, or the --output_folder of another run"

# Checkpoints, which mark a folder as containing trained weights.
_CHECKPOINTS = "CKPT*/CKPT.yaml"

_TRAINED = ("history.json", "trials.json")

# Complete checkpoints, damaged ones, and partial ones of a killed process.
_CHECKPOINT_FOLDERS = ("CKPT*", "damaged+CKPT*", ".CKPT*", ".writing*", ".deleted+*")

# First words of the hyperparams.yaml that SpeechBrain writes into a run folder.
_GENERATED = "# Generated "


# ------------------------------------------------------------------------------------------------------------- identity


def run_identity(values, fold=None, processes=1):
    """Select the hyperparameters that decide what is trained, as JSON values.

    Arguments
    ---------
    values : dict
        From `accent_plugin.experiment.settings.Settings.values`.
    fold : int
        Counted from 1; None without folds.
    processes : int
        Number of processes. A run may resume with fewer processes and proportionally more batches per step.
    """
    # Compare unknown values too: objects of the YAML may be built from values that a user added.
    chosen = {
        key: value
        for key, value in values.items()
        if key not in _NOT_COUNTED and (key in TABLE or isinstance(value, bool | int | float | str))
    }
    chosen["batches_per_step"] = chosen.pop("grad_accumulation_factor") * processes
    chosen["fold"] = fold
    probability = chosen["augment_probability"]
    if isinstance(probability, dict) and probability.keys() == {DEFAULT}:
        # Version 0.1.0 had one number for all kinds.
        chosen["augment_probability"] = probability[DEFAULT]
    if values["skip_prep"]:
        chosen = {key: value for key, value in chosen.items() if key not in _OF_DATA}
    if not values["warmup_fraction"] and values["lr_schedule"] == "none":
        # The learning rates do not depend on the last epoch, so the run may be extended.
        del chosen["number_of_epochs"]
    if values["from_bundle"] is None:
        chosen["wav2vec2_hub"] = _source(values["wav2vec2_hub"])
    else:
        # The encoder comes from the bundle.
        del chosen["wav2vec2_hub"]
        chosen["from_bundle"] = _source(values["from_bundle"])
    return json.loads(json.dumps(chosen, default=str))


def _source(source):
    """Identify a Hub source by its name, and a folder by its name and content, because it may be moved."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return source
    folder = folder.resolve()
    config = folder / bundle_config.CONFIG_FILE
    digest = _digest([config.read_bytes()]) if config.is_file() else "missing"
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in _WEIGHTS)
    return f"{folder.name} ({config.name} {digest}, {size:,} bytes of weights)"


def data_fingerprint(paths):
    """Digest of the clips, accents and splits of manifests, {split: CSV}; paths and times have no effect."""
    return _digest(part for split, path in sorted(paths.items()) for part in (split.encode(), Path(path).read_bytes()))


def _digest(parts):
    """Compute a digest of several byte strings, as twenty hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=10)
    for part in parts:
        digest.update(b"%d:" % len(part) + part)
    return digest.hexdigest()


def differences(made, now):
    """Describe each hyperparameter that differs from the folder's in one line.

    A hyperparameter that the folder lacks was added later and counts as equal; otherwise no older run could resume
    after an update. One that is unknown now counts as a difference, because this version would ignore it.
    """
    lines = []
    for key in sorted(made):
        if key in now and made[key] != now[key]:
            lines.append(f"{key}: {_format(made[key])} in the folder, {_format(now[key])} now")
        elif key not in now and key not in _SOMETIMES:
            lines.append(f"{key}: {_format(made[key])} in the folder, unknown to this version and YAML")
    return lines


def _format(value):
    """Format a value as typed on the command line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_format, value))}]"
    return "null" if value is None else str(value)


# ------------------------------------------------------------------------------------------------------------ ownership


def begin(folder, identity, data, *, save_folder, test_only=False):
    """Raise a ConfigError with all differences if a folder belongs to another configuration, or else record this one.

    Arguments
    ---------
    folder : str or Path
        The run's folder, which exists.
    identity : dict
        From `run_identity`.
    data : str
        From `data_fingerprint`. None while the data are unknown; nothing is written then.
    save_folder : str or Path
        Folder of the checkpoints.
    test_only : bool
        Write nothing, and let hyperparameters differ that affect only memory and precision.
    """
    folder = Path(folder)
    ways_out = _WAYS_OUT_OF_A_TEST if test_only else _WAYS_OUT
    made = _read(folder / IDENTITY_FILE, ways_out)
    if made is None and any(Path(save_folder).glob(_CHECKPOINTS)):
        unknown = f"{save_folder} has checkpoints, but {folder} has no {IDENTITY_FILE} with their hyperparameters"
        if not test_only:
            raise ConfigError(f"{unknown}\n{ways_out}")
        logger.warning("%s: assuming the present hyperparameters", unknown)
    if made is not None and _has_weights(folder, Path(save_folder)):
        free = _FREE_IN_TESTS if test_only else ()
        lines = differences({key: value for key, value in made["values"].items() if key not in free}, identity)
        if data is not None and data != made["data"]:
            lines.append("the data: the clips or their split differ from those it was trained on")
        if lines:
            raise ConfigError("\n  ".join([f"{folder} belongs to another configuration:", *lines]) + f"\n{ways_out}")
        absent = sorted(identity.keys() - made["values"].keys() - _SOMETIMES)
        if absent:
            logger.warning("%s lacks %s: assuming the present values", folder / IDENTITY_FILE, ", ".join(absent))
        identity = made["values"] | identity
    wanted = {"data": data, "values": identity}
    if data is not None and not test_only and made != wanted:
        with files.atomic_write(folder / IDENTITY_FILE) as file:
            json.dump(wanted, file, indent=1, sort_keys=True)
            file.write("\n")


def read_identity(folder):
    """Return the `run_identity` recorded in a run folder; None if there is none or it cannot be read."""
    try:
        made = _read(Path(folder) / IDENTITY_FILE, "")
    except (ConfigError, OSError):
        # `begin` reports this error.
        return None
    return None if made is None else made["values"]


def _read(path, ways_out):
    """Read run.json; None if there is none."""
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise ConfigError(f"{path} is damaged ({error})\n{ways_out}") from None
    if not isinstance(made, dict) or not isinstance(made.get("values"), dict) or not isinstance(made.get("data"), str):
        raise ConfigError(f"{path} is damaged (it lacks values or data)\n{ways_out}")
    return made | {"values": {RENAMED.get(key, key): value for key, value in made["values"].items()}}


def _has_weights(folder, save_folder):
    """Whether the folder has trained weights; after a first attempt without any, batch_seconds may still change."""
    from accent_plugin.report.write import METRICS_FILE

    saved = any(save_folder.glob(_CHECKPOINTS)) or any((save_folder / name).exists() for name in _TRAINED)
    return saved or (folder / "report" / METRICS_FILE).exists()


# ----------------------------------------------------------------------------------------------------------------- lock


@contextlib.contextmanager
def locked(folder):
    """Make a folder and lock it for this process; the lock ends with the process, even if it is killed.

    If another process uses the folder, a ConfigError names it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.lock(folder, LOCK_FILE, wait=False))
        except BlockingIOError:
            raise ConfigError(
                f"{folder} is in use by {_holder(folder)}\nwait for it, stop it, or choose another --output_folder"
            ) from None
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with files.atomic_write(folder / HOLDER_FILE) as file:
            json.dump(holder, file)
        _sweep(folder)
        yield folder


def _sweep(folder):
    """Remove partial files of a killed process; this process has the lock."""
    for left in folder.glob(".bundle.[0-9]*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    with contextlib.suppress(OSError):
        for left in (*folder.glob(f".{IDENTITY_FILE}.*.tmp"), *folder.glob(f".{HOLDER_FILE}.*.tmp")):
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
        holder = json.loads((folder / HOLDER_FILE).read_text(encoding="utf-8"))
        return "process {pid} on {host}, since {since}".format_map(holder)
    except (OSError, ValueError, KeyError, TypeError):
        # The process has the lock, but has not written its name yet.
        return "another process"


# ------------------------------------------------------------------------------------------------------------ overwrite


def clear(folder, save_folder, train_log):
    """Delete only the files that a run has made in its folder; log and return their paths as text.

    A folder that is not recognised as a run folder is left unchanged. Links are not followed; checkpoints behind a link
    in the folder may belong to another run and raise a ConfigError. train.py stays: the next run overwrites it, and in
    a recipe's own folder it is the original.

    Arguments
    ---------
    folder : str or Path
        Locked by this process.
    save_folder, train_log : str or Path
        Values of these hyperparameters.
    """
    folder, save_folder, train_log = (Path(path).absolute() for path in (folder, save_folder, train_log))
    if _is_outside(save_folder, folder):
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
        # config.json, which identifies the bundle, is deleted last.
        paths += [bundle / name for name in reversed(bundle_config.BUNDLE_FILES)]
    paths += [*sorted(tensorboard.glob("events.out.tfevents.*")), train_log]
    # The last two identify the run folder: an interrupted deletion can be repeated.
    paths += [folder / name for name in ("log.txt", "env.log", "hyperparams.yaml", IDENTITY_FILE)]
    deleted = _clear_report(folder / "report")
    for path in paths:
        if not _is_outside(path.parent, folder) and _delete(path, path in checkpoints):
            deleted.append(str(path.relative_to(folder) if path.is_relative_to(folder) else path))
    for place in (bundle, tensorboard, save_folder):
        with contextlib.suppress(OSError):
            # Fails unless the folder is empty.
            place.rmdir()
    logger.info("deleted from %s: %s", folder, ", ".join(deleted) or "nothing")
    return deleted


def _delete(path, with_content):
    """Remove a file or a link, or a folder with `with_content`; return whether it existed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir() and with_content:
        shutil.rmtree(path)
    else:
        return False
    return True


def _is_outside(path, folder):
    """Whether a path inside a folder leads outside through a link."""
    return path.is_relative_to(folder) and not path.resolve().is_relative_to(folder.resolve())


def _is_run(folder, save_folder):
    """Whether a folder is a run folder; log.txt alone is not enough."""
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
    """Whether torchrun or Slurm restarted this job, which then has to resume even with --overwrite True."""
    counts = (os.environ.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(count.isdecimal() and int(count) > 0 for count in counts)
