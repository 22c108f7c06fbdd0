"""The tiny encoder: small, random, the same for a seed, loaded like any other."""

import torch
from safetensors.torch import load_file

from accent_plugin.encoder.factory import make_encoder
from accent_plugin.encoder.tiny import make_tiny_wav2vec2


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_it_loads_like_any_encoder_and_is_small(tmp_path):
    encoder = make_encoder(str(make_tiny_wav2vec2(tmp_path / "tiny")))
    assert encoder.config.model_type == "wav2vec2" and encoder.config.feat_extract_norm == "group"
    assert sum(parameter.numel() for parameter in encoder.parameters()) < 400_000
    frames, _ = encoder(torch.randn(1, 16000))
    assert frames.shape[1:] == (49, 96)


def test_a_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    one, same, other = (
        weights(make_tiny_wav2vec2(tmp_path / name, seed)) for name, seed in zip("abc", (1, 1, 2), strict=True)
    )
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in one if key.endswith("conv.weight"))


def test_drawing_it_leaves_torchs_random_state_alone(tmp_path):
    state = torch.get_rng_state()
    make_tiny_wav2vec2(tmp_path / "tiny")
    assert torch.equal(state, torch.get_rng_state())


def test_a_second_time_it_does_nothing_and_says_so(tmp_path):
    folder, said = tmp_path / "tiny", []
    make_tiny_wav2vec2(folder, say=said.append)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    make_tiny_wav2vec2(folder, say=said.append)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before and "nothing to do" in said[1]


def test_the_first_filters_are_tones_from_low_to_high(tmp_path):
    filters = weights(make_tiny_wav2vec2(tmp_path / "tiny"))["feature_extractor.conv_layers.0.conv.weight"][:, 0]
    assert torch.allclose(filters.norm(dim=1), torch.ones(len(filters)), atol=1e-5)
    peaks = torch.fft.rfft(filters, 1600).abs().argmax(dim=1) * 10  # hertz
    assert peaks[:8].float().mean() < 500 and peaks[-8:].float().mean() > 5000
