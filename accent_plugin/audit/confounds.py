"""What a recording says besides the voice, and whether that alone gives the accent away.

Where each accent was recorded with equipment of its own, accents can be told apart without listening to anybody: the
classifier learns the microphone. Seven features that hold no speech are measured, and put to a test that allows for
clips of one client being alike.

Example
-------
>>> rate = 16_000
>>> sine = 0.5 * np.sin(2 * np.pi * 1_000 * np.arange(rate) / rate)
>>> found = features(np.concatenate([np.zeros(rate), sine]), rate, "WAV PCM_16")
>>> found.duration, found.leading_silence, round(found.loudness, 1), round(found.noise_floor)
(2.0, 1.0, -12.0, -120)
"""

import dataclasses
import warnings
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from accent_plugin.errors import ConfigError

# Name of a feature -> its unit, in the order of every table and picture.
UNITS = {
    "sample_rate": "Hz",
    "codec": "",
    "band_edge": "Hz",
    "loudness": "dBFS",
    "noise_floor": "dBFS",
    "duration": "s",
    "leading_silence": "s",
}


KINDS = ("sample_rate", "codec")  # told apart by value; the others are measured


FOLDS = 5


CLIPS_PER_CLIENT = 10


MOST_CLIPS = 4_000


MOST_ACCENTS = 20


ALPHA = 0.01  # p below it is a finding


FEWEST_PERMUTATIONS = 100  # fewer cannot give a p below ALPHA


SILENCE = -120.0  # dBFS; digital silence would be minus infinity


_FRAME = 0.025  # seconds


_QUIET = 10  # percentile of the frames' levels that is the noise floor


_LOUD = 95  # percentile that is the level of speech


_ONSET = 30.0  # dB below the level of speech, where silence ends


_EDGE = 60.0  # dB below the peak of the spectrum, where the band ends


_BIN = 32.0  # Hz; bins of the spectrum are this wide at most


_BLOCK = 1 << 20  # samples transformed at once


_MOST_VALUES = 10  # columns for one codec or rate each; rarer ones share one


@dataclass(frozen=True, order=True)
class RecordingFeatures:
    """What is measured on one clip besides its speech.

    Arguments
    ---------
    sample_rate : int
        Of the file, before any resampling, in Hz.
    codec : str
        Format and coding of the file, as ``accent_plugin.audio.codecs.DecodedAudio`` names them.
    band_edge : float
        Highest frequency, in Hz, at which the power spectrum, averaged over the clip in bins of at most 32 Hz, lies
        within 60 dB of its peak; 0 for silence. The spectrum's window (Blackman) widens a sharp edge by up to 128 Hz.
    loudness : float
        Root mean square of the clip without its constant offset, in dBFS: a sine of full scale has -3.0, silence -120.
    noise_floor : float
        10th percentile of the levels (as for loudness) of the clip's whole frames of 25 ms, in dBFS.
    duration : float
        In s.
    leading_silence : float
        Time before the first frame of 25 ms whose level is above the 95th percentile of the levels less 30 dB, in s.
    """

    sample_rate: int
    codec: str
    band_edge: float
    loudness: float
    noise_floor: float
    duration: float
    leading_silence: float


@dataclass(frozen=True)
class Confound:
    """Whether the features alone tell the accents apart.

    Arguments
    ---------
    possible : bool
        Whether there was enough to test.
    reason : str
        Why not; "" where it was.
    uar : float or None
        Unweighted average recall of the accents, out of fold.
    chance : float or None
        Mean of the same over the permutations.
    p : float or None
        Share of the permutations, and of the observation itself, that do at least as well.
    permuted : tuple of float
        Unweighted average recall of each permutation.
    by_feature : dict
        Name of a feature -> out-of-fold unweighted average recall of it alone.
    accents : tuple of str
        Accents that were told apart; those with fewer than 5 clients are left out.
    clips, clients : int
        That went into the test.
    by_client : bool
        False where no clip has a client id, so that each stands for itself and p is too small.
    """

    possible: bool
    reason: str = ""
    uar: float | None = None
    chance: float | None = None
    p: float | None = None
    permuted: tuple[float, ...] = ()
    by_feature: dict = field(default_factory=dict)
    accents: tuple[str, ...] = ()
    clips: int = 0
    clients: int = 0
    by_client: bool = True

    @property
    def found(self):
        """Whether the accents are told apart beyond chance."""
        return self.p is not None and self.p < ALPHA


def recording_features(samples, sample_rate, codec):
    """Measure one clip.

    Arguments
    ---------
    samples : (samples,) np.ndarray
        Finite, mono, full scale at 1, at least one.
    sample_rate : int
        In Hz.
    codec : str

    Returns
    -------
    Features
    """
    samples = np.asarray(samples)
    samples = samples - samples.mean(dtype=np.float64).astype(np.float32)
    length = max(1, min(round(_FRAME * sample_rate), len(samples)))
    frames = samples[: len(samples) // length * length].reshape(-1, length)
    levels = _level(np.einsum("ij,ij->i", frames, frames, dtype=np.float64) / length)
    onset = int(np.argmax(levels > np.percentile(levels, _LOUD) - _ONSET))
    return RecordingFeatures(
        sample_rate=int(sample_rate),
        codec=codec,
        band_edge=_band_edge(samples, sample_rate),
        loudness=float(_level(np.dot(samples, samples.astype(np.float64)) / len(samples))),
        noise_floor=float(np.percentile(levels, _QUIET)),
        duration=len(samples) / sample_rate,
        leading_silence=onset * length / sample_rate,
    )


def _level(power):
    return np.maximum(10 * np.log10(np.maximum(power, 1e-30)), SILENCE)


def _band_edge(samples, sample_rate):
    size = 1 << max(4, int(np.ceil(np.log2(sample_rate / _BIN))))
    window = np.blackman(min(size, len(samples)) + 2)[1:-1].astype(np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(samples, len(window))[:: max(1, len(window) // 2)]
    power = np.zeros(size // 2 + 1)
    for start in range(0, len(frames), step := max(1, _BLOCK // size)):
        power += (np.abs(np.fft.rfft(frames[start : start + step] * window, size)) ** 2).sum(axis=0)
    # Rounding leaves a little power where there is none.
    if power.max() <= len(frames) * size * 10 ** (SILENCE / 10):
        return 0.0
    return float(np.flatnonzero(power >= power.max() * 10 ** (-_EDGE / 10))[-1] * sample_rate / size)


def draw(accents, clients, ranks, *, seed):
    """Choose clips for the test: at most 10 of each client, and whole clients until there are 4,000 clips.

    Clients are taken in turns from every accent, so that a rare accent is not drowned. Clients with several accents are
    left out, and so are accents with fewer than 5 clients and all but the 20 accents with the most clients.

    Arguments
    ---------
    accents : (clips,) np.ndarray of int
        Code of each clip's accent, below 0 where it has none.
    clients : (clips,) np.ndarray of int
        Code of each clip's client, below 0 where it is unknown: such a clip is a client of its own.
    ranks : (clips,) np.ndarray of uint64
        A pseudo-random number for each clip that does not depend on the order of the clips.
    seed : int

    Returns
    -------
    (drawn,) np.ndarray of int
        Places of the drawn clips, ascending.
    """
    accents, clients = np.asarray(accents, dtype=np.int64), np.asarray(clients, dtype=np.int64)
    ranks = np.asarray(ranks, dtype=np.uint64)
    unknown = clients < 0
    clients = np.where(unknown, clients.max(initial=0) + 1 + np.cumsum(unknown), clients)
    rows = np.flatnonzero(accents >= 0)
    pairs = np.unique(np.stack([clients[rows], accents[rows]], axis=1), axis=0)
    twice, times = np.unique(pairs[:, 0], return_counts=True)
    rows = rows[~np.isin(clients[rows], twice[times > 1])]
    # Clients in the order of their lowest rank, then shuffled: those with many clips have low ones.
    rows = rows[np.argsort(ranks[rows], kind="stable")]
    _, first, unit = np.unique(clients[rows], return_index=True, return_inverse=True)
    place = np.empty(len(first), np.int64)
    place[np.argsort(first)] = np.random.default_rng(seed).permutation(len(first))
    by_unit = np.argsort(unit, kind="stable")
    kept = np.zeros(len(rows), bool)
    kept[by_unit[_turns(unit[by_unit]) < CLIPS_PER_CLIENT]] = True

    accent_of = accents[rows[first]]
    names, count = np.unique(accent_of, return_counts=True)
    large = names[np.argsort(-count, kind="stable")][:MOST_ACCENTS]
    large = large[np.isin(large, names[count >= FOLDS])]
    order = np.lexsort((place, accent_of))
    turn = np.empty(len(order), np.int64)
    turn[order] = _turns(accent_of[order])
    order = np.lexsort((accent_of, turn))
    order = order[np.isin(accent_of[order], large)]
    sizes = np.bincount(unit[kept], minlength=len(first))
    chosen = order[np.cumsum(sizes[order]) <= MOST_CLIPS]
    return np.sort(rows[kept & np.isin(unit, chosen)])


def _turns(groups):
    """How many equal ones stand before each element; ``groups`` is sorted."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]]) if len(groups) else np.zeros(0, np.int64)
    return np.arange(len(groups)) - np.repeat(starts, np.diff(np.r_[starts, len(groups)]))


def run_confound_test(features, accents, clients=None, *, seed, permutations=199, progress=False):
    """Test whether the features alone tell the accents apart, in clients that were not learned from.

    A multinomial logistic regression (accents weighted to count the same) is trained on four fifths of the clients of
    each accent and answers for the others, five times. The unweighted average recall of all answers is compared with
    that of accents that are dealt anew to the clients, folds included: under the null hypothesis that accents have
    nothing to do with the recordings every deal is as likely, so that p is exact, whatever clips of one client share
    (Phipson and Smyth, 2010). Band edge and duration enter as logarithms, rate and codec as a column for each value.

    Arguments
    ---------
    features : sequence of Features
    accents : sequence of str
    clients : sequence of str, optional
        "" where unknown: such a clip is a client of its own. Clients with several accents are left out.
    seed : int
        Decides folds and permutations; the order of the clips does not.
    permutations : int
        100 or more.
    progress : bool
        Whether to draw a progress bar on stderr.

    Returns
    -------
    Confound

    Raises
    ------
    ConfigError
        When ``permutations`` cannot show anything.
    """
    require_permutations(permutations)
    clients = [""] * len(accents) if clients is None else list(clients)
    accents_of = {}
    for accent, client in zip(accents, clients, strict=True):
        accents_of.setdefault(client, set()).add(accent)
    rows = sorted(
        row for row in zip(clients, accents, features, strict=True) if not row[0] or len(accents_of[row[0]]) < 2
    )
    units = [client or (place,) for place, (client, _, _) in enumerate(rows)]
    count = Counter(accent for _, accent in {(unit, row[1]) for unit, row in zip(units, rows, strict=True)})
    names = sorted(accent for accent in count if count[accent] >= FOLDS)
    if len(names) < 2:
        # By name among equals: sets have another order in each process.
        most = sorted(count.items(), key=lambda item: (-item[1], item[0]))[:5]
        has = ", ".join(f"{accent} {n}" for accent, n in most) or "none"
        return Confound(False, f"2 accents with {FOLDS} clients or more are needed; clients are: {has}")

    members = [(unit, row) for unit, row in zip(units, rows, strict=True) if row[1] in names]
    index = {unit: place for place, unit in enumerate(dict.fromkeys(unit for unit, _ in members))}
    unit = np.array([index[name] for name, _ in members])
    accent_of = np.empty(len(index), np.int64)
    accent_of[unit] = [names.index(row[1]) for _, row in members]
    columns = _columns([row[2] for _, row in members])
    everything = np.concatenate(list(columns.values()), axis=1)

    generator = np.random.default_rng(seed)
    order = generator.permutation(len(index))
    uar = _score(everything, unit, accent_of, order, len(names))
    by_feature = {name: _score(part, unit, accent_of, order, len(names)) for name, part in columns.items()}
    from tqdm import tqdm

    deals = (generator.permutation(accent_of) for _ in range(permutations))
    bar = tqdm(deals, total=permutations, desc="permuting accents", unit="permutation", disable=not progress)
    permuted = tuple(_score(everything, unit, deal, order, len(names)) for deal in bar)
    better = sum(score >= uar - 1e-9 for score in permuted)
    return Confound(
        possible=True,
        uar=uar,
        chance=float(np.mean(permuted)),
        p=(1 + better) / (1 + permutations),
        permuted=permuted,
        by_feature=by_feature,
        accents=tuple(names),
        clips=len(members),
        clients=len(index),
        by_client=any(clients),
    )


def require_permutations(permutations):
    """Refuse a number of permutations that no p below ``ALPHA`` can come from."""
    if permutations < FEWEST_PERMUTATIONS:
        raise ConfigError(
            f"permutations is {permutations}; give {FEWEST_PERMUTATIONS} or more: fewer cannot show p below {ALPHA:g}"
        )


def _columns(rows):
    """Name of a feature -> (clips, columns) np.ndarray, no column where all clips have the same."""
    return {
        name: (_one_hot if name in KINDS else _standard)(name, [getattr(row, name) for row in rows]) for name in UNITS
    }


def _one_hot(name, values):
    count = Counter(values)
    common = sorted(count, key=lambda value: (-count[value], value))[:_MOST_VALUES]
    if len(count) < 2:
        return np.zeros((len(values), 0))
    return np.array([[value == other for other in common] for value in values], dtype=float)


def _standard(name, values):
    values = np.array(values, dtype=float)
    if name in ("band_edge", "duration"):
        values = np.log2(np.maximum(values, 0.01))
    spread = values.std()
    # Far ones would outweigh all others.
    return np.clip((values - values.mean()) / spread, -4, 4)[:, None] if spread > 1e-6 else np.zeros((len(values), 0))


def _score(columns, unit, accent_of, order, classes):
    """Out-of-fold unweighted average recall; folds deal the clients of each accent in ``order``."""
    if not columns.shape[1]:
        return 1 / classes
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    fold_of = np.empty(len(accent_of), np.int64)
    fold_of[order[np.argsort(accent_of[order], kind="stable")]] = np.arange(len(order)) % FOLDS
    fold, truth = fold_of[unit], accent_of[unit]
    answers = np.empty_like(truth)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for k in range(FOLDS):
            model = LogisticRegression(class_weight="balanced", tol=1e-3, max_iter=200)
            answers[fold == k] = model.fit(columns[fold != k], truth[fold != k]).predict(columns[fold == k])
    return float(np.mean([np.mean(answers[truth == accent] == accent) for accent in range(classes)]))


def as_json(confound):
    """Plain values of a Confound."""
    return dataclasses.asdict(confound) | {"found": confound.found}
