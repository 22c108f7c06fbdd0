"""Confound test: whether the recording conditions alone predict the accent.

If each accent was recorded with different equipment, a classifier can learn the microphone instead of the accent. Seven
features that contain no speech are measured, and a permutation test shows whether they predict the accent. It takes
into account that clips of one speaker are alike.

Example
-------
>>> rate = 16_000
>>> sine = 0.5 * np.sin(2 * np.pi * 1_000 * np.arange(rate) / rate)
>>> found = recording_features(np.concatenate([np.zeros(rate), sine]), rate, "WAV PCM_16")
>>> found.duration, found.leading_silence, round(found.loudness, 1), round(found.noise_floor)
(2.0, 1.0, -12.0, -120)
"""

import dataclasses
import warnings
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from accent_plugin.errors import ConfigError

# Name of a feature -> its unit, in the order of all tables and figures.
UNITS = {
    "sample_rate": "Hz",
    "codec": "",
    "band_edge": "Hz",
    "loudness": "dBFS",
    "noise_floor": "dBFS",
    "duration": "s",
    "leading_silence": "s",
}


KINDS = ("sample_rate", "codec")  # categorical features


FOLDS = 5


CLIPS_PER_CLIENT = 10


MOST_CLIPS = 4_000


MOST_ACCENTS = 20


ALPHA = 0.01  # a p below this is a finding


FEWEST_PERMUTATIONS = 100  # fewer cannot give a p below ALPHA


SILENCE = -120.0  # dBFS; digital silence would be minus infinity


_FRAME = 0.025  # seconds


_QUIET = 10  # percentile of the frame levels that is the noise floor


_LOUD = 95  # percentile of the frame levels that is the speech level


_ONSET = 30.0  # dB below the speech level; silence ends above it


_EDGE = 60.0  # dB below the peak of the spectrum; the band ends there


_BIN = 32.0  # Hz; maximum width of the bins of the spectrum


_BLOCK = 1 << 20  # samples transformed at a time


_MOST_VALUES = 10  # codecs or rates with a column of their own; the rarer ones have none


@dataclass(frozen=True, order=True)
class RecordingFeatures:
    """Recording conditions of one clip.

    Arguments
    ---------
    sample_rate : int
        Sample rate of the file in Hz, before resampling.
    codec : str
        Format and coding of the file, as ``accent_plugin.audio.codecs.DecodedAudio`` names them.
    band_edge : float
        Highest frequency in Hz at which the power spectrum, averaged over the clip in bins of at most 32 Hz, is within
        60 dB of its peak; 0 for silence. The Blackman window widens a sharp edge by up to 128 Hz.
    loudness : float
        Root mean square of the clip after removing its mean, in dBFS: a full-scale sine has -3.0, silence -120.
    noise_floor : float
        10th percentile of the levels (computed as for loudness) of the clip's complete frames of 25 ms, in dBFS.
    duration : float
        In seconds.
    leading_silence : float
        Seconds before the first frame of 25 ms with a level above the 95th percentile of the levels minus 30 dB.
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
    """Result of the confound test.

    Arguments
    ---------
    possible : bool
        Whether there were enough data for the test.
    reason : str
        Why the test was not possible; "" if it was.
    uar : float or None
        Out-of-fold unweighted average recall of the accents.
    chance : float or None
        Mean of the same over the permutations.
    p : float or None
        Fraction of the permutations, including the observation itself, with at least the same recall.
    permuted : tuple of float
        Unweighted average recall of each permutation.
    by_feature : dict
        Name of a feature -> out-of-fold unweighted average recall with this feature only.
    accents : tuple of str
        Accents in the test; accents with fewer than 5 speakers are excluded.
    clips, clients : int
        Numbers of clips and speakers in the test.
    by_client : bool
        False if no clip has a client id, so that each clip counts as a speaker and p is too small.
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
        """Whether the recording conditions predict the accent better than chance."""
        return self.p is not None and self.p < ALPHA


def recording_features(samples, sample_rate, codec):
    """Measure one clip.

    Arguments
    ---------
    samples : (samples,) np.ndarray
        Finite, mono, with full scale 1, at least one sample.
    sample_rate : int
        In Hz.
    codec : str

    Returns
    -------
    RecordingFeatures
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
    # Rounding leaves a little power in silence.
    if power.max() <= len(frames) * size * 10 ** (SILENCE / 10):
        return 0.0
    return float(np.flatnonzero(power >= power.max() * 10 ** (-_EDGE / 10))[-1] * sample_rate / size)


def draw(accents, clients, ranks, *, seed):
    """Choose clips for the test: at most 10 of each speaker, and complete speakers up to 4,000 clips.

    Speakers are taken from all accents in turn, so that rare accents are represented. Speakers with several accents are
    excluded, as are accents with fewer than 5 speakers and all but the 20 accents with the most speakers.

    Arguments
    ---------
    accents : (clips,) np.ndarray of int
        Code of each clip's accent, negative if it has none.
    clients : (clips,) np.ndarray of int
        Code of each clip's speaker, negative if unknown: such a clip counts as a speaker of its own.
    ranks : (clips,) np.ndarray of uint64
        A pseudo-random number for each clip that does not depend on the order of the clips.
    seed : int

    Returns
    -------
    (drawn,) np.ndarray of int
        Indices of the drawn clips, ascending.
    """
    accents, clients = np.asarray(accents, dtype=np.int64), np.asarray(clients, dtype=np.int64)
    ranks = np.asarray(ranks, dtype=np.uint64)
    unknown = clients < 0
    clients = np.where(unknown, clients.max(initial=0) + 1 + np.cumsum(unknown), clients)
    rows = np.flatnonzero(accents >= 0)
    pairs = np.unique(np.stack([clients[rows], accents[rows]], axis=1), axis=0)
    twice, times = np.unique(pairs[:, 0], return_counts=True)
    rows = rows[~np.isin(clients[rows], twice[times > 1])]
    # Speakers in the order of their lowest rank, then shuffled: speakers with many clips have low ranks.
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
    """Number of equal elements before each element; ``groups`` is sorted."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]]) if len(groups) else np.zeros(0, np.int64)
    return np.arange(len(groups)) - np.repeat(starts, np.diff(np.r_[starts, len(groups)]))


def run_confound_test(features, accents, clients=None, *, seed, permutations=199, progress=False):
    """Test whether the features predict the accents of unseen speakers.

    A multinomial logistic regression with balanced class weights is cross-validated in five folds, with the speakers of
    each accent spread over the folds. Its unweighted average recall is compared with that after permuting the accents
    of the speakers, with new folds. If the accents are independent of the recordings, all permutations are equally
    likely, so that p is exact, however alike the clips of one speaker are (Phipson and Smyth, 2010). Band edge and
    duration enter as logarithms, sample rate and codec one-hot encoded.

    Arguments
    ---------
    features : sequence of RecordingFeatures
    accents : sequence of str
    clients : sequence of str, optional
        Speakers, "" if unknown: such a clip counts as a speaker of its own. Speakers with several accents are excluded.
    seed : int
        Seed of folds and permutations, which do not depend on the order of the clips.
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
        When ``permutations`` is too small for a p below ``ALPHA``.
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
        # Ties are sorted by name, because the order of sets differs between processes.
        most = sorted(count.items(), key=lambda item: (-item[1], item[0]))[:5]
        has = ", ".join(f"{accent} {n}" for accent, n in most) or "none"
        return Confound(False, f"2 accents need {FOLDS} speakers or more, but the speakers are: {has}")

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

    permuted_accents = (generator.permutation(accent_of) for _ in range(permutations))
    bar = tqdm(permuted_accents, total=permutations, desc="permuting accents", unit="permutation", disable=not progress)
    permuted = tuple(_score(everything, unit, accents, order, len(names)) for accents in bar)
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
    """Raise a `ConfigError` if so few permutations cannot give a p below ``ALPHA``."""
    if permutations < FEWEST_PERMUTATIONS:
        raise ConfigError(
            f"permutations is {permutations}: give {FEWEST_PERMUTATIONS} or more, as fewer cannot give p < {ALPHA:g}"
        )


def _columns(rows):
    """Name of a feature -> (clips, columns) np.ndarray, without columns if all clips have the same value."""
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
    # Clipped, as outliers would dominate the regression.
    return np.clip((values - values.mean()) / spread, -4, 4)[:, None] if spread > 1e-6 else np.zeros((len(values), 0))


def _score(columns, unit, accent_of, order, classes):
    """Out-of-fold unweighted average recall; the speakers of each accent are spread over the folds in ``order``."""
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
    """Convert a `Confound` to plain values."""
    return dataclasses.asdict(confound) | {"found": confound.found}
