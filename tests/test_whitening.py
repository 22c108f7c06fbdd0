"""Whitening: unit covariance within classes, the means of classes kept apart, nothing before it is fitted."""

import torch

from accent_plugin.model import Whitening


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


def test_full_shrinkage_divides_by_the_mean_deviation_within_classes():
    vectors, labels = examples()
    whitening = Whitening(3)
    whitening.fit(vectors, labels, shrinkage=1.0)
    # Both classes are of one size.
    variance = torch.stack([vectors[labels == label].var(dim=0, correction=0) for label in (0, 1)]).mean()
    assert torch.allclose(whitening.transform, torch.eye(3) / variance.sqrt(), atol=1e-6)


def test_more_features_than_examples_are_whitened_with_a_shrunk_covariance():
    vectors, labels = torch.randn(20, 50, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 2
    whitening = Whitening(50)
    whitening.fit(vectors, labels, shrinkage=0.1)
    covariance = sum(torch.cov(vectors[labels == label].T.double(), correction=0) for label in (0, 1)) / 2
    shrunk = 0.9 * covariance + 0.1 * covariance.diag().mean() * torch.eye(50)
    transform = whitening.transform.double()
    assert torch.allclose(transform @ shrunk @ transform.T, torch.eye(50).double(), atol=1e-5)
    assert torch.allclose(whitening(vectors), (vectors - vectors.mean(dim=0)) @ transform.float(), atol=1e-5)


def test_it_is_fitted_once_it_has_seen_examples():
    whitening = Whitening(3)
    assert not whitening.fitted
    whitening.fit(*examples(10))
    assert whitening.fitted
