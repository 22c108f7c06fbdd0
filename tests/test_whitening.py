"""Whitening: unit covariance within classes, the means of classes kept apart, nothing before it is fitted."""

import torch

from accent_plugin.whitening import Whitening


def examples(count=4000):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.5, 0.2], [0.0, 0.0, 0.1]])
    labels = torch.arange(count) % 2
    vectors = torch.randn(count, 3, generator=generator) @ mixing + labels[:, None] * torch.tensor([1.0, -1.0, 2.0]) + 5
    return vectors, labels


def test_before_it_is_fitted_it_changes_nothing():
    vectors, _ = examples(10)
    assert torch.equal(Whitening(3)(vectors), vectors)


def test_within_a_class_the_covariance_becomes_the_identity():
    vectors, labels = examples()
    whitening = Whitening(3)
    whitening.fit(vectors, labels, shrinkage=0.0)
    white = whitening(vectors)
    centred = torch.cat([white[labels == label] - white[labels == label].mean(0) for label in (0, 1)])
    assert torch.allclose(centred.T @ centred / len(centred), torch.eye(3), atol=1e-3)
    assert white.mean(0).abs().max() < 1e-3
    assert (white[labels == 1].mean(0) - white[labels == 0].mean(0)).norm() > 10


def test_full_shrinkage_only_scales():
    vectors, labels = examples()
    whitening = Whitening(3)
    whitening.fit(vectors, labels, shrinkage=1.0)
    assert torch.allclose(whitening.transform, torch.eye(3) * whitening.transform[0, 0], atol=1e-6)


def test_more_features_than_examples_stay_finite():
    whitening = Whitening(50)
    whitening.fit(torch.randn(20, 50, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 2)
    assert torch.isfinite(whitening.transform).all()
