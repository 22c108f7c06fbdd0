"""Small DatasetDicts with noise in them, and the real data beside the checkout where it is there."""

import io

import numpy as np
import soundfile

from helpers import shared


def shared_data(name):
    """A folder of real data; skips the test where it is absent."""
    return shared("data", name)


def noise(seconds=1.5, rate=16_000, channels=None, seed=0):
    shape = int(seconds * rate) if channels is None else (int(seconds * rate), channels)
    return (0.1 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def encode(samples, rate=16_000, format="FLAC", subtype=None):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def rows(accent, clients, clips=2, sentences=True, first=0, **cells):
    """``clients`` clients of an accent with ``clips`` clips each, every clip with noise and a sentence of its own."""
    made = []
    for client in range(first, first + clients):
        for clip in range(clips):
            name = f"{accent}-{client}-{clip}"
            sound = encode(noise(1.2, seed=sum(name.encode()) + 1000 * client + clip))
            row = {
                "client_id": f"{accent}-{client}",
                "path": f"{name}.flac",
                "sentence": f"Sentence {name}." if sentences else "",
                "accent": accent,
                "gender": "female" if client % 2 else "",
                "age": "twenties",
                "audio": {"bytes": sound, "path": f"{name}.flac"},
            }
            made.append(row | cells)
    return made


def dataset(table, types=None, without=()):
    """A Dataset of rows; ``types`` replaces the type of some columns."""
    from datasets import Audio, Dataset, Features, Value

    types = types or {}
    names = [name for name in table[0] if name not in without]
    sound = {"bytes": Value("binary"), "path": Value("string")}
    features = Features({n: types.get(n, sound if n == "audio" else Value("string")) for n in names})
    made = Dataset.from_dict({n: [row[n] for row in table] for n in names}, features=features)
    return made.cast_column("audio", Audio()) if "audio" in names and "audio" not in types else made


def save(folder, types=None, without=(), **tables):
    """A DatasetDict on disk, one table of rows per split."""
    from datasets import DatasetDict

    made = {split: dataset(table, types, without) for split, table in tables.items()}
    DatasetDict(made).save_to_disk(str(folder))
    return folder


def three_splits(accents=("us", "england"), clients=(4, 1, 2), clips=2, **cells):
    """train, validation and test rows without a shared client."""
    tables, first = {}, 0
    for split, count in zip(("train", "validation", "test"), clients, strict=True):
        tables[split] = [row for accent in accents for row in rows(accent, count, clips, first=first, **cells)]
        first += count
    return tables
