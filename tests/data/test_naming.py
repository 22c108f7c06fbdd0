import pytest

from accent_plugin.data import naming
from accent_plugin.errors import DataError


@pytest.mark.parametrize(("kind", "names"), [
    ("train", ["train", "Train", "training", "train_clean", "train.clean.100", "train-other-500", "cv_train"]),
    ("valid", ["valid", "validation", "val", "dev", "DEV", "dev_clean", "validation.clean", "development", "valid2"]),
    ("test", ["test", "eval", "evaluation", "test_clean", "test-other", "testClean", "heldout", "held_out"]),
    (None, ["validated", "invalidated", "other", "all", "devtest", "train_dev", "traindev", "contest", "data"]),
])  # fmt: skip
def test_a_splits_name_says_what_it_is_for(kind, names):
    assert {name: naming.split_kind(name) for name in names} == dict.fromkeys(names, kind)


def test_parts_of_a_split_belong_together():
    names = ["train", "test_clean", "dev", "test-other"]
    assert naming.splits_by_kind(names, "") == {
        "train": ["train"],
        "valid": ["dev"],
        "test": ["test_clean", "test-other"],
    }


def test_different_words_for_one_kind_are_refused():
    with pytest.raises(
        DataError, match=r"test and eval could each be the test split; the splits are train, test, eval"
    ):
        naming.splits_of_kind(["train", "test", "eval"], "test", "")


def test_splits_are_asked_for_by_name_or_kind():
    names = ["train", "test", "eval", "dev", "extra"]
    assert naming.asked_splits(names, ["extra", "eval"], "--split") == ["eval", "extra"]
    assert naming.asked_splits(names, ["valid"], "--split") == ["dev"]
    # Its own name comes before its kind.
    assert naming.asked_splits(names, ["test"], "--split") == ["test"]
    assert naming.asked_splits(names, ["Test"], "--split") == ["test"]
    with pytest.raises(DataError, match="--split names 'extras'; the splits are train, test, eval, dev, extra"):
        naming.asked_splits(names, ["extras"], "--split")


@pytest.mark.parametrize(("role", "columns", "found"), [
    ("client", ["id", "speaker"], "speaker"),
    ("client", ["speaker", "client_id"], "client_id"),
    ("client", ["Speaker ID"], "Speaker ID"),
    ("client", ["speakerId"], "speakerId"),
    ("client", ["reader"], None),
    ("sentence", ["text"], "text"),
    ("sentence", ["transcription"], "transcription"),
    ("gender", ["Sex"], "Sex"),
    ("age", ["language"], None),
])  # fmt: skip
def test_columns_are_found_by_their_usual_names(role, columns, found):
    assert naming.find_column(role, columns) == found


def test_columns_that_look_like_a_role_are_named():
    columns = ["audio", "reader_id", "promptText", "context", "spk"]
    assert naming.likely_columns("client", columns) == ["reader_id", "spk"]
    assert naming.likely_columns("sentence", columns) == ["promptText"]
