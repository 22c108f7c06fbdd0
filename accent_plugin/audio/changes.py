"""Changes of a waveform: rooms, noise, codecs, lost packets, speed and formants, for training and for tests.

Each is a function of (samples,) np.ndarray of float32 at 16 kHz that returns a new array, as long as its input except
for `change_speed`. Whatever is random is drawn from a generator that is passed in.
"""

import io
from fractions import Fraction

import numpy as np
import soundfile
import soxr

from accent_plugin.audio import codecs
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.errors import ConfigError

_SILENCE = 1e-8
_TELEPHONE_RATE = 8000
# Seconds of the packets of telephone and internet calls, and how many of them are lost in a row on average.
_PACKET_SECONDS = 0.02
_PACKETS_LOST_IN_A_ROW = 2.0
# Frames of linear prediction: 30 ms every 15 ms. The order is that of Patino et al.
_LPC_FRAME, _LPC_ORDER = 480, 20


def change_speed(samples, factor):
    """Play (samples,) faster by `factor`, which also raises the pitch."""
    return soxr.resample(samples, factor, 1.0, quality="MQ")


def limit_band(samples, edge):
    """Remove frequencies above `edge` hertz from (samples,)."""
    spectrum = np.fft.rfft(samples)
    spectrum[np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE) > edge] = 0
    return np.fft.irfft(spectrum, len(samples))


def add_noise(samples, snr, slope, rng):
    """Add noise to (samples,) at `snr` dB; its amplitude is proportional to frequency to the power of -`slope`."""
    spectrum = np.fft.rfft(rng.standard_normal(len(samples)))
    spectrum[1:] /= np.arange(1, len(spectrum)) ** slope
    return _mix(samples, np.fft.irfft(spectrum, len(samples)), snr)


def add_babble(samples, snr, voices):
    """Add several voices to (samples,), each equally loud, together `snr` dB below it.

    Arguments
    ---------
    samples : (samples,) np.ndarray
    snr : float
        In dB.
    voices : sequence of (samples,) np.ndarray
        Clips of other speakers. A shorter one is repeated, a longer one cut. Without voices nothing is added.

    Returns
    -------
    (samples,) np.ndarray
    """
    babble = np.zeros(len(samples))
    for voice in voices:
        power = _power(voice)
        if power >= _SILENCE:
            babble += np.resize(voice, len(samples)) / np.sqrt(power)
    return _mix(samples, babble, snr)


def reverberate(samples, seconds, direct, rng):
    """Let (samples,) be heard in a room, without its delay: the direct sound, and noise that decays exponentially.

    Arguments
    ---------
    samples : (samples,) np.ndarray
    seconds : float
        Reverberation time: the time in which the sound decays by 60 dB.
    direct : float
        Ratio of the direct sound's energy to that of the reverberation, in dB.
    rng : np.random.Generator

    Returns
    -------
    (samples,) np.ndarray
        With the power of its input.

    Source: Polack, "La transmission de l'énergie sonore dans les salles", 1988.
    """
    length = max(2, round(seconds * SAMPLE_RATE))
    response = rng.standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
    # The first reflection is behind the direct sound by the way to a wall and back: here up to 3.5 m.
    response[: min(length - 1, int(rng.integers(1, SAMPLE_RATE // 100)))] = 0
    response *= np.sqrt(10 ** (-direct / 10) / np.square(response).sum())
    response[0] = 1.0
    size = 1 << (len(samples) + length - 1).bit_length()
    heard = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(response, size), size)[: len(samples)]
    power = _power(heard)
    return heard if power == 0 else heard * np.sqrt(_power(samples) / power)


def change_gain(samples, decibels):
    """Make (samples,) louder; what is beyond full scale is clipped, as by a recorder."""
    return np.clip(samples * 10 ** (decibels / 20), -1, 1)


def clip_peaks(samples, fraction):
    """Clip the loudest `fraction` of (samples,), as an overdriven microphone does."""
    return np.clip(samples, *(np.quantile(np.abs(samples), 1 - fraction) * np.array([-1, 1])))


def lose_packets(samples, fraction, rng):
    """Silence packets of 20 ms in (samples,), `fraction` of them on average, in bursts of two on average.

    Source: Gilbert, "Capacity of a burst-noise channel", 1960.
    """
    size = round(_PACKET_SECONDS * SAMPLE_RATE)
    count = -(-len(samples) // size)
    ends = 1 / _PACKETS_LOST_IN_A_ROW
    begins = min(1.0, ends * fraction / (1 - fraction)) if fraction < 1 else 1.0
    lost, now = np.zeros(count, bool), rng.random() < fraction
    for number, chance in enumerate(rng.random(count)):
        lost[number] = now
        now = chance >= ends if now else chance < begins
    return np.where(np.repeat(lost, size)[: len(samples)], 0, samples)


def mask_time(samples, longest, rng):
    """Silence a segment of (samples,) of at most `longest` samples, and at most half the clip."""
    length = int(rng.integers(0, min(longest, len(samples) // 2) + 1))
    start = int(rng.integers(0, len(samples) - length + 1))
    samples = samples.copy()
    samples[start : start + length] = 0
    return samples


def move_formants(samples, coefficient):
    """Move the formants of (samples,), as if the speaker had another vocal tract, and keep the pitch.

    Linear prediction describes each frame's spectrum by poles. The angle of each complex pole, between 0 and pi, is
    raised to the power of `coefficient`, and the spectrum is multiplied by the ratio of the new envelope to the old.

    Arguments
    ---------
    samples : (samples,) np.ndarray
    coefficient : float
        The McAdams coefficient: below 1 moves formants below 2.5 kHz up and those above down, above 1 the opposite.

    Returns
    -------
    (samples,) np.ndarray

    Source: Patino et al., "Speaker anonymisation using the McAdams coefficient", Interspeech 2021.
    """
    hop, size = _LPC_FRAME // 2, 2 * _LPC_FRAME
    padded = np.pad(samples.astype(np.float64), (hop, _LPC_FRAME))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _LPC_FRAME)[::hop] * np.hanning(_LPC_FRAME + 1)[:-1]
    spectra = np.fft.rfft(frames, size)
    poles = np.linalg.eigvals(_companions(_predictors(spectra, size)))
    angles = np.abs(np.angle(poles))
    # Real poles are no formants.
    moved = np.where((angles > 0) & (angles < np.pi), angles**coefficient, angles)
    ratio = _all_pole(poles, size) / _all_pole(
        np.abs(poles) * np.exp(1j * np.sign(np.angle(poles)) * np.minimum(moved, np.pi)), size
    )
    changed = np.fft.irfft(spectra * ratio, size)
    out = np.zeros(len(padded) + size)
    for number, frame in enumerate(changed):
        out[number * hop : number * hop + size] += frame
    out = out[hop : hop + len(samples)]
    power = _power(out)
    return out if power == 0 else out * np.sqrt(_power(samples) / power)


def _predictors(spectra, size):
    """Coefficients of linear prediction of each frame, (frames, order), by the autocorrelation method."""
    correlation = np.fft.irfft(np.square(np.abs(spectra)), size)[:, : _LPC_ORDER + 1]
    # A little white noise, so that silence and pure tones can be solved.
    correlation[:, 0] = correlation[:, 0] * (1 + 1e-6) + 1e-9
    lags = np.abs(np.subtract.outer(np.arange(_LPC_ORDER), np.arange(_LPC_ORDER)))
    return np.linalg.solve(correlation[:, lags], correlation[:, 1:, None])[..., 0]


def _companions(predictors):
    """Matrices whose eigenvalues are the poles of each frame: (frames, order, order)."""
    matrices = np.zeros((len(predictors), _LPC_ORDER, _LPC_ORDER))
    matrices[:, 0] = predictors
    matrices[:, np.arange(1, _LPC_ORDER), np.arange(_LPC_ORDER - 1)] = 1
    return matrices


def _all_pole(poles, size):
    """Frequency response of the polynomial with the given roots, (frames, size // 2 + 1)."""
    coefficients = np.ones((len(poles), 1), complex)
    for root in poles.T:
        shifted = np.pad(coefficients, ((0, 0), (0, 1)))
        shifted[:, 1:] -= root[:, None] * coefficients
        coefficients = shifted
    return np.fft.rfft(coefficients.real, size)


# Codecs


def _mp3(samples, bitrate=32_000):
    return codecs.encode_mp3(samples, bitrate)


def _opus(samples):
    # libsndfile's levels are not linear in the bitrate; this one gives about 12 kbit/s.
    return _encoded(samples, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=0.98)


def _gsm(samples):
    return _encoded(_at_telephone_rate(samples), _TELEPHONE_RATE, format="WAV", subtype="GSM610")


def _mu_law(samples):
    return _encoded(_at_telephone_rate(samples), _TELEPHONE_RATE, format="WAV", subtype="ULAW")


def _amr(samples):
    import av  # Optional: the extra [media].

    out = io.BytesIO()
    steps = (np.clip(_at_telephone_rate(samples), -1, 1) * 32767).astype(np.int16)
    with av.open(out, "w", format="amr") as container:
        stream = container.add_stream("libopencore_amrnb", rate=_TELEPHONE_RATE, layout="mono", bit_rate=12_200)
        frame = av.AudioFrame.from_ndarray(steps[None], format="s16", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = _TELEPHONE_RATE, Fraction(1, _TELEPHONE_RATE), 0
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return out.getvalue()


# Name -> function of samples that returns an encoded file.
CODECS = {"mp3": _mp3, "opus": _opus, "gsm": _gsm, "mu-law": _mu_law, "amr": _amr}


def require_codec(name):
    """Raise a ConfigError if a codec of `CODECS` needs a package that is not installed."""
    if name == "amr":
        try:
            import av  # noqa: F401
        except ImportError:
            raise ConfigError('the codec amr needs PyAV: pip install "accent_plugin[media]"') from None


def encode_and_decode(samples, codec, *options):
    """Send (samples,) through a codec, as a listener would hear it.

    Arguments
    ---------
    samples : (samples,) np.ndarray
    codec : str
        mp3: 32 kbit/s, or the bitrate in `options`. opus: about 12 kbit/s. At 8 kHz: gsm (13 kbit/s), mu-law (64
        kbit/s) and amr (12.2 kbit/s).

    Returns
    -------
    (samples,) np.ndarray
        The codec's delay stays, 69 ms for MP3, and the end is cut off.
    """
    decoded = codecs.decode(CODECS[codec](samples, *options))
    heard = decoded.samples
    if decoded.sample_rate != SAMPLE_RATE:
        heard = soxr.resample(heard, decoded.sample_rate, SAMPLE_RATE)
    return np.pad(heard[: len(samples)], (0, max(0, len(samples) - len(heard))))


def _at_telephone_rate(samples):
    return soxr.resample(samples.astype(np.float32, copy=False), SAMPLE_RATE, _TELEPHONE_RATE)


def _encoded(samples, rate, **form):
    out = io.BytesIO()
    soundfile.write(out, samples, rate, **form)
    return out.getvalue()


def _power(samples):
    return float(np.mean(np.square(samples, dtype=np.float64)))


def _mix(samples, noise, snr):
    power, noise_power = _power(samples), _power(noise)
    if power < _SILENCE or noise_power == 0:
        return samples
    return samples + noise * np.sqrt(power / noise_power / 10 ** (snr / 10))
