"""Convolutions as matrix products against Hugging Face's own, which run with gradients."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Wav2Vec2Config, Wav2Vec2Model
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2PositionalConvEmbedding

from accent_plugin import devices
from accent_plugin.encoder import convolutions
from accent_plugin.encoder.convolutions import PositionalConvolution, WaveformConvolutions

NORMS = {
    "group": {"feat_extract_norm": "group", "conv_bias": False},
    "group, bias": {"feat_extract_norm": "group", "conv_bias": True},
    "layer": {"feat_extract_norm": "layer", "conv_bias": True},
}


def make(kernels=(10, 3, 3, 2), strides=(5, 2, 2, 2), frozen=True, width=16, **options):
    """Convolutions with random weights, norms included, and a copy of Hugging Face's around the same numbers."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        conv_dim=[width] * len(kernels),
        conv_kernel=kernels,
        conv_stride=strides,
        num_hidden_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=16,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        **options,
    )
    theirs = Wav2Vec2Model(config).feature_extractor.eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ours = WaveformConvolutions(copy.deepcopy(theirs.conv_layers), config).eval()
    return ours.requires_grad_(not frozen), theirs


@pytest.fixture(params=["_convolve", "_convolve_batch"], ids=["cpu", "accelerator"])
def path(request, monkeypatch):
    """The code for CPUs, and the code for all other devices, here on a CPU too; the name of its method."""
    monkeypatch.setattr(devices, "cpu_paths", request.param == "_convolve")
    return request.param


def spied(monkeypatch, path="_convolve"):
    """Count the calls of the method that convolves with matrix products."""
    calls = []
    convolve = getattr(WaveformConvolutions, path)
    monkeypatch.setattr(WaveformConvolutions, path, lambda *arguments: calls.append(1) or convolve(*arguments))
    return calls


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seconds", [0.01, 1.0, 5.3])
def test_products_are_the_convolutions(norm, seconds, monkeypatch, path):
    ours, theirs = make(**NORMS[norm])
    wavs = torch.randn(2, int(seconds * 16_000)) * torch.tensor([[0.01], [30.0]])
    calls = spied(monkeypatch, path)
    with torch.inference_mode():
        torch.testing.assert_close(ours(wavs), theirs(wavs), atol=2e-5, rtol=1e-4)
    assert calls


@settings(deadline=None, max_examples=40)
@given(
    layers=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=2, max_size=4),
    norm=st.sampled_from(sorted(NORMS)),
    samples=st.integers(1, 3000),
    cpu=st.booleans(),
)
def test_any_kernel_and_stride(layers, norm, samples, cpu):
    kernels, strides = zip(*layers, strict=True)
    ours, theirs = make(kernels, strides, **NORMS[norm])
    wavs = torch.randn(1, samples)
    with torch.no_grad():
        try:
            expected = theirs(wavs)
        except (RuntimeError, ValueError):
            # Shorter than a frame, or too short for torch's normalisation.
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(devices, "cpu_paths", cpu)
            torch.testing.assert_close(ours(wavs), expected, atol=1e-4, rtol=1e-3)


def test_blocks_join_without_a_seam(monkeypatch):
    ours, _ = make()
    wavs = torch.randn(1, 30_000)
    with torch.no_grad():
        whole = ours(wavs)
        monkeypatch.setattr(convolutions, "_BLOCK_FRAMES", 7)
        torch.testing.assert_close(ours(wavs), whole)


@pytest.mark.parametrize("norm", NORMS)
def test_padding_has_no_part(norm, path):
    ours, _ = make(**NORMS[norm])
    wavs = torch.randn(2, 4000)
    with torch.no_grad():
        alone = ours(wavs[1:, :1700])
        wavs[1, 1700:] = 99.0
        batch = ours((wavs, torch.tensor([4000, 1700])))
    torch.testing.assert_close(batch[1:, :, : alone.shape[2]], alone)
    assert batch.isfinite().all()


def test_with_gradients_they_are_hugging_faces(monkeypatch, path):
    """The products keep no graph, so training the convolutions has to go another way."""
    ours, theirs = make(frozen=False)
    wavs = torch.randn(1, 2000)
    calls = spied(monkeypatch, path)
    output = ours(wavs)
    output.square().sum().backward()
    assert not calls and all(parameter.grad is not None for parameter in ours.parameters())
    assert torch.equal(output, theirs(wavs))


@pytest.mark.parametrize("frozen", [True, False])
def test_new_weights_are_noticed(frozen, path):
    ours, theirs = make(frozen=frozen)
    wavs = torch.randn(1, 2000)
    with torch.no_grad():
        ours(wavs)
        for parameter in ours.parameters():
            parameter.mul_(1.5)
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(wavs), theirs(wavs), atol=2e-5, rtol=1e-4)


def test_frozen_weights_are_rearranged_once(monkeypatch, path):
    ours, _ = make()
    made, products = [], convolutions._products
    monkeypatch.setattr(convolutions, "_products", lambda conv, kind: made.append(kind) or products(conv, kind))
    with torch.no_grad():
        for _ in range(3):
            ours(torch.randn(2, 2000))
    assert len(made) == 3


def test_a_model_can_be_copied_after_inference(path):
    """Cached kernels are left out, because packed ones cannot be copied."""
    for ours, inputs in ((make()[0], torch.randn(1, 2000)), (make_positional()[0], torch.randn(1, 40, 96))):
        with torch.no_grad():
            expected = ours(inputs)
            assert torch.equal(copy.deepcopy(ours)(inputs), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_bf16_is_near(norm, path):
    ours, theirs = make(**NORMS[norm])
    wavs = torch.randn(1, 16_000)
    with torch.no_grad():
        exact = theirs(wavs)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = ours(wavs)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("asked", ["activation", "switch"])
def test_another_activation_goes_hugging_faces_way(asked, monkeypatch, path):
    ours, theirs = make(**({"feat_extract_activation": "relu"} if asked == "activation" else {}))
    ours.as_products = asked != "switch"
    calls = spied(monkeypatch, path)
    with torch.no_grad():
        wavs = torch.randn(1, 2000)
        assert torch.equal(ours(wavs), theirs(wavs))
    assert not calls


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_an_offset_of_the_waveform_costs_no_digits(mean, path):
    """The variance is that of centred windows: a difference of large sums would lose it."""
    ours, theirs = make(**NORMS["group"])
    wavs = torch.randn(1, 4000)
    with torch.no_grad():
        theirs = theirs.double()
        torch.testing.assert_close(ours(wavs + mean), theirs(wavs.double() + mean).float(), atol=2e-3, rtol=1e-3)


class Made(TorchDispatchMode):
    """Memory of all tensors that were made, views left out."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        if isinstance(made, torch.Tensor):
            # Held, so that no other takes its place.
            self.storages[made.untyped_storage()._cdata] = made.untyped_storage()
        return made


def test_on_an_accelerator_only_two_tensors_have_the_size_of_the_first_layer(monkeypatch):
    monkeypatch.setattr(devices, "cpu_paths", False)
    # As in real models far more channels than samples under the kernel.
    ours, _ = make(width=256, **NORMS["group"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Made() as made:
        ours((torch.randn(2, 40_000), torch.tensor([40_000, 9000])))
    frames = (40_000 - 10) // 5 + 1
    sizes = [storage.nbytes() for storage in made.storages.values()]
    assert sum(size >= 2 * frames * 256 * 2 for size in sizes) == 2


# ---------------------------------------------------------------------------------------------- positional convolution


def make_positional(kernel=128, frozen=True):
    """A positional convolution with random weights, and Hugging Face's, from which it was made."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(hidden_size=96, num_conv_pos_embeddings=kernel, num_conv_pos_embedding_groups=4)
    theirs = Wav2Vec2PositionalConvEmbedding(config).eval()
    torch.nn.init.normal_(theirs.conv.bias)
    ours = PositionalConvolution(copy.deepcopy(theirs)).eval()
    return ours.requires_grad_(not frozen), theirs


@pytest.fixture
def direct(monkeypatch):
    """Count torch's convolutions."""
    calls, forward = [], torch.nn.Conv1d.forward
    monkeypatch.setattr(torch.nn.Conv1d, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    return calls


@pytest.mark.parametrize("kernel", [128, 16, 19])
@pytest.mark.parametrize("frames", [1, 129, 130, 300])
def test_transforms_are_the_positional_convolution(kernel, frames, direct):
    ours, theirs = make_positional(kernel)
    inputs = torch.randn(2, frames, 96)
    with torch.no_grad():
        output = ours(inputs)
        assert not direct
        torch.testing.assert_close(output, theirs(inputs), atol=3e-6, rtol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = ours(inputs.bfloat16())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), output, atol=0.03, rtol=0.02)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_a_positional_convolution_with_gradients_is_hugging_faces(direct):
    ours, theirs = make_positional(frozen=False)
    inputs = torch.randn(1, 40, 96)
    output = ours(inputs)
    output.square().sum().backward()
    assert direct and all(parameter.grad is not None for parameter in ours.parameters())
    assert torch.equal(output, theirs(inputs))
    ours.requires_grad_(False)
    # Frozen, with trained layers below it.
    below = inputs.requires_grad_()
    ours(below).sum().backward()
    assert below.grad is not None


def test_positional_kernels_are_transformed_once_for_the_same_weights(monkeypatch):
    ours, theirs = make_positional()
    inputs, transformed, rfft = torch.randn(2, 40, 96), [], torch.fft.rfft
    monkeypatch.setattr(torch.fft, "rfft", lambda rows, **size: transformed.append(rows.shape) or rfft(rows, **size))
    with torch.no_grad():
        for _ in range(3):
            ours(inputs)
        assert transformed.count(ours.conv.weight.shape) == 1
        for parameter in ours.parameters():
            parameter.mul_(1.5)
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(inputs), theirs(inputs), atol=5e-6, rtol=1e-5)
    assert transformed.count(ours.conv.weight.shape) == 2


def test_trained_positional_kernels_are_those_of_the_last_step():
    ours, theirs = make_positional(frozen=False)
    inputs = torch.randn(1, 40, 96)
    with torch.no_grad():
        ours(inputs)
        # As some optimizers do; PyTorch does not count this as a change.
        ours.conv.bias.data.mul_(2.0)
        ours.conv.parametrizations.weight.original0.data.mul_(2.0)
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(inputs), theirs(inputs), atol=5e-6, rtol=1e-5)
