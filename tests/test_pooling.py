"""Pooling: numbers worked out by hand, and what holds for all of them."""

import re

import numpy as np
import pytest
import torch
from helpers import ROOT

from accent_plugin.errors import ConfigError
from accent_plugin.pooling import (
    POOLINGS,
    AttentivePooling,
    AttentiveStatisticsPooling,
    MeanPooling,
    make_pooling,
    summarise,
)

FRAMES = torch.tensor([[[1.0, 10.0], [3.0, 20.0], [99.0, -99.0]]])
VALID = torch.tensor([[True, True, False]])


def with_scores(pooling, scores):
    """Replace the attention's scores by numbers of ours."""
    pooling.attention.score.forward = lambda hidden: torch.tensor(scores)[None, :, None]
    return pooling


def test_mean_by_hand():
    assert torch.equal(MeanPooling(2)(FRAMES, VALID), torch.tensor([[2.0, 15.0]]))


def test_statistics_by_hand():
    assert torch.allclose(make_pooling("statistics", 2)(FRAMES, VALID), torch.tensor([[2.0, 15.0, 1.0, 5.0]]))


@pytest.mark.parametrize(("frames", "scale"), [(50, 1.0), (50, 100.0), (2, 1.0), (1, 1.0)])
@pytest.mark.parametrize("states", [1, 2, 7])
def test_moments_are_those_of_all_frames(frames, scale, states):
    generator = torch.Generator().manual_seed(states)
    clip = scale * torch.randn(frames, states, 3, generator=generator).cumsum(dim=1)
    few = summarise(clip, "moments")
    assert few.shape == (states + 1, states, 3) and few.dtype == torch.float32
    for feature in range(3):
        wanted, found = (part[:, :, feature].double().numpy().T for part in (clip, few))
        assert found.mean(axis=1) == pytest.approx(wanted.mean(axis=1), abs=1e-6 * scale)
        wanted, found = (np.cov(part, bias=True) for part in (wanted, found))
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5 * scale**2)


def test_the_mean_is_that_of_all_frames_and_frames_are_kept():
    clip = torch.tensor([[[1.0, 2.0]], [[3.0, 8.0]]])
    assert torch.equal(summarise(clip, "mean"), torch.tensor([[[2.0, 5.0]]]))
    assert summarise(clip, "frames") is clip


def test_attention_by_hand():
    pooling = with_scores(make_pooling("attentive", 2), [0.0, torch.log(torch.tensor(3.0)).item(), 50.0])
    assert torch.allclose(pooling(FRAMES, VALID), torch.tensor([[0.25 * 1 + 0.75 * 3, 0.25 * 10 + 0.75 * 20]]))


def test_attentive_statistics_by_hand():
    pooling = with_scores(AttentiveStatisticsPooling(2), [0.0, 0.0, 50.0])
    assert torch.allclose(pooling(FRAMES, VALID), torch.tensor([[2.0, 15.0, 1.0, 5.0]]))


@pytest.mark.parametrize("kind", [AttentivePooling, AttentiveStatisticsPooling])
def test_attention_is_the_softmax_of_a_layer_with_a_tangent(kind):
    generator = torch.Generator().manual_seed(0)
    frames, weight, bias, score = (torch.randn(*shape, generator=generator) for shape in ((5, 2), (3, 2), (3,), (1, 3)))
    pooling = kind(2, attention_features=3)
    names = ("attention.hidden.weight", "attention.hidden.bias", "attention.score.weight")
    pooling.load_state_dict(dict(zip(names, (weight, bias, score), strict=True)))
    exponentials = [(score[0] @ (weight @ frame + bias).tanh()).exp() for frame in frames]
    mean = sum(e * frame for e, frame in zip(exponentials, frames, strict=True)) / sum(exponentials)
    assert torch.allclose(pooling(frames[None], torch.ones(1, 5, dtype=torch.bool))[0, :2], mean)


@pytest.mark.parametrize("name", ["attentive", "attentive_statistics"])
def test_the_weights_are_those_that_bundles_have(name):
    shapes = {key: tuple(value.shape) for key, value in make_pooling(name, 2).state_dict().items()}
    assert shapes == {
        "attention.hidden.weight": (128, 2),
        "attention.hidden.bias": (128,),
        "attention.score.weight": (1, 128),
    }


@pytest.mark.parametrize("name", POOLINGS)
def test_a_clip_in_a_batch_gives_what_it_gives_alone(name):
    pooling, lengths = make_pooling(name, 4), (5, 2, 1)
    frames = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    pooled = pooling(frames, torch.arange(5) < torch.tensor(lengths)[:, None])
    for clip, length, together in zip(frames, lengths, pooled, strict=True):
        alone = pooling(clip[None, :length], torch.ones(1, length, dtype=torch.bool))
        assert torch.allclose(together, alone[0], atol=1e-6)


@pytest.mark.parametrize("name", POOLINGS)
def test_padding_has_no_influence_even_when_it_is_not_finite(name):
    pooling, frames = make_pooling(name, 2), FRAMES.clone()
    expected = pooling(FRAMES[:, :2], VALID[:, :2])
    frames[:, 2] = torch.nan
    assert torch.allclose(pooling(frames, VALID), expected)


@pytest.mark.parametrize("name", POOLINGS)
def test_one_frame_gives_finite_values_and_gradients(name):
    pooling, frames = make_pooling(name, 2), torch.tensor([[[1.0, 2.0]]], requires_grad=True)
    pooled = pooling(frames, torch.tensor([[True]]))
    pooled.sum().backward()
    assert torch.isfinite(pooled).all() and torch.isfinite(frames.grad).all()
    assert torch.allclose(pooled[:, :2], frames[0])
    # A feature that does not vary has the smallest deviation that is told.
    assert torch.allclose(pooled[:, 2:], torch.tensor(1e-3))


@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_twice_gives_the_same_and_draws_no_random_numbers(name):
    pooling, state = make_pooling(name, 2).eval(), None
    state = torch.get_rng_state()
    assert torch.equal(pooling(FRAMES, VALID), pooling(FRAMES, VALID))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", POOLINGS)
def test_bfloat16_frames_are_summed_in_float32(name):
    torch.manual_seed(0)
    pooling = make_pooling(name, 4)
    frames = torch.randn(2, 3000, 4) + 5
    valid = torch.ones(2, 3000, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pooling(frames.bfloat16(), valid)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, pooling(frames.bfloat16().float(), valid))


@pytest.mark.parametrize("name", POOLINGS)
def test_the_width_that_is_announced_is_the_width_that_comes(name):
    pooling = make_pooling(name, 2)
    assert pooling(FRAMES, VALID).shape == (1, pooling.out_features)


def test_unknown_pooling():
    with pytest.raises(ConfigError, match="pooling 'stats' is unknown; choose one of mean, .*attentive"):
        make_pooling("stats", 2)


def test_a_new_pooling_changes_only_its_module_and_the_generated_table():
    """No other page, YAML or module lists the names, so that adding one does not mean searching for the others."""
    folders = ("accent_plugin", "benchmarks", "docs", "hparams", "recipes")
    paths = [*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    listing = {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path.suffix in (".py", ".md", ".yaml", ".ipynb") and path.is_file()
        for line in path.read_text(encoding="utf-8").splitlines()
        if POOLINGS.keys() <= set(re.findall(r"\w+", line))
    }
    assert listing == {"docs/hyperparameters.md"}
