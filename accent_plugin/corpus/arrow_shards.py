"""Write a DatasetDict to disk in shards that are complete or absent, so that an interrupted run can be resumed.

The layout is that of ``DatasetDict.save_to_disk``, for ``datasets.load_from_disk``. That function itself embeds every
file, cannot keep paths, and always starts from the beginning. Memory does not grow with the data.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor

from accent_plugin import files
from accent_plugin.errors import DataError

AUDIO = "audio"
_LISTING = "dataset_dict.json"
_CLIPS_EMBEDDED = 1000
_CLIPS_REFERRED = 100_000


# A record batch is written when it reaches this number of clips or bytes.
_BATCH_CLIPS = 100
_BATCH_BYTES = 1 << 26


def is_finished(folder):
    """Whether ``folder`` holds a complete DatasetDict with all its shards."""
    try:
        listing = json.loads((folder / _LISTING).read_text(encoding="utf-8"))
        for split in listing["splits"]:
            state = json.loads((folder / split / "state.json").read_text(encoding="utf-8"))
            info = json.loads((folder / split / "dataset_info.json").read_text(encoding="utf-8"))
            sizes = [(folder / split / file["filename"]).stat().st_size for file in state["_data_files"]]
            if sum(sizes) != info["dataset_size"]:
                return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def write(folder, parts, columns, record, sound, *, fingerprint, embed=True, workers=1, progress=True):
    """Write splits of rows as a DatasetDict; ``finish`` completes it.

    Arguments
    ---------
    folder : Path
        Exists; finished shards of the same rows are kept.
    parts : dict
        Name of the split -> rows, in the order of writing.
    columns : sequence of str
        Names of the text columns; ``AUDIO`` is added.
    record : callable
        Row -> dictionary of text for ``columns``.
    sound : callable
        Row -> the bytes of its file, or its path (str).
    fingerprint : str
        Of source and arguments; ``datasets`` names its caches after it.
    embed : bool
        Whether to store the bytes of files; False stores their paths.
    workers : int
        Threads, each with one shard at a time.
    progress : bool
        Whether to draw a progress bar on stderr.

    Raises
    ------
    DataError
        When a clip cannot be read.
    OSError
        When a shard cannot be written.
    """
    from datasets import Audio, Features, Value
    from tqdm import tqdm

    features = Features({name: Audio() if name == AUDIO else Value("string") for name in (*columns, AUDIO)})
    jobs = []
    for split, rows in parts.items():
        (folder / split).mkdir(exist_ok=True)
        for leftover in (folder / split).glob(".data-*.tmp"):
            # Of a killed process: the caller holds the folder's lock, so no process is writing it.
            leftover.unlink()
        size = _CLIPS_EMBEDDED if embed else _CLIPS_REFERRED
        names = _names(len(rows), size)
        jobs += [(folder / split / name, rows[i * size : (i + 1) * size]) for i, name in enumerate(names)]
    waiting = [(path, rows) for path, rows in jobs if not path.is_file()]
    bar = tqdm(total=sum(len(rows) for _, rows in jobs), desc="writing", unit="clip", disable=not progress)
    with bar, ThreadPoolExecutor(workers) as pool:
        bar.update(bar.total - sum(len(rows) for _, rows in waiting))
        schema = features.arrow_schema
        tasks = [pool.submit(_write_shard, *job, schema, record, sound, embed, bar.update) for job in waiting]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for split, rows in parts.items():
        _describe(folder / split, split, features, len(rows), _names(len(rows), size), fingerprint)


def finish(folder, parts):
    """Complete what ``write`` has written: from now on ``datasets.load_from_disk`` reads it."""
    with files.atomic_write(folder / _LISTING) as file:
        json.dump({"splits": list(parts)}, file)


def remove(folder):
    """Remove the files that ``write`` has written, and the folders that are then empty."""
    (folder / _LISTING).unlink(missing_ok=True)
    for split in ("train", "validation", "test"):
        for pattern in ("data-*-of-*.arrow", ".data-*.tmp", "state.json", "dataset_info.json"):
            for path in (folder / split).glob(pattern):
                path.unlink()
        if (folder / split).is_dir() and not any((folder / split).iterdir()):
            (folder / split).rmdir()


def _names(clips, size):
    count = max(1, -(-clips // size))
    return [f"data-{number:05d}-of-{count:05d}.arrow" for number in range(count)]


def _write_shard(path, rows, schema, record, sound, embed, done):
    import pyarrow

    with files.atomic_write(path, "wb") as file:
        with pyarrow.ipc.new_stream(file, schema) as stream:
            batch, batch_bytes = [], 0
            for row in rows:
                content = _sound(row, sound(row), embed)
                batch_bytes += len(content["bytes"] or b"")
                batch.append(record(row) | {AUDIO: content})
                if len(batch) == _BATCH_CLIPS or batch_bytes > _BATCH_BYTES:
                    stream.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
                    done(len(batch))
                    batch, batch_bytes = [], 0
            stream.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
            done(len(batch))
        file.flush()
        os.fsync(file.fileno())


def _sound(row, content, embed):
    if isinstance(content, bytes):
        return {"bytes": content, "path": os.path.basename(row.path) or None}
    if not embed:
        return {"bytes": None, "path": content}
    try:
        with open(content, "rb") as file:
            return {"bytes": file.read(), "path": os.path.basename(content)}
    except OSError as error:
        raise DataError(
            f"{content} cannot be read: {error.strerror or error}\n"
            "make it readable and run the same command again, which resumes here\n"
            "(or remove the file: it is then dropped, and copying starts again)"
        ) from None


def _describe(folder, split, features, clips, names, fingerprint):
    from datasets import DatasetInfo

    size = sum((folder / name).stat().st_size for name in names)
    DatasetInfo(features=features, dataset_size=size).write_to_directory(str(folder))
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": f"{fingerprint}-{split}",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    with files.atomic_write(folder / "state.json") as file:
        json.dump(state, file, indent=1)
