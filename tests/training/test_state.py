"""`TrainingState` restores the position in the epoch and every random generator."""

import random

import numpy as np
import pytest
import torch

from accent_plugin.training import distributed
from accent_plugin.training.state import TrainingState, random_state, set_random_state


def draws():
    """Random numbers of every kind; normal ones are drawn in pairs, so the generators hold a spare one."""
    return [
        *torch.randn(3).tolist(),
        torch.rand(1).item(),
        *np.random.standard_normal(3).tolist(),
        np.random.randint(1 << 30),
        random.gauss(0, 1),
        random.random(),
    ]


@pytest.fixture(autouse=True)
def seeded():
    before = random_state()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    draws()
    yield
    set_random_state(before)


@pytest.fixture
def saved(tmp_path):
    position = TrainingState()
    position.capture(7, {"sums": [1.0, 2.5]})
    position.save(tmp_path / "position.ckpt")
    return tmp_path / "position.ckpt"


def test_generators_resume_where_they_were(saved):
    after = draws()
    assert draws() != after
    TrainingState().load(saved, True)
    assert draws() == after


def test_generators_resume_within_a_pair_of_normal_numbers(tmp_path):
    random.gauss(0, 1)
    np.random.standard_normal()
    position = TrainingState()
    position.capture(0, {})
    position.save(tmp_path / "position.ckpt")
    after = draws()
    TrainingState().load(tmp_path / "position.ckpt", True)
    assert draws() == after


def test_reading_the_generators_does_not_change_them():
    state = random_state()
    after = draws()
    set_random_state(state)
    random_state()
    assert draws() == after


def test_step_and_figures_are_restored(saved):
    position = TrainingState()
    position.load(saved, False)
    assert (position.step, position.figures) == (7, {"sums": [1.0, 2.5]})


def test_the_file_holds_plain_values_only(saved):
    # No pickled code.
    assert torch.load(saved, weights_only=True).keys() == {"step", "figures", "random"}


def test_a_captured_state_does_not_change_with_the_figures():
    position, figures = TrainingState(), {"sums": 1}
    position.capture(1, figures)
    figures["sums"] = 2
    assert position.figures == {"sums": 1}


def test_another_number_of_processes_keeps_the_generators_and_warns(saved, monkeypatch, caplog):
    state = random_state()
    expected = draws()
    set_random_state(state)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    position = TrainingState()
    position.load(saved, False)
    # Seven batches of one process: with two processes, none is repeated.
    assert draws() == expected and position.step == 4
    assert "written by 1 processes, now there are 2" in caplog.text


def test_each_process_restores_its_own_state(tmp_path, monkeypatch):
    states = [random_state(), None]
    draws()
    states[1] = random_state()
    second = draws()
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather", lambda own: states)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    position = TrainingState()
    position.capture(1, {})
    position.save(tmp_path / "position.ckpt")
    TrainingState().load(tmp_path / "position.ckpt", True)
    assert draws() == second
