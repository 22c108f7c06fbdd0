"""Dropout, attention and long convolutions for training on a CPU."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from accent_plugin import devices
from accent_plugin.encoder import fast_dropout
from accent_plugin.encoder.factory import make_encoder
from accent_plugin.encoder.fast_dropout import Dropout, attend, dropout, make_mask, use_cpu_kernels

KINDS = (torch.float32, torch.bfloat16)


class Calls(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_was_asked_for_and_the_others_keep_the_mean(p, kind):
    torch.manual_seed(0)
    count = 200_000
    kept = dropout(torch.ones(count, dtype=kind), p)
    share = float((kept == 0).double().mean())
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / count) ** 0.5)
    assert float(kept[kept != 0].double().mean()) == pytest.approx(1 / (1 - p), rel=2**-8)
    assert len(kept.unique()) == 2


def test_neighbours_are_dropped_independently():
    torch.manual_seed(0)
    gone = (dropout(torch.ones(400_000), 0.5) == 0).double() - 0.5
    # Four elements share a word of 64 bits.
    for distance in (1, 2, 3, 4):
        assert abs(float((gone[:-distance] * gone[distance:]).mean())) < 5 * 0.25 / 400_000**0.5


def test_torch_decides_about_the_noise():
    inputs = torch.ones(1000)
    torch.manual_seed(1)
    first, second = dropout(inputs, 0.5), dropout(inputs, 0.5)
    torch.manual_seed(1)
    assert torch.equal(dropout(inputs, 0.5), first)
    assert not torch.equal(first, second)


@given(st.lists(st.integers(0, 5), min_size=0, max_size=4), st.floats(0, 1))
def test_any_shape_and_probability(shape, p):
    inputs = torch.ones(shape)
    outputs = dropout(inputs, p)
    assert outputs.shape == inputs.shape
    assert all(value == 0 or value == pytest.approx(1 / (1 - p), rel=1e-3) for value in outputs.flatten().tolist())


@pytest.mark.parametrize("inputs", [torch.arange(12.0).view(3, 4).T, torch.ones(2, 1).expand(2, 5)])
def test_inputs_whose_elements_do_not_lie_in_a_row(inputs):
    torch.manual_seed(0)
    outputs = dropout(inputs, 0.5)
    assert bool(((outputs == 0) | (outputs == 2 * inputs)).all())


def test_the_gradient_passes_where_the_input_did():
    inputs = torch.ones(1000, requires_grad=True)
    outputs = dropout(inputs, 0.3)
    outputs.sum().backward()
    assert torch.equal(inputs.grad, outputs.detach())


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_nothing_is_dropped_in_evaluation(p):
    inputs, state = torch.randn(100), torch.get_rng_state()
    assert torch.equal(dropout(inputs, p, training=False), inputs)
    assert torch.equal(Dropout(p).eval()(inputs), inputs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_a_probability_that_is_none_is_refused_as_by_torch(p):
    with pytest.raises(ValueError, match="dropout probability"):
        dropout(torch.ones(3), p)


def test_elsewhere_torchs_own_is_called(monkeypatch):
    calls = []
    monkeypatch.setattr(
        fast_dropout.nn.functional, "dropout", lambda inputs, p, training: calls.append(inputs.device.type)
    )
    dropout(torch.ones(3, device="meta"), 0.5)
    assert calls == ["meta"]


# Attention


@pytest.fixture
def heads():
    torch.manual_seed(0)
    return [torch.randn(2, 3, 7, 4, requires_grad=True) for _ in range(3)]


MASK = torch.arange(7).expand(2, 1, 7, 7) < torch.tensor([7, 4]).view(2, 1, 1, 1)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_attention_is_pytorchs_where_the_noise_is_one(heads, mask, scaling, monkeypatch):
    monkeypatch.setattr(fast_dropout, "_noise", lambda like, threshold: torch.ones_like(like))
    module = nn.Module()
    module.is_causal = False
    results = []
    for function, p in ((attend, 0.5), (sdpa_attention_forward, 0.0)):
        output, weights = function(module, *heads, mask, dropout=p, scaling=scaling)
        assert weights is None
        results.append([output, *torch.autograd.grad(output.square().sum(), heads)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_attention_drops_weights_by_the_probability_it_is_given():
    torch.manual_seed(0)
    # Every frame attends to all of 50 alike, and a value of 1 in each makes the output a mean of the noise.
    query, value = torch.zeros(20, 10, 50, 4), torch.ones(20, 10, 50, 4)
    output, _ = attend(nn.Module(), query, query, value, None, dropout=0.2)
    assert float(output.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(output[..., 0].var()) == pytest.approx(0.2 / 0.8 / 50, rel=0.1)


def test_without_dropout_attention_is_pytorchs(heads):
    module = nn.Module()
    module.is_causal = False
    with Calls() as calls:
        attend(module, *heads, MASK, dropout=0.0)
    assert any("scaled_dot_product" in name for name in calls.names)


@pytest.mark.parametrize(
    ("kind", "frames", "learning", "ours"),
    [
        (torch.bfloat16, 512, True, True),
        (torch.bfloat16, 513, True, False),
        (torch.bfloat16, 512, False, True),
        (torch.bfloat16, 513, False, False),
        (torch.float32, 512, True, False),
    ],
)
def test_the_faster_way_without_dropout_is_taken(kind, frames, learning, ours):
    module = nn.Module()
    module.is_causal = False
    heads = [torch.randn(1, 1, frames, 4, dtype=kind, requires_grad=True) for _ in range(3)]
    with Calls() as calls, torch.set_grad_enabled(learning):
        attend(module, *heads, None)
    assert ("_softmax" in calls.names) is ours


@pytest.mark.parametrize(("device", "looks"), [("cpu", True), ("meta", False)])
def test_a_mask_is_looked_at_on_a_processor_alone(device, looks):
    def make(valid):
        sizes = {"batch_size": 2, "q_length": 5, "kv_length": 5}
        everywhere = {"mask_function": lambda batch, head, query, key: key >= 0, "device": torch.device(device)}
        return make_mask(
            attention_mask=valid, allow_is_bidirectional_skip=True, allow_is_causal_skip=False, **sizes, **everywhere
        )

    assert make(None) is None
    mask = make(torch.ones(2, 5, dtype=torch.bool, device=device))
    assert (mask is None) is looks


@pytest.mark.parametrize("features", [4, 8, 36])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_on_an_accelerator_is_pytorchs_in_shapes_that_its_fused_kernels_take(
    features, scaling, masked, monkeypatch
):
    torch.manual_seed(0)
    heads, taken, module = [torch.randn(2, 3, 7, features, requires_grad=True) for _ in range(3)], [], nn.Module()
    module.is_causal = False

    def spied(module, query, key, value, **keywords):
        taken.append((query.shape[-1], value.shape[-1], torch.backends.cuda.cudnn_sdp_enabled()))
        return sdpa_attention_forward(module, query, key, value, **keywords)

    # On for all threads: two that attend at the same time in an earlier test may have left it off.
    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(devices, "cpu_paths", False)
    monkeypatch.setattr(fast_dropout, "sdpa_attention_forward", spied)
    output, _ = attend(module, *heads, MASK[:, :, :1] if masked else None, scaling=scaling)
    expected, _ = sdpa_attention_forward(module, *heads, MASK if masked else None, scaling=scaling)
    gradients = [torch.autograd.grad(one.square().sum(), heads) for one in (output, expected)]
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(*gradients)
    assert taken == [(-(-features // 8) * 8, -(-features // 8) * 8, False)]
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("causal", [True, False])
def test_a_mask_on_an_accelerator_has_one_row_where_padding_alone_decides(causal, monkeypatch):
    monkeypatch.setattr(devices, "cpu_paths", False)
    valid = torch.arange(5) < torch.tensor([[5], [3]])
    function = causal_mask_function if causal else bidirectional_mask_function
    sizes = {"batch_size": 2, "q_length": 5, "kv_length": 5, "mask_function": function}
    options = {"allow_is_bidirectional_skip": not causal, "allow_is_causal_skip": False}
    mask = make_mask(attention_mask=valid, **sizes, **options)
    assert mask.shape == (2, 1, 5 if causal else 1, 5)
    assert torch.equal(mask.expand(2, 1, 5, 5), sdpa_mask(attention_mask=valid, **sizes, allow_is_causal_skip=False))


# In an encoder


@pytest.mark.parametrize("family", ["wav2vec2-group", "wav2vec2-layer", "hubert-group", "data2vec-audio", "moonshine"])
@pytest.mark.parametrize("precision", KINDS)
def test_no_noise_of_a_training_step_is_drawn_number_by_number(family, precision, tiny_encoder):
    overrides = {"attention_dropout": 0.1}
    if family != "moonshine":
        overrides |= {"hidden_dropout": 0.1, "activation_dropout": 0.1, "feat_proj_dropout": 0.1, "layerdrop": 0.0}
    encoder = make_encoder(str(tiny_encoder(family)), config_overrides=overrides).train()
    with Calls() as calls, torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        encoder(torch.randn(2, 8000), torch.tensor([0.7, 1.0]))[0].float().sum().backward()
    assert "randint" in calls.names, "no dropout at all"
    assert not calls.names & {"bernoulli_", "bernoulli", "native_dropout", "_safe_softmax"}


@pytest.mark.parametrize(
    "family", ["wav2vec2-group", "wav2vec2-layer", "hubert-group", "data2vec-audio", "moonshine", "whisper"]
)
@pytest.mark.parametrize(("kind", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_a_clip_in_training_is_the_same_alone_and_in_a_batch(family, kind, near, tiny_encoder, monkeypatch):
    monkeypatch.setattr(fast_dropout, "_noise", lambda like, threshold: torch.ones_like(like))
    # With a dropout of attention alone, whose noise is one: the way of training without its chance.
    others = ("hidden_dropout", "activation_dropout", "feat_proj_dropout", "dropout", "layerdrop")
    known = make_encoder(str(tiny_encoder(family))).config.to_dict()
    overrides = {key: 0.0 for key in others if key in known} | {"attention_dropout": 0.1}
    encoder = make_encoder(str(tiny_encoder(family)), config_overrides=overrides).train()
    torch.manual_seed(0)
    clips = [torch.randn(count) for count in (8000, 5000, 6500)]
    batch = nn.utils.rnn.pad_sequence(clips, batch_first=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind is torch.bfloat16):
        together, valid = encoder(batch, torch.tensor([1.0, 5000 / 8000, 6500 / 8000]))
        for clip, frames, mask in zip(clips, together, valid, strict=True):
            alone = encoder(clip[None])[0][0].float()
            assert torch.allclose(frames[mask].float(), alone, atol=near * float(alone.abs().max()))


def test_only_plain_dropout_is_exchanged(tiny_encoder):
    class Other(nn.Dropout):
        pass

    encoder = make_encoder(str(tiny_encoder("wav2vec2-group")))
    model = encoder.model
    assert {type(module) for module in model.modules() if isinstance(module, nn.Dropout)} == {Dropout}
    model.other = Other()
    use_cpu_kernels(model)
    assert type(model.other) is Other


@pytest.mark.parametrize("chosen", ["eager", "sdpa"])
def test_an_attention_that_was_asked_for_is_kept(tiny_encoder, chosen):
    encoder = make_encoder(str(tiny_encoder("wav2vec2-group")), attn_implementation=chosen)
    assert encoder.model.config._attn_implementation == chosen
    assert make_encoder(str(tiny_encoder("wav2vec2-group"))).model.config._attn_implementation == fast_dropout.ATTENTION


def long_convolution(kernel=64, channels=8, groups=4):
    """A convolution in a model that uses the kernels for CPUs, and the same one with PyTorch's."""
    torch.manual_seed(0)
    theirs = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=groups)
    ours = nn.Sequential(copy.deepcopy(theirs))
    ours.config = SimpleNamespace(_attn_implementation="eager")
    use_cpu_kernels(ours)
    return ours, theirs


@pytest.mark.parametrize("frames", [1, 40, 64, 97, 200, 333])
@pytest.mark.parametrize(("kernel", "channels", "groups"), [(64, 8, 4), (65, 6, 1), (128, 4, 4)])
def test_a_long_convolution_trains_with_the_gradients_of_pytorchs(frames, kernel, channels, groups):
    ours, theirs = long_convolution(kernel, channels, groups)
    inputs = torch.randn(3, channels, frames, requires_grad=True)
    outputs, wanted = ours(inputs), theirs(inputs)
    torch.testing.assert_close(outputs, wanted, atol=2e-6, rtol=1e-5)
    gradient = torch.randn_like(wanted)
    found = torch.autograd.grad(outputs, (inputs, *ours.parameters()), gradient)
    for one, other in zip(found, torch.autograd.grad(wanted, (inputs, *theirs.parameters()), gradient), strict=True):
        torch.testing.assert_close(one, other, atol=5e-6 * float(other.abs().max()), rtol=0)


def test_a_long_convolution_trains_without_gradients_of_its_input():
    ours, theirs = long_convolution()
    inputs = torch.randn(2, 8, 100)
    for model in (ours, theirs):
        model(inputs).square().sum().backward()
    torch.testing.assert_close(ours[0].weight.grad, theirs.weight.grad, atol=1e-4, rtol=1e-4)


def test_only_training_avoids_pytorchs_convolution():
    ours, theirs = long_convolution()
    inputs = torch.randn(2, 8, 100)
    with Calls() as training:
        ours(inputs).sum().backward()
    assert not {name for name in training.names if "conv" in name}
    with torch.no_grad(), Calls() as evaluation:
        assert torch.equal(ours(inputs), theirs(inputs))
    assert "convolution" in evaluation.names
    ours.requires_grad_(False)
    assert torch.equal(ours(inputs), theirs(inputs))


def test_a_long_convolution_returns_the_type_of_autocast():
    ours, theirs = long_convolution()
    inputs = torch.randn(2, 8, 100)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, wanted = ours(inputs), theirs(inputs)
    assert outputs.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(outputs, wanted, atol=0.05, rtol=0.05)


def test_short_and_strided_convolutions_stay_pytorchs():
    model = nn.Sequential(nn.Conv1d(4, 4, 63), nn.Conv1d(4, 4, 127, stride=64))
    model.config = SimpleNamespace(_attn_implementation="eager")
    use_cpu_kernels(model)
    with Calls() as training:
        model[0](torch.randn(1, 4, 300)), model[1](torch.randn(1, 4, 300))
    assert "bmm" not in training.names and "convolution" in training.names


def test_wav2vec2s_positional_convolution_is_trained_by_spectra():
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = Wav2Vec2Model(Wav2Vec2Config(**small, conv_dim=[8] * 7, num_conv_pos_embedding_groups=4))
    plain = copy.deepcopy(model.encoder.pos_conv_embed)
    use_cpu_kernels(model)
    inputs = torch.randn(2, 50, 16)
    with Calls() as training:
        outputs = model.encoder.pos_conv_embed(inputs)
    assert "convolution" not in training.names
    torch.testing.assert_close(outputs, plain(inputs), atol=1e-5, rtol=1e-5)
