"""A disk cache of a frozen encoder's pooled states, so that a head trains without running the encoder.

A store is a folder with `features.json` (the encoder and its precision), `index.csv` (one line per clip: CRC-32 of its
values and its key) and `means.f32` (the values of all clips in the same order, little-endian float32). Clips are only
appended, so that a store stays usable when a process is killed. The key of a clip consists of its id, its length and
the size of its file; the folder is named after a digest of the encoder's weights, so that features of other weights or
other audio are never used.
"""

import contextlib
import hashlib
import json
import logging
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from accent_plugin import devices, files
from accent_plugin.errors import FeatureError
from accent_plugin.pooling import MeanPooling
from accent_plugin.training import distributed
from accent_plugin.training.batches import Batch, BucketBatchSampler, ClipDataset, Lost, make_loader, split_lost
from accent_plugin.training.loaders import evaluation_batch_seconds, make_loader_of

logger = logging.getLogger(__name__)

FEATURES_FILE, INDEX_FILE, VALUES_FILE = "features.json", "index.csv", "means.f32"

# Version of the folder's content.
_FORMAT = 1

_KIND = np.dtype("<f4")
_REMEDY = "choose another features_folder, or delete this one: features can always be recomputed"


def identify(encoder, precision, every_state=False):
    """Describe everything that a clip's features depend on, apart from the clip, as JSON values.

    Arguments
    ---------
    encoder : accent_plugin.encoder.base.InvariantEncoder
    precision : str
        Precision of the encoder: "fp32", "bf16" or "fp16".
    every_state : bool
        Whether all hidden states are kept, or only those that the encoder's forward pass uses.
    """
    digest = hashlib.blake2b(digest_size=20)
    for name, tensor in sorted(encoder.model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return {
        "format": _FORMAT,
        "weights": digest.hexdigest(),
        "encoder": encoder.describe(),
        "precision": precision,
        "states": "all" if every_state else "used",
    }


def encode(encoder, loader, device="cpu", precision="fp32", every_state=False, progress=True):
    """Run an encoder over clips.

    Arguments
    ---------
    encoder : accent_plugin.encoder.base.InvariantEncoder
    loader : torch.utils.data.DataLoader
        Loader of a `ClipDataset` without crops or augmentation.
    device : str or torch.device
    precision, every_state
        As in `identify`.
    progress : bool
        Whether to draw a progress bar on stderr.

    Yields
    ------
    batch : accent_plugin.training.batches.Batch
    pooled_states : (clips, states, features) np.ndarray of float32
        Means over the frames of each clip.
    """
    encoder = encoder.to(device).eval()
    pooling, kind = MeanPooling(encoder.width), {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    for batch in tqdm(loader, desc="frozen features", unit="batch", disable=not progress):
        if len(batch):
            # Set for each batch: the caller may change these modes between two batches.
            autocast = torch.autocast(torch.device(device).type, kind, enabled=kind is not None)
            with devices.exact_fp32(), torch.inference_mode(), autocast:
                inputs = batch.to(device)
                states, valid = encoder.hidden_states(inputs.wavs, inputs.wav_lens, used_only=not every_state)
                pooled_states = torch.stack([pooling(state, valid) for state in states], dim=1).cpu().numpy()
        else:
            pooled_states = np.zeros((0, 0, 0), dtype=np.float32)
        yield batch, pooled_states


class Store:
    """Features of clips on disk.

    Arguments
    ---------
    folder : str or Path
        Parent folder, with a subfolder for each encoder and precision.
    identity : dict
        From `identify`.

    Raises
    ------
    FeatureError
        If the subfolder belongs to another encoder, or its files are damaged. Damaged values of a clip are recomputed.
    DataError
        If the folder cannot be written.
    """

    def __init__(self, folder, identity):
        text = json.dumps(identity, sort_keys=True)
        self.folder = Path(folder) / hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
        self.identity = identity
        self._rows, self._sums, self._values = {}, [], None
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
        self._rows, self._sums, self._values = {}, [], None
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
        size = self._row_bytes()
        whole = (self.folder / VALUES_FILE).stat().st_size // size if (self.folder / VALUES_FILE).exists() else 0
        for row, line in enumerate(lines[1:]):
            total, _, key = line.removesuffix("\n").partition(",")
            if row >= whole or not line.endswith("\n") or not total.isdigit():
                break
            self._rows[key] = row
            self._sums.append(int(total))
        if self._sums:
            shape = (len(self._sums), *self._shape)
            self._values = np.memmap(self.folder / VALUES_FILE, _KIND, "r", shape=shape)
        damaged = [key for key, row in self._rows.items() if zlib.crc32(self._values[row]) != self._sums[row]]
        for key in damaged:
            del self._rows[key]
        if damaged:
            logger.warning("%s: recomputing the damaged features of %d clips", self.folder, len(damaged))

    def _row_bytes(self):
        return self._shape[0] * self._shape[1] * _KIND.itemsize

    def __contains__(self, key):
        return key in self._rows

    def row(self, key):
        """Return the row of the features with this key."""
        return self._rows[key]

    def __getitem__(self, row):
        """(states, features) np.ndarray of float32."""
        return np.array(self._values[row])

    @contextlib.contextmanager
    def adding(self):
        """Lock the folder and yield a function (keys, pooled_states) that adds clips.

        Clips that other processes have added in the meantime are read first.
        """
        with files.writable_folder(self.folder, "features_folder"), files.lock(self.folder):
            self._read()
            with open(self.folder / VALUES_FILE, "ab") as values, open(self.folder / INDEX_FILE, "a+b") as index:
                if self._shape is not None:
                    # Remove leftovers of a killed process: values that are not in the index, and an incomplete line.
                    values.truncate(len(self._sums) * self._row_bytes())
                    index.seek(0)
                    index.truncate(sum(len(index.readline()) for _ in range(len(self._sums) + 1)))
                else:
                    values.truncate(0)
                    index.truncate(0)

                def add(keys, pooled_states):
                    if self._shape is None:
                        self._shape = pooled_states.shape[1:]
                        index.write(f"{self._shape[0]},{self._shape[1]}\n".encode())
                    rows = np.ascontiguousarray(pooled_states, dtype=_KIND)
                    # The values first: each line of the index guarantees that its values exist.
                    values.write(rows.tobytes())
                    values.flush()
                    sums = [zlib.crc32(row) for row in rows]
                    index.write("".join(f"{total},{key}\n" for total, key in zip(sums, keys, strict=True)).encode())
                    index.flush()

                yield add
            self._read()


def key(clip):
    """Key of an `accent_plugin.data.manifests.Clip`, which changes when the recording does."""
    try:
        size = os.stat(clip.wav).st_size
    except OSError:
        # Reading it will fail, and report it as unreadable.
        size = -1
    return f"{size},{clip.duration:.6f},{clip.id}"


def fill(store, encoder, clips, load, device="cpu", progress=True):
    """Add the clips that a store lacks, and return the unreadable ones: {id: reason}.

    Arguments
    ---------
    store : Store
    encoder : accent_plugin.encoder.base.InvariantEncoder
        The encoder that the store was created for.
    clips : sequence of accent_plugin.data.manifests.Clip
    load : callable
        (clips) -> loader of whole clips, in any order.
    device, progress
        As in `encode`.
    """
    keys = {clip.id: key(clip) for clip in clips}
    if all(one in store for one in keys.values()):
        return {}
    lost, precision = {}, store.identity["precision"]
    with store.adding() as add:
        # Another process may have added clips while this one waited for the lock.
        missing = [clip for clip in clips if keys[clip.id] not in store]
        logger.info("computing the features of %d of %d clips in %s", len(missing), len(clips), store.folder)
        every_state = store.identity["states"] == "all"
        for batch, pooled_states in (
            encode(encoder, load(missing), device, precision, every_state, progress) if missing else ()
        ):
            lost |= dict(batch.lost)
            if len(batch):
                add([keys[name] for name in batch.ids], pooled_states)
    return lost


def fill_store(folder, encoder, clips, options, device="cpu", precision="fp32", every_state=False):
    """Open the store of an encoder, and let the first process add the clips that it lacks.

    Arguments
    ---------
    folder : str or Path
        Folder of all stores.
    encoder, device, precision, every_state
        As in `encode`.
    clips : sequence of accent_plugin.data.manifests.Clip
    options : accent_plugin.training.loaders.LoadingOptions

    Returns
    -------
    Store
    dict
        Id of an unreadable clip -> reason.
    """
    identity = identify(encoder, precision, every_state)

    def load(clips):
        # All of them in this process, whoever else trains.
        missing = ClipDataset(clips, options.accents)
        sampler = BucketBatchSampler(missing.seconds(), evaluation_batch_seconds(options), shuffle=False)
        return make_loader_of(missing, sampler, options)

    lost = distributed.broadcast_from_main(lambda: fill(Store(folder, identity), encoder, clips, load, device))
    return Store(folder, identity), lost


def cached(loader, folder, encoder, options, device="cpu", precision="fp32"):
    """Make a loader of the same batches with `Batch.pooled_states` instead of audio; arguments as in `fill_store`."""
    store, lost = fill_store(folder, encoder, loader.dataset.clips, options, device, precision)
    return make_loader(PooledStatesDataset(loader.dataset, store, lost), loader.batch_sampler, collate_fn=collate)


class PooledStatesDataset(ClipDataset):
    """Clips by (index, epoch), with their cached features instead of audio.

    Arguments
    ---------
    dataset : ClipDataset
        Source of the clips, classes and seed.
    store : Store
    lost : dict
        Id of an unreadable clip -> reason.
    """

    def __init__(self, dataset, store, lost):
        super().__init__(dataset.clips, list(dataset.accents), seed=dataset.seed)
        self.store, self.lost = store, lost
        self._rows = np.array([-1 if clip.id in lost else store.row(key(clip)) for clip in self.clips])

    def __getitem__(self, item):
        clip, row = self.clips[item[0]], self._rows[item[0]]
        if row < 0:
            return Lost(clip.id, self.lost[clip.id])
        return clip.id, self.store[row], self.label(clip)


def collate(items):
    """Stack a list of (id, pooled_states, label), or `Lost` for unreadable clips, to a `Batch` without audio."""
    items, lost = split_lost(items)
    nothing = torch.zeros(len(items), 0)
    if not items:
        return Batch((), nothing, None, torch.zeros(0, dtype=torch.int64), lost)
    ids, pooled_states, labels = zip(*items, strict=True)
    return Batch(ids, nothing, None, torch.tensor(labels), lost, torch.from_numpy(np.stack(pooled_states)))
