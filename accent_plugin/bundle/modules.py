"""The modules that a bundle's hyperparams.yaml names, for SpeechBrain's inference interface."""

import torch
from safetensors import SafetensorError, safe_open
from speechbrain.utils.checkpoints import mark_as_transfer, register_checkpoint_hooks
from torch import nn

from accent_plugin.audio.changes import change_speed
from accent_plugin.audio.samples import resample
from accent_plugin.bundle.config import CONFIG_FILE
from accent_plugin.errors import BundleError
from accent_plugin.files import require_downloaded
from accent_plugin.model import AccentModel

# Types of a model's tensors, as named by safetensors.
_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}


@register_checkpoint_hooks
class BundledModel(AccentModel):
    """An `AccentModel` that loads exactly the weights of a bundle."""

    @mark_as_transfer
    def load_weights(self, path):
        """Load the weights of a safetensors file with any name; SpeechBrain's Pretrainer calls this method."""
        require_tensors(path, read_tensor_shapes(path), self)
        with torch.no_grad():
            for key, value in self.state_dict().items():
                # Opened once per tensor: mapped pages stay in memory, and all tensors would be in memory twice.
                with safe_open(path, framework="pt") as file:
                    value.copy_(file.get_tensor(key))
                if not torch.isfinite(value).all():
                    raise BundleError(f"{path} has NaN or infinity in {key}: the weights are damaged")


class AsIs(nn.Module):
    """Identity module, because the model itself computes and normalises features and embeddings."""

    def forward(self, features, lengths=None):
        """Return the features."""
        return features


class Embedding(nn.Module):
    """Map waveforms to one vector for each clip and speed, with an `AccentModel`; speed 1 leaves a clip unchanged."""

    def __init__(self, model, speeds=(1.0,)):
        super().__init__()
        self.model, self.speeds = model, tuple(speeds)

    def forward(self, wavs, wav_lens=None):
        """Embed (batch, samples) at 16 kHz; returns (batch, speeds, features)."""
        return torch.stack(
            [self.model.embed(*change_batch_speed(wavs, wav_lens, speed)) for speed in self.speeds], dim=1
        )


class Head(nn.Module):
    """Map the vectors of a clip at several speeds to log-probabilities, averaged over speeds and normalised again."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, embeddings):
        """Classify (batch, speeds, features); returns (batch, 1, classes) log-probabilities in float32."""
        # Always in float32, for accurate probabilities; the cost is negligible.
        with torch.autocast(embeddings.device.type, enabled=False):
            copies = torch.log_softmax(self.model.classifier(embeddings.float()), dim=-1)
        return torch.log_softmax(copies.mean(dim=1, keepdim=True), dim=-1)


class Normalizer:
    """Convert waveforms to mono at 16 kHz, resampled as in training; replaces SpeechBrain's AudioNormalizer."""

    def __call__(self, wav, sample_rate):
        """Convert (samples,) or (samples, channels) torch.Tensor; returns (samples,)."""
        mono = wav if wav.dim() == 1 else wav.mean(dim=1)
        return torch.from_numpy(resample(mono.float().cpu().numpy(), sample_rate)).to(wav.device)


def change_batch_speed(wavs, wav_lens, speed):
    """Change the speed of each clip of a batch separately, so that padding has no effect."""
    if speed == 1:
        return wavs, wav_lens
    lens = torch.ones(len(wavs)) if wav_lens is None else wav_lens
    counts = torch.round(lens.cpu().double() * wavs.shape[1]).long().tolist()
    clips = [
        torch.from_numpy(change_speed(wav[:count].float().cpu().numpy(), speed))
        for wav, count in zip(wavs, counts, strict=True)
    ]
    padded = nn.utils.rnn.pad_sequence(clips, batch_first=True).to(wavs.device)
    lengths = torch.tensor([len(clip) for clip in clips], dtype=torch.double) / padded.shape[1]
    # Apple's GPUs have no float64.
    return padded, (lengths.float() if wavs.device.type == "mps" else lengths).to(wavs.device)


def read_tensor_shapes(path):
    """Read the dtype (as named by safetensors) and the shape of each tensor in a file."""
    require_downloaded(path, BundleError)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} is not in the safetensors format: {error}") from None


def require_tensors(path, found, model):
    """Raise an error if the names, types or shapes of weights differ from those of the model."""
    expected = {key: (_DTYPES[value.dtype], tuple(value.shape)) for key, value in model.state_dict().items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise BundleError(f"{path} lacks {len(missing)} tensors of the model, such as {missing[0]}")
    if extra := sorted(found.keys() - expected.keys()):
        raise BundleError(f"{path} has {len(extra)} tensors that the model does not have, such as {extra[0]!r}")
    for key, (dtype, shape) in expected.items():
        if found[key][1] != shape:
            raise BundleError(f"{path} has {key} of shape {found[key][1]}, but {CONFIG_FILE} describes {shape}")
        if found[key][0] != dtype:
            raise BundleError(f"{path} has {key} as {found[key][0]}, not as {dtype}")
