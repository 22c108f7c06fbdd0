"""Clips that cannot be read: named once, counted per stage, and limited."""

from types import SimpleNamespace

import pytest
from speechbrain import Stage

from accent_plugin.errors import DataError
from accent_plugin.training.unread import UnreadClips


def loader(clips):
    return SimpleNamespace(dataset=range(clips))


def batch(*names):
    return SimpleNamespace(lost=tuple((name, "broken") for name in names))


def test_a_clip_is_logged_once_and_counted_once(caplog):
    unread = UnreadClips(0.5)
    unread.begin(Stage.TRAIN, loader(10))
    for _ in range(2):
        unread.note(batch("a", "b"), Stage.TRAIN)
    assert unread[Stage.TRAIN] == {"a": "broken", "b": "broken"} and unread[Stage.VALID] == {}
    assert [record.getMessage() for record in caplog.records] == [f"skipped clip {name}: broken" for name in "ab"]


def test_more_than_the_allowed_fraction_is_an_error_with_the_first_clip_and_what_to_do():
    unread = UnreadClips(0.2)
    unread.begin(Stage.VALID, loader(10))
    unread.note(batch("a", "b"), Stage.VALID)
    with pytest.raises(DataError) as caught:
        unread.note(batch("c"), Stage.VALID)
    assert str(caught.value).splitlines() == [
        "3 of 10 clips cannot be read while validating, more than max_unreadable_fraction (0.2) allows; "
        "the first is a: broken",
        "prepare the data again and rerun the same command: it resumes from the last checkpoint",
    ]


def test_one_clip_is_tolerated_unless_none_is_allowed():
    for share, tolerated in ((0.05, True), (0.0, False)):
        unread = UnreadClips(share)
        unread.begin(Stage.TEST, loader(3))
        if tolerated:
            unread.note(batch("a"), Stage.TEST)
        else:
            with pytest.raises(DataError, match="1 of 3 clips cannot be read while evaluating"):
                unread.note(batch("a"), Stage.TEST)


def test_counting_starts_again_with_the_next_loader():
    unread = UnreadClips(1.0)
    unread.begin(Stage.TEST, loader(3))
    unread.note(batch("a"), Stage.TEST)
    unread.begin(Stage.TEST, loader(3))
    assert unread[Stage.TEST] == {}
