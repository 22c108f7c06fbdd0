"""Pooled states of a frozen encoder: computed once for each clip, kept on disk, and a head trains without the encoder.

A store is a folder with `features.json` (which encoder, in which precision), `index.csv` (a line for each clip: CRC-32
of its values, then its key) and `means.f32` (the values of those clips, one after the other, little-endian float32).
Clips are only added; a process that is killed leaves a store that the next one goes on with. The key of a clip is its
id, its length and the size of its file; the folder's name stands for the encoder's weights, so that features of other
weights or other audio are never taken for these.
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
from accent_plugin.training.batches import Batch, ClipDataset, Lost

logger = logging.getLogger(__name__)


FEATURES_FILE, INDEX_FILE, VALUES_FILE = "features.json", "index.csv", "means.f32"


# Of the folder's content; another number is another meaning.
_FORMAT = 1


_KIND = np.dtype("<f4")


_OUT = "choose another features_folder, or delete that one: features can always be computed again"


def identify(encoder, precision, every_state=False):
    """What decides about the features of a clip.

    Arguments
    ---------
    encoder : accent_plugin.encoder.base.InvariantEncoder
    precision : str
        "fp32", "bf16" or "fp16", in which the encoder runs.
    every_state : bool
        Whether all hidden states are kept, or those that the encoder's forward pass uses.

    Returns
    -------
    dict
        Plain values of JSON.
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
        Over a `ClipDataset` without crops or augmentation.
    device : str or torch.device
    precision : str
    every_state : bool
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
            # Within the loop: whoever asks for the next batch may have left these modes on or off.
            autocast = torch.autocast(torch.device(device).type, kind, enabled=kind is not None)
            with devices.exact_fp32(), torch.inference_mode(), autocast:
                there = batch.to(device)
                states, valid = (encoder.hidden_states if every_state else encoder.used_states)(
                    there.wavs, there.wav_lens
                )
                pooled_states = torch.stack([pooling(state, valid) for state in states], dim=1).cpu().numpy()
        else:
            pooled_states = np.zeros((0, 0, 0), dtype=np.float32)
        yield batch, pooled_states


class Store:
    """Features of clips on disk.

    Arguments
    ---------
    folder : str or Path
        Holds a folder for each encoder and precision.
    identity : dict
        Of `identify`.

    Raises
    ------
    FeatureError
        If what lies there belongs to another encoder or is damaged as a whole. Damaged values of a clip are computed
        again.
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
                    raise FeatureError(f"{self.folder} has no {FEATURES_FILE} that says whose they are\n{_OUT}")
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
            raise FeatureError(f"{path} is damaged ({error})\n{_OUT}") from None
        if differing:
            raise FeatureError(f"{self.folder} holds features of another encoder: {', '.join(differing)}\n{_OUT}")

    def _read(self):
        """Take the lines of the index whose values are there; what was added last may be cut off."""
        self._rows, self._sums, self._values = {}, [], None
        path = self.folder / INDEX_FILE
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        self._shape, lines = None, text.splitlines(keepends=True)
        if lines and lines[0].endswith("\n"):
            with contextlib.suppress(ValueError):
                self._shape = tuple(int(number) for number in lines[0].split(","))
            if self._shape is None or len(self._shape) != 2:
                raise FeatureError(f"{path} is damaged: its first line is no shape\n{_OUT}")
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
            logger.warning("%s: the features of %d clips are damaged and computed again", self.folder, len(damaged))

    def _row_bytes(self):
        return self._shape[0] * self._shape[1] * _KIND.itemsize

    def __contains__(self, key):
        return key in self._rows

    def row(self, key):
        """Where the features of a clip's key are."""
        return self._rows[key]

    def __getitem__(self, row):
        """(states, features) np.ndarray of float32."""
        return np.array(self._values[row])

    @contextlib.contextmanager
    def adding(self):
        """A function (keys, pooled_states) that adds clips, for as long as this process has the folder to itself.

        What another process has added meanwhile is taken over first.
        """
        with files.writable_folder(self.folder, "features_folder"), files.lock(self.folder):
            self._read()
            with open(self.folder / VALUES_FILE, "ab") as values, open(self.folder / INDEX_FILE, "a+b") as index:
                if self._shape is not None:
                    # After a kill, what is not in the index, and a line that has no end.
                    values.truncate(len(self._sums) * self._row_bytes())
                    index.truncate(_length_of_lines(index, len(self._sums) + 1))
                else:
                    values.truncate(0)
                    index.truncate(0)

                def add(keys, pooled_states):
                    if self._shape is None:
                        self._shape = pooled_states.shape[1:]
                        index.write(f"{self._shape[0]},{self._shape[1]}\n".encode())
                    rows = np.ascontiguousarray(pooled_states, dtype=_KIND)
                    # The values first: a line of the index promises that they are there.
                    values.write(rows.tobytes())
                    values.flush()
                    sums = [zlib.crc32(row) for row in rows]
                    index.write("".join(f"{total},{key}\n" for total, key in zip(sums, keys, strict=True)).encode())
                    index.flush()

                yield add
            self._read()


def _length_of_lines(file, count):
    """Bytes of a file's first lines."""
    file.seek(0)
    return sum(len(file.readline()) for _ in range(count))


def key(clip):
    """What says whether a clip's features are its own: an `accent_plugin.data.manifests.Clip` -> str."""
    try:
        size = os.stat(clip.wav).st_size
    except OSError:
        # It will be lost when it is read.
        size = -1
    return f"{size},{clip.duration:.6f},{clip.id}"


def fill(store, encoder, clips, load, device="cpu", progress=True):
    """Add the clips that a store lacks.

    Arguments
    ---------
    store : Store
    encoder : accent_plugin.encoder.base.InvariantEncoder
        The one that the store was made for.
    clips : sequence of accent_plugin.data.manifests.Clip
    load : callable
        (clips) -> loader of them, whole and in any order.
    device : str or torch.device
    progress : bool

    Returns
    -------
    dict
        Id of a clip that cannot be read -> why.
    """
    keys = {clip.id: key(clip) for clip in clips}
    if all(one in store for one in keys.values()):
        return {}
    lost, precision = {}, store.identity["precision"]
    with store.adding() as add:
        # Another process may have been at them while this one waited.
        missing = [clip for clip in clips if keys[clip.id] not in store]
        logger.info("features of %d of %d clips are computed, into %s", len(missing), len(clips), store.folder)
        every_state = store.identity["states"] == "all"
        for batch, pooled_states in (
            encode(encoder, load(missing), device, precision, every_state, progress) if missing else ()
        ):
            lost |= dict(batch.lost)
            if len(batch):
                add([keys[name] for name in batch.ids], pooled_states)
    return lost


class PooledStatesDataset(ClipDataset):
    """Clips by (index, epoch), as their features instead of their audio.

    Arguments
    ---------
    dataset : ClipDataset
        Whose clips, classes and seed are taken.
    store : Store
    lost : dict
        Id of a clip that cannot be read -> why.
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
    """Stack a list of (id, pooled_states, label), and of what was `Lost`, to a `Batch` without audio."""
    lost = tuple((item.id, item.why) for item in items if isinstance(item, Lost))
    items = [item for item in items if not isinstance(item, Lost)]
    nothing = torch.zeros(len(items), 0)
    if not items:
        return Batch((), nothing, None, torch.zeros(0, dtype=torch.int64), lost)
    ids, pooled_states, labels = zip(*items, strict=True)
    return Batch(ids, nothing, None, torch.tensor(labels), lost, torch.from_numpy(np.stack(pooled_states)))
