"""Checkpoints that are written atomically and verified before use.

SpeechBrain first writes the file that marks a folder as a checkpoint: a process killed after that leaves a folder on
which every later run fails. Here a checkpoint is written under a temporary name, synced to disk, and renamed once it is
complete. Its CKPT.yaml holds the size and SHA-256 of every file and begins with the SHA-256 of its own content; all are
verified before the checkpoint is used.
"""

import contextlib
import hashlib
import logging
import math
import os
import pickle
import shutil
import time
from pathlib import Path

import torch
import yaml
from speechbrain.utils.checkpoints import CKPT_PREFIX, METAFNAME, PARAMFILE_EXT, Checkpoint, Checkpointer, ckpt_recency
from speechbrain.utils.distributed import ddp_barrier

from accent_plugin import files
from accent_plugin.encoder.sources import require_finite
from accent_plugin.errors import CheckpointError
from accent_plugin.training import distributed

logger = logging.getLogger(__name__)

# Newest checkpoints that are kept beside the best: a second one in case the newest is damaged.
NEWEST = 2

# The best, the newest, the one being written, and a damaged one.
AT_MOST = NEWEST + 3

_WRITING = ".writing"
_DELETED = ".deleted"
_DAMAGED = "damaged"
_BLOCK = 1 << 22

# Errors from a CKPT.yaml that is missing, truncated or overwritten.
_UNREADABLE = (
    *(OSError, ValueError, yaml.YAMLError, CheckpointError),
    *(KeyError, TypeError, AttributeError, RecursionError, OverflowError),
)

# Errors from loading a checkpoint of another model, or a damaged one written by SpeechBrain's own class.
_UNLOADABLE = (*_UNREADABLE, RuntimeError, EOFError, pickle.UnpicklingError, IndexError)

# Start of a CKPT.yaml, followed by the digest of the rest of the file.
_SEAL = "# sha256 of what follows: "

# Words in the RuntimeErrors that torch raises for a full disk or a missing folder.
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "Parent directory")


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's `Checkpointer`, with writing, listing and deleting replaced; arguments as there.

    With several processes the first one writes, lists and deletes, and sends the others the list.
    """

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self._whole, self._size_logged, self._last = set(), False, 0.0

    # Writing

    def save_checkpoint(self, meta=None, end_of_epoch=True, name=None, verbosity=logging.INFO):
        """Write a checkpoint; arguments and return value as in SpeechBrain.

        If the disk is full or read-only, a CheckpointError is raised, and earlier checkpoints stay intact.
        """
        place, staging = self.checkpoints_dir, self.checkpoints_dir / _WRITING
        name = distributed.broadcast_from_main(self._free_name) if name is None else name
        # Strictly increasing even if the clock is set back, so that the last one written counts as the newest.
        self._last = max(time.time(), self._last + 1e-3)
        failure, saved = None, None
        try:
            if distributed.is_main():
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir()
            self.checkpoints_dir = staging
            saved = super().save_checkpoint({"unixtime": self._last, **(meta or {})}, end_of_epoch, name, logging.DEBUG)
            if distributed.is_main():
                saved = self._publish(saved, place)
                logger.log(verbosity, "saved %s", saved.path)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(words in str(error) for words in _TORCH_CANNOT_WRITE):
                raise
            failure = error
        finally:
            self.checkpoints_dir = place
            if distributed.is_main():
                shutil.rmtree(staging, ignore_errors=True)
        if failure is not None:
            raise CheckpointError(
                f"cannot write a checkpoint in {place}: {failure}{_free_space(place)}\n"
                "earlier checkpoints are intact: free disk space and rerun the same command to resume"
            ) from failure
        return saved

    def _publish(self, saved, place):
        """Sync a staged checkpoint to disk, record its files' sizes and digests, and give it its final name."""
        meta = {**saved.meta, "files": {}}
        for path in saved.paramfiles.values():
            meta["files"][path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
            _sync(path)
        metafile = saved.path / METAFNAME
        content = "# yamllint disable\n" + yaml.safe_dump(meta)
        metafile.write_text(f"{_SEAL}{hashlib.sha256(content.encode()).hexdigest()}\n{content}", encoding="utf-8")
        _sync(metafile)
        _sync(saved.path)
        final = place / saved.path.name
        saved.path.rename(final)
        _sync(place)
        self._whole.add(final)
        self._log_size(meta["files"])
        return Checkpoint(final, meta, {name: final / path.name for name, path in saved.paramfiles.items()})

    def _log_size(self, files):
        if not self._size_logged:
            size = sum(file["bytes"] for file in files.values()) / 2**20
            logger.info(
                "a checkpoint takes %.0f MiB; at most %d are kept, %.0f MiB in all", size, AT_MOST, AT_MOST * size
            )
            self._size_logged = True

    def _free_name(self):
        stamp, number = time.strftime("%Y-%m-%d+%H-%M-%S"), 0
        while (self.checkpoints_dir / f"{CKPT_PREFIX}+{stamp}+{number:02d}").exists():
            number += 1
        return f"{stamp}+{number:02d}"

    # Reading

    def list_checkpoints(self):
        """List the intact checkpoints; damaged ones are logged and renamed."""
        return distributed.broadcast_from_main(self._list)

    def _list(self):
        found = []
        for folder in sorted(self.checkpoints_dir.glob(f"{CKPT_PREFIX}*")):
            if not folder.is_dir():
                continue
            if folder not in self._whole:
                _require_downloaded(folder)
            try:
                meta = _read_meta(folder / METAFNAME)
                if folder not in self._whole:
                    _require_whole(folder, meta)
            except _UNREADABLE as error:
                self._set_aside(folder, error)
                continue
            self._whole.add(folder)
            self._last = max(self._last, meta["unixtime"])
            saved = {path.stem: path for path in folder.iterdir() if path.suffix == PARAMFILE_EXT}
            found.append(Checkpoint(folder, meta, saved))
        # By the recorded time: names can repeat within a second. Among equally good ones the oldest counts as best.
        return sorted(found, key=lambda checkpoint: checkpoint.meta["unixtime"])

    def _set_aside(self, folder, why):
        if not folder.exists():
            # Deleted in the meantime by the process that trains in this folder.
            return
        aside = folder.with_name(f"{_DAMAGED}+{folder.name}")
        logger.warning("skipped the damaged checkpoint %s: %s; renamed it to %s", folder, why, aside.name)
        # One damaged checkpoint is enough to inspect.
        for older in self.checkpoints_dir.glob(f"{_DAMAGED}+*"):
            shutil.rmtree(older, ignore_errors=True)
        try:
            folder.rename(aside)
        except OSError as error:
            logger.warning("cannot rename %s: %s", folder, error)

    def load_checkpoint(self, checkpoint):
        """Load a checkpoint, as in SpeechBrain; raise a CheckpointError if it belongs to another model."""
        try:
            super().load_checkpoint(checkpoint)
        except _UNLOADABLE as error:
            raise CheckpointError(
                f"{checkpoint.path} cannot be loaded: {str(error) or type(error).__name__}\n"
                "it belongs to another model or is damaged: move it away to use the one before it, or choose another "
                "output_folder"
            ) from error
        for name, recoverable in self.recoverables.items():
            if isinstance(recoverable, torch.nn.Module):
                require_finite(recoverable.state_dict(), checkpoint.path / f"{name}{PARAMFILE_EXT}", CheckpointError)

    # Deleting

    def delete_checkpoints(self, *, num_to_keep=1, min_keys=None, max_keys=None, importance_keys=(ckpt_recency,),
                           ckpt_predicate=None, verbosity=logging.INFO):  # fmt: skip
        """Delete the least important checkpoints; arguments as in SpeechBrain.

        Each is renamed first, so that a partly deleted folder never looks like a checkpoint.
        """
        ways = [{"min_key": key} for key in min_keys or ()] + [{"max_key": key} for key in max_keys or ()]
        ways += [{"importance_key": key} for key in importance_keys]
        candidates, kept = {}, set()
        for way in ways:
            ranked = self.find_checkpoints(**way, ckpt_predicate=ckpt_predicate)
            candidates |= {checkpoint.path: checkpoint for checkpoint in ranked}
            kept |= {checkpoint.path for checkpoint in ranked[:num_to_keep]}
        if distributed.is_main():
            for path in sorted(candidates.keys() - kept):
                gone = path.with_name(f"{_DELETED}+{path.name}")
                shutil.rmtree(gone, ignore_errors=True)
                try:
                    path.rename(gone)
                except OSError as error:
                    logger.warning("cannot delete the old checkpoint %s: %s", path, error)
                    continue
                shutil.rmtree(gone, ignore_errors=True)
                self._whole.discard(path)
                logger.log(verbosity, "deleted %s", path)
        ddp_barrier()

    def tidy(self):
        """Remove leftovers of a killed process; call it only in the process that trains in this folder."""
        if distributed.is_main():
            for pattern in (f"{_WRITING}*", f"{_DELETED}+*"):
                for left in self.checkpoints_dir.glob(pattern):
                    shutil.rmtree(left, ignore_errors=True)
            for left in self.checkpoints_dir.glob(".*.tmp"):
                left.unlink(missing_ok=True)


def _require_downloaded(folder):
    """Raise a `CheckpointError` if a checkpoint was never downloaded; to set it aside would lose its place."""
    # The folder may be deleted in the meantime by the process that trains in it.
    with contextlib.suppress(OSError):
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            # A crash of the machine leaves empty and zero-filled files: they are damaged.
            with open(path, "rb") as file:
                beginning = file.read(files.BEGINNING)
            if any(beginning) and (what := files.describe_content(beginning)):
                raise CheckpointError(f"{path} is {what}")


def _read_meta(path):
    """Read a CKPT.yaml and verify its digest."""
    # As bytes: text mode would hide changed line endings.
    first, _, content = (text := path.read_bytes().decode("utf-8")).partition("\n")
    # Checkpoints written by SpeechBrain's own class have no digest.
    if first.startswith(_SEAL) and first[len(_SEAL) :] != hashlib.sha256(content.encode()).hexdigest():
        raise CheckpointError(f"the content of {path.name} has changed")
    meta = yaml.safe_load(text)
    if (
        not isinstance(meta, dict)
        or not isinstance(meta.get("unixtime"), float)
        or not math.isfinite(meta["unixtime"])
        or not isinstance(meta.get("end-of-epoch"), bool)
    ):
        raise CheckpointError(f"its {path.name} is incomplete")
    return meta


def _free_space(folder):
    """Free space on the disk of a folder, for a message."""
    try:
        return f" ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free)"
    except OSError:
        return ""


def _require_whole(folder, meta):
    """Raise a `CheckpointError` if a file differs from its size or digest in CKPT.yaml."""
    # Checkpoints written by SpeechBrain's own class have no such entries.
    for name, expected in meta.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}")
        if _digest(path) != expected["sha256"]:
            raise CheckpointError(f"the content of {name} has changed")


def _digest(path):
    """SHA-256 of a file as hexadecimal digits."""
    digest, block = hashlib.sha256(), bytearray(_BLOCK)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(memoryview(block)[:size])
    return digest.hexdigest()


def _sync(path):
    with contextlib.suppress(PermissionError if os.name == "nt" else ()):
        # Windows cannot open folders.
        descriptor = os.open(path, os.O_RDONLY if Path(path).is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
