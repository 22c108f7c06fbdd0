"""A disk cache of a frozen encoder's hidden states, so that a head trains without running the encoder.

A store is a folder with `features.json` (what the features depend on, see `identify`), `index.csv` (one line per clip:
CRC-32 of its values, its number of frames and its key) and `features.bin` (the values of all clips in the same order).
What is kept of a clip is a choice of `accent_plugin.pooling.summarise`: one frame with the means, a few with the same
moments, or all frames. Frames of a 16-bit encoder are kept as float16, everything else as float32.

Clips are only appended, so that a store stays usable when a process is killed. The key of a clip consists of its copy,
id and length, the size of its file and a checksum of part of it; the folder is named after a digest of the encoder's
weights, the augmentation and the versions of packages, so that features of anything else are never used.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from accent_plugin import devices, files
from accent_plugin.audio.augment import Augmentation
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.errors import FeatureError
from accent_plugin.pooling import summarise
from accent_plugin.training import distributed
from accent_plugin.training.batches import Batch, BucketBatchSampler, ClipDataset, Lost, make_loader, split_lost
from accent_plugin.training.loaders import evaluation_batch_seconds, make_loader_of
from accent_plugin.versions import installed_versions

logger = logging.getLogger(__name__)

FEATURES_FILE, INDEX_FILE, VALUES_FILE = "features.json", "index.csv", "features.bin"

# Version of the folder's content.
_FORMAT = 2

# Packages with which features are computed.
_PACKAGES = ("accent_plugin", "torch", "transformers", "numpy", "soundfile")

# As many bytes of a clip's file are compared, from its middle.
_COMPARED_BYTES = 4096

_REMEDY = "choose another features_folder, or delete this one: features can always be recomputed"


def identify(encoder, precision, every_state=False, summary="mean", changes=None):
    """Describe everything that a clip's features depend on, apart from the clip, as JSON values.

    Arguments
    ---------
    encoder : accent_plugin.encoder.base.InvariantEncoder
    precision : str
        Precision of the encoder: "fp32", "bf16" or "fp16".
    every_state : bool
        Whether all hidden states are kept, or only those that the encoder's forward pass uses.
    summary : str
        What is kept of the frames, a choice of `accent_plugin.pooling.summarise`.
    changes : dict
        From `changes`; None for whole, unchanged clips.
    """
    digest = hashlib.blake2b(digest_size=20)
    for name, tensor in sorted(encoder.model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    versions = installed_versions()
    identity = {
        "format": _FORMAT,
        "weights": digest.hexdigest(),
        "encoder": encoder.describe(),
        "precision": precision,
        "states": "all" if every_state else "used",
        "summary": summary,
        "type": "<f2" if summary == "frames" and precision != "fp32" else "<f4",
        "changes": changes,
        "versions": {name: versions[name] for name in _PACKAGES},
    }
    # Tuples become lists, as in the file.
    return json.loads(json.dumps(identity))


def changes(dataset):
    """Describe how a `ClipDataset` crops and augments its clips, as JSON values; None if it does not."""
    augmentation = dataset.augmentation
    if dataset.crop is None and augmentation is None:
        return None
    if not isinstance(augmentation, Augmentation | None):
        raise FeatureError(
            f"a {type(augmentation).__name__} does not tell all that its output depends on, so it cannot be cached\n"
            "train without cache_features, or with this package's own augmentation"
        )
    found = {"crop": dataset.crop, "augmentation": augmentation and dataclasses.asdict(augmentation)}
    if augmentation and augmentation.babble_snr:
        # Every clip may be heard in the others.
        keys = "\n".join(key(clip) for clip in dataset.voices)
        found["voices"] = hashlib.blake2b(keys.encode(), digest_size=20).hexdigest()
    return found | {"seed": dataset.seed}


def encode(encoder, loader, device="cpu", precision="fp32", every_state=False, summary="mean", progress=True):
    """Run an encoder over clips.

    Arguments
    ---------
    encoder : accent_plugin.encoder.base.InvariantEncoder
    loader : torch.utils.data.DataLoader
        Loader of a `ClipDataset`.
    device : str or torch.device
    precision, every_state, summary
        As in `identify`.
    progress : bool
        Whether to draw a progress bar on stderr.

    Yields
    ------
    batch : accent_plugin.training.batches.Batch
    features : list of (frames, states, features) np.ndarray of float32
        Of each clip of the batch.
    """
    encoder, kind = encoder.to(device).eval(), {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    for batch in tqdm(loader, desc="frozen features", unit="batch", disable=not progress):
        features = []
        if len(batch):
            # Set for each batch: the caller may change these modes between two batches.
            autocast = torch.autocast(torch.device(device).type, kind, enabled=kind is not None)
            with devices.exact_fp32(), torch.inference_mode(), autocast:
                inputs = batch.to(device)
                states, valid = encoder.hidden_states(inputs.wavs, inputs.wav_lens, used_only=not every_state)
            with torch.inference_mode():
                for row, frames in enumerate(valid.sum(dim=1).tolist()):
                    clip = torch.stack([state[row, :frames].float() for state in states], dim=1)
                    features.append(summarise(clip, summary).cpu().numpy())
        yield batch, features


class Store:
    """Features of clips on disk.

    Arguments
    ---------
    folder : str or Path
        Parent folder, with a subfolder for each identity.
    identity : dict
        From `identify`.

    Raises
    ------
    FeatureError
        If the subfolder has another identity, or its files are damaged. Damaged values of a clip are recomputed.
    DataError
        If the folder cannot be written.
    """

    def __init__(self, folder, identity):
        text = json.dumps(identity, sort_keys=True)
        self.folder = Path(folder) / hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
        self.identity, self._type = identity, np.dtype(identity["type"])
        with files.writable_folder(self.folder, "features_folder"):
            if not (self.folder / FEATURES_FILE).exists():
                if (self.folder / INDEX_FILE).exists():
                    raise FeatureError(f"{self.folder} has no {FEATURES_FILE}, which names the encoder\n{_REMEDY}")
                with files.atomic_write(self.folder / FEATURES_FILE) as file:
                    json.dump({"identity": identity}, file, indent=1, sort_keys=True)
        self._require_same()
        self._read()

    def _require_same(self):
        path = self.folder / FEATURES_FILE
        try:
            made = json.loads(path.read_text(encoding="utf-8"))["identity"]
            differing = sorted(key for key in self.identity | made if self.identity.get(key) != made.get(key))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise FeatureError(f"{path} is damaged ({error})\n{_REMEDY}") from None
        if differing:
            raise FeatureError(f"{self.folder} holds features of another encoder: {', '.join(differing)}\n{_REMEDY}")

    def _read(self):
        """Read the index lines that have values; the last ones may be truncated."""
        self._rows, self._sums, self._ends, self._values = {}, [], [0], None
        path = self.folder / INDEX_FILE
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        self._shape, lines = None, text.splitlines(keepends=True)
        if lines and lines[0].endswith("\n"):
            with contextlib.suppress(ValueError):
                self._shape = tuple(int(number) for number in lines[0].split(","))
            if self._shape is None or len(self._shape) != 2:
                raise FeatureError(f"{path} is damaged: its first line is not a shape\n{_REMEDY}")
        if self._shape is None:
            return
        path = self.folder / VALUES_FILE
        whole = path.stat().st_size // self._frame_bytes() if path.exists() else 0
        for row, line in enumerate(lines[1:]):
            total, frames, key = [*line.removesuffix("\n").split(",", 2), "", ""][:3]
            if not line.endswith("\n") or not (total.isdigit() and frames.isdigit()):
                break
            if self._ends[-1] + int(frames) > whole:
                break
            self._rows[key] = row
            self._sums.append(int(total))
            self._ends.append(self._ends[-1] + int(frames))
        if self._ends[-1]:
            self._values = np.memmap(path, self._type, "r", shape=(self._ends[-1], *self._shape))

    def _frame_bytes(self):
        return self._shape[0] * self._shape[1] * self._type.itemsize

    def __contains__(self, key):
        return key in self._rows

    def row(self, key):
        """Return the row of the features with this key."""
        if key not in self._rows:
            raise FeatureError(
                f"{self.folder} lacks features of a clip ({key}): another process computed them in another folder, or "
                "with other versions of packages\nall processes must share features_folder and use the same versions"
            )
        return self._rows[key]

    def __getitem__(self, row):
        """(frames, states, features) np.ndarray, a view of the file."""
        return self._values[self._ends[row] : self._ends[row + 1]]

    def forget_damaged(self, keys):
        """Forget clips with these keys whose values do not match their checksum; return the keys of those."""
        damaged = [
            key for key in keys if key in self and zlib.crc32(self[self._rows[key]]) != self._sums[self._rows[key]]
        ]
        for key in damaged:
            del self._rows[key]
        if damaged:
            logger.warning("%s: recomputing the damaged features of %d clips", self.folder, len(damaged))
        return damaged

    @contextlib.contextmanager
    def adding(self, keys):
        """Lock the folder and yield a function (keys, features) that adds clips.

        Clips that other processes have added in the meantime are read first. Those with `keys` are checked.
        """
        with files.writable_folder(self.folder, "features_folder"), files.lock(self.folder):
            self._read()
            self.forget_damaged(keys)
            with open(self.folder / VALUES_FILE, "ab") as values, open(self.folder / INDEX_FILE, "a+b") as index:
                if self._shape is not None:
                    # Remove leftovers of a killed process: values that are not in the index, and an incomplete line.
                    values.truncate(self._ends[-1] * self._frame_bytes())
                    index.seek(0)
                    index.truncate(sum(len(index.readline()) for _ in range(len(self._sums) + 1)))
                else:
                    values.truncate(0)
                    index.truncate(0)

                def add(keys, features):
                    if self._shape is None:
                        self._shape = features[0].shape[1:]
                        index.write(f"{self._shape[0]},{self._shape[1]}\n".encode())
                    clips = [self._convert(clip) for clip in features]
                    # The values first: each line of the index guarantees that its values exist.
                    values.writelines(clips)
                    values.flush()
                    rows = zip(clips, keys, strict=True)
                    index.write("".join(f"{zlib.crc32(clip)},{len(clip)},{key}\n" for clip, key in rows).encode())
                    index.flush()

                yield add
            self._read()

    def _convert(self, clip):
        """Convert the features of a clip to the type of the store."""
        largest = np.abs(clip).max(initial=0.0)
        if self._type == np.float16 and largest > np.finfo(np.float16).max:
            raise FeatureError(
                f"a hidden state of the encoder is as large as {largest:g}, more than float16 holds\n"
                "train with --precision fp32, or without cache_features"
            )
        return np.ascontiguousarray(clip, dtype=self._type)

    def require_space(self, encoder, seconds):
        """Estimate the size of features still to be computed, and raise a FeatureError if the disk lacks space.

        Arguments
        ---------
        encoder : accent_plugin.encoder.base.InvariantEncoder
        seconds : sequence of float
            Maximum length of each clip.

        Returns
        -------
        int
            In bytes.
        """
        states = len(encoder.layers) + 1 if self.identity["states"] == "all" else len(encoder.weighted_layers or [0])
        frames = len(seconds) * {"mean": 1, "moments": states + 1}.get(self.identity["summary"], 0)
        if self.identity["summary"] == "frames":
            samples = (torch.tensor(seconds, dtype=torch.float64) * SAMPLE_RATE).long()
            frames = int(encoder.frame_counts(samples.clamp(min=encoder.minimum_samples)).sum())
        needed, free = frames * states * encoder.width * self._type.itemsize, shutil.disk_usage(self.folder).free
        if needed > free:
            raise FeatureError(
                f"the features of {len(seconds)} clips need {needed / 1e6:,.1f} MB, but {self.folder} has "
                f"{free / 1e6:,.1f} MB left\n"
                "free disk space, choose another features_folder, or keep less: fewer weighted_layers or "
                "augment_copies, or pooling mean or statistics without a projector, which need no frames"
            )
        return needed


def key(clip, copy=0):
    """Key of a copy of an `accent_plugin.data.manifests.Clip`, which changes when the recording does."""
    size, content = -1, 0
    # An error will be reported when the clip is read.
    with contextlib.suppress(OSError), open(clip.wav, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, (size - _COMPARED_BYTES) // 2))
        content = zlib.crc32(file.read(_COMPARED_BYTES))
    return f"{copy},{size},{content},{clip.duration:.6f},{clip.id}"


def copies_of(dataset):
    """Numbers of the copies of each clip of a `ClipDataset`; [0] if the clips are not changed."""
    if dataset.crop is None and dataset.augmentation is None:
        return [0]
    if dataset.copies is None:
        raise FeatureError("clips that are cropped or augmented anew in every epoch cannot be cached: set copies")
    return list(range(1, dataset.copies + 1))


def fill(store, encoder, dataset, load, device="cpu", progress=True):
    """Add the clips that a store lacks, and return the unreadable ones: {(id, copy): reason}.

    Arguments
    ---------
    store : Store
    encoder : accent_plugin.encoder.base.InvariantEncoder
        The encoder that the store was created for.
    dataset : accent_plugin.training.batches.ClipDataset
    load : callable
        (data set, copy) -> loader of a data set's clips, in any order.
    device, progress
        As in `encode`.
    """
    keys = {(clip.id, copy): key(clip, copy) for copy in copies_of(dataset) for clip in dataset.clips}
    lost, identity = {}, store.identity
    if all(one in store for one in keys.values()) and not store.forget_damaged(keys.values()):
        return lost
    with store.adding(keys.values()) as add:
        # Another process may have added clips while this one waited for the lock.
        missing = {
            copy: dataset.with_clips([clip for clip in dataset.clips if keys[clip.id, copy] not in store])
            for copy in copies_of(dataset)
        }
        seconds = np.concatenate([part.seconds() for part in missing.values()])
        logger.info(
            *("computing the features of %d of %d clips in %s: about %.1f MB", len(seconds), len(keys), store.folder),
            store.require_space(encoder, seconds) / 1e6,
        )
        how = (device, identity["precision"], identity["states"] == "all", identity["summary"], progress)
        for copy, part in missing.items():
            for batch, features in encode(encoder, load(part, copy), *how) if part.clips else ():
                lost |= {(name, copy): why for name, why in batch.lost}
                if len(batch):
                    add([keys[name, copy] for name in batch.ids], features)
    return lost


def fill_store(folder, encoder, dataset, options, device="cpu", precision="fp32", every_state=False, summary="mean"):
    """Open the store of an encoder, and let the first process add the clips that it lacks.

    Arguments
    ---------
    folder : str or Path
        Folder of all stores.
    encoder, device, precision, every_state, summary
        As in `encode`.
    dataset : accent_plugin.training.batches.ClipDataset
    options : accent_plugin.training.loaders.LoadingOptions

    Returns
    -------
    Store
    dict
        (id, copy) of an unreadable clip -> reason.
    """
    identity = identify(encoder, precision, every_state, summary, changes(dataset))

    def load(missing, copy):
        # All of them in this process, whoever else trains.
        sampler = BucketBatchSampler(missing.seconds(), evaluation_batch_seconds(options), shuffle=False)
        sampler.set_epoch(copy)
        return make_loader_of(missing, sampler, options)

    lost = distributed.broadcast_from_main(lambda: fill(Store(folder, identity), encoder, dataset, load, device))
    return Store(folder, identity), lost


def cached(loader, folder, encoder, options, device="cpu", precision="fp32", summary="mean"):
    """Make a loader of the same batches with `Batch.states` instead of audio; arguments as in `fill_store`."""
    store, lost = fill_store(folder, encoder, loader.dataset, options, device, precision, summary=summary)
    return make_loader(CachedDataset(loader.dataset, store, lost), loader.batch_sampler, collate_fn=collate)


class CachedDataset(ClipDataset):
    """Clips by (index, epoch), with their cached features instead of audio.

    Arguments
    ---------
    dataset : ClipDataset
        Source of the clips, copies, classes and seed.
    store : Store
    lost : dict
        (id, copy) of an unreadable clip -> reason.
    """

    def __init__(self, dataset, store, lost):
        super().__init__(dataset.clips, list(dataset.accents), seed=dataset.seed, copies=dataset.copies)
        self.store, self.lost = store, lost
        self._rows = {
            copy: np.array([-1 if (clip.id, copy) in lost else store.row(key(clip, copy)) for clip in self.clips])
            for copy in copies_of(dataset)
        }

    def __getitem__(self, item):
        index, epoch = item
        copy, clip = 0 if 0 in self._rows else self.copy(epoch), self.clips[index]
        row = self._rows[copy][index]
        if row < 0:
            return Lost(clip.id, self.lost[clip.id, copy])
        return clip.id, self.store[row], self.label(clip)


def collate(items):
    """Pad a list of (id, features, label), or `Lost` for unreadable clips, to a `Batch` without audio."""
    items, lost = split_lost(items)
    nothing = torch.zeros(len(items), 0)
    if not items:
        return Batch((), nothing, None, torch.zeros(0, dtype=torch.int64), lost)
    ids, features, labels = zip(*items, strict=True)
    counts = [len(clip) for clip in features]
    _, number, width = features[0].shape
    states = np.zeros((number, len(items), max(counts), width), dtype=features[0].dtype)
    for row, clip in enumerate(features):
        # The states first: their weighted sum is then one product.
        states[:, row, : len(clip)] = clip.swapaxes(0, 1)
    return Batch(ids, nothing, None, torch.tensor(labels), lost, torch.from_numpy(states), torch.tensor(counts))
