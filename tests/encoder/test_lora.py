"""Adapters: every one of them acts and learns, nothing else of the encoder does, and a bundle knows nothing of them."""

import copy
import dataclasses
import json
import sys

import pytest
import torch
from helpers.encoders import TINY, family_of
from safetensors.torch import load_file

from accent_plugin.bundle.load import load_bundle
from accent_plugin.bundle.write import write_bundle
from accent_plugin.encoder import lora
from accent_plugin.encoder.factory import FAMILIES
from accent_plugin.errors import EncoderError
from accent_plugin.exchange.start import make_encoder
from accent_plugin.model import AccentModel

LABELS = ("us", "england", "australia")
RANK = 2


@pytest.fixture
def adapted(tiny_encoder):
    """Function: name of `TINY` -> a classifier whose adapters are no longer at their start, where they do nothing."""

    def make(name, **options):
        torch.manual_seed(0)
        model = AccentModel(make_encoder(str(tiny_encoder(name)), lora_rank=RANK, **options), LABELS)
        for layer in model.wav2vec2._adapted:
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        return model.eval()

    return make


def batch():
    generator = torch.Generator().manual_seed(1)
    return 0.1 * torch.randn(3, 16_000, generator=generator), torch.tensor([0.4, 1.0, 0.7])


def scores(model):
    with torch.inference_mode():
        return model(*batch())


def of_adapters(encoder):
    """Name -> parameter of its adapters."""
    return {name: parameter for name, parameter in encoder.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("name", TINY)
def test_every_adapter_gets_a_gradient_and_nothing_else_of_the_encoder(adapted, name):
    model = adapted(name).train()
    model(*batch())[:, 0].sum().backward()
    found = of_adapters(model.wav2vec2)
    # Two matrices for each layer named, in each of three blocks.
    assert len(found) == 2 * 3 * len(FAMILIES[family_of(name)].lora_targets) > 0
    assert [name for name, p in found.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert [name for name, p in model.wav2vec2.named_parameters() if name not in found and p.requires_grad] == []
    assert model.classifier.weight.grad is not None


@pytest.mark.parametrize("name", TINY)
def test_every_adapter_has_a_say_in_the_output(adapted, name):
    model = adapted(name)
    before = scores(model)
    for layer in model.wav2vec2._adapted:
        weight = layer.lora_B["default"].weight
        kept = weight.detach().clone()
        torch.nn.init.normal_(weight)
        assert not torch.allclose(scores(model), before, atol=1e-6)
        weight.data.copy_(kept)
    assert torch.equal(scores(model), before)


def test_in_wavlms_attention_adapters_would_be_passed_by(tiny_encoder, monkeypatch):
    # Guards the two tests above: they must be able to fail.
    targets = FAMILIES["wav2vec2"].lora_targets
    monkeypatch.setitem(FAMILIES, "wavlm", dataclasses.replace(FAMILIES["wavlm"], lora_targets=targets))
    encoder = make_encoder(str(tiny_encoder("wavlm-layer")), lora_rank=RANK)
    frames, _ = encoder(*batch())
    assert not frames.requires_grad


@pytest.mark.parametrize("name", TINY)
def test_training_starts_from_the_pretrained_encoder(tiny_encoder, name):
    plain, fresh = (make_encoder(str(tiny_encoder(name)), lora_rank=rank).eval() for rank in (None, RANK))
    with torch.no_grad():
        torch.testing.assert_close(fresh(*batch())[0], plain(*batch())[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", TINY)
def test_scores_do_not_depend_on_the_batch(adapted, name):
    model, (wavs, lens) = adapted(name), batch()
    together = scores(model)
    for row, (wav, share) in enumerate(zip(wavs, lens, strict=True)):
        with torch.inference_mode():
            alone = model(wav[None, : round(share.item() * len(wav))])[0]
        assert torch.allclose(alone, together[row], atol=1e-5), f"clip {row}"


def test_by_hand():
    """W + alpha / rank * B A."""
    blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 1, bias=False)})])
    blocks[0]["q_proj"].weight.data = torch.tensor([[1.0, 0.0]])
    (layer,) = lora.inject(blocks, ["q_proj"], rank=1, alpha=3.0)
    layer.lora_A["default"].weight.data = torch.tensor([[1.0, 1.0]])
    layer.lora_B["default"].weight.data = torch.tensor([[2.0]])
    clip = torch.tensor([1.0, 10.0])
    assert layer(clip).tolist() == [1.0 + 3 * 2 * 11.0]
    lora.merge(blocks)
    assert blocks[0]["q_proj"].weight.tolist() == [[7.0, 6.0]]
    assert type(blocks[0]["q_proj"]) is torch.nn.Linear


def test_the_scale_is_two_where_none_is_given(adapted):
    assert {layer.scaling["default"] for layer in adapted("moonshine").wav2vec2._adapted} == {2.0}


# Modes and freezing


@pytest.mark.parametrize("name", TINY)
def test_in_training_the_frozen_encoder_drops_nothing_and_the_adapters_do(adapted, name):
    steady, dropping = (adapted(name, lora_dropout=share).wav2vec2.train() for share in (0.0, 0.5))
    assert torch.equal(steady(*batch())[0], steady(*batch())[0])
    assert not torch.equal(dropping(*batch())[0], dropping(*batch())[0])
    dropping.eval()
    assert torch.equal(dropping(*batch())[0], dropping(*batch())[0])


def test_convolutions_do_no_backward_work(adapted):
    encoder, outputs = adapted("wav2vec2-group").wav2vec2.train(), []
    encoder.feature_encoder.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    assert encoder(*batch())[0].requires_grad and not outputs[0].requires_grad


@pytest.mark.parametrize("name", ["wav2vec2-layer", "whisper"])
def test_frozen_layers_have_no_adapters(adapted, name):
    encoder = adapted(name, freeze_layers=2).wav2vec2
    assert [bool(lora.parameters(block)) for block in encoder.layers] == [False, False, True]


def test_a_held_encoder_trains_no_adapters(adapted):
    model = adapted("moonshine").train()
    model.wav2vec2.detached = True
    model(*batch()).sum().backward()
    assert all(parameter.grad is None for parameter in lora.parameters(model))


def test_weights_of_layers_are_trained_beside_adapters(adapted):
    model = adapted("moonshine", weighted_layers="all").train()
    model(*batch())[:, 0].sum().backward()
    assert model.wav2vec2.layer_weights.grad.abs().sum() > 0


def test_adapters_are_trained_at_the_rate_of_the_head(adapted):
    model = adapted("moonshine")
    head, encoder = ({id(p) for p in chosen} for chosen in (model.head_parameters(), model.encoder_parameters()))
    assert {id(p) for p in lora.parameters(model)} < head
    assert not head & encoder and len(head | encoder) == len(list(model.parameters()))
    assert not any(p.requires_grad for p in model.encoder_parameters())


def test_bfloat16(adapted):
    model = adapted("wav2vec2-group").train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*batch())[:, 0].sum()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in lora.parameters(model))


# Bundles and checkpoints


@pytest.mark.parametrize("name", TINY)
def test_a_bundle_has_the_adapters_in_its_weights(adapted, tiny_encoder, tmp_path, name):
    model = adapted(name)
    expected, state = scores(model), copy.deepcopy(model.state_dict())
    folder = write_bundle(tmp_path / "b", model, LABELS, encoder_name="tiny", pooling="mean")
    found = load_bundle(folder).modules
    with torch.inference_mode():
        again = found["classifier"](found["embedding_model"](*batch())).squeeze(1)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)
    plain = AccentModel(make_encoder(str(tiny_encoder(name))), LABELS)
    assert load_file(folder / "model.ckpt").keys() == plain.state_dict().keys()
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]["encoder"]
    assert described == {"name": "tiny", **json.loads(json.dumps(plain.wav2vec2.describe()))}
    # The model itself is still in training.
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_a_bundle_needs_no_peft(adapted, tmp_path, monkeypatch):
    folder = write_bundle(tmp_path / "b", adapted("moonshine"), LABELS, encoder_name="tiny", pooling="mean")
    monkeypatch.setitem(sys.modules, "peft", None)
    model = load_bundle(folder).model
    write_bundle(tmp_path / "again", model, LABELS, encoder_name="tiny", pooling="mean")


def test_adapters_can_start_from_a_bundle_in_which_others_are_merged(adapted, tmp_path):
    first = adapted("hubert-group")
    folder = write_bundle(tmp_path / "b", first, LABELS, encoder_name="tiny", pooling="mean")
    second = make_encoder("not looked at", from_bundle=str(folder), lora_rank=RANK).eval()
    with torch.inference_mode():
        torch.testing.assert_close(second(*batch())[0], first.wav2vec2(*batch())[0], atol=1e-5, rtol=0)


# What is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lora_rank": 0}, "lora_rank is 0; it should be at least 1"),
        ({"lora_rank": 4, "lora_dropout": 1.0}, "lora_dropout is 1.0; it should be at least 0 and below 1"),
        ({"lora_rank": 4, "freeze": True}, "give one of them"),
        ({"lora_rank": 4, "freeze_layers": 3}, "freeze_layers leaves no layer"),
    ],
)
def test_wrong_values(tiny_encoder, options, message):
    with pytest.raises(EncoderError, match=message):
        make_encoder(str(tiny_encoder("moonshine")), **options)


def test_a_family_without_layers_to_adapt(tiny_encoder, monkeypatch):
    monkeypatch.setitem(FAMILIES, "moonshine", dataclasses.replace(FAMILIES["moonshine"], lora_targets=()))
    with pytest.raises(EncoderError, match="this family of encoders has no lora_targets"):
        make_encoder(str(tiny_encoder("moonshine")), lora_rank=4)


def test_without_peft(tiny_encoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(EncoderError, match=r"need PEFT.*pip install 'accent_plugin\[lora\]'"):
        make_encoder(str(tiny_encoder("moonshine")), lora_rank=4)
