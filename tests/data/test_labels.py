import subprocess
import sys
from pathlib import Path

import pytest

from accent_plugin.data import labels
from accent_plugin.data.labels import ParsedAccent, parse
from accent_plugin.errors import ConfigError

OLD_CODES = (
    "us england australia indian canada african scotland ireland newzealand wales malaysia philippines singapore "
    "hongkong bermuda southatlandtic"
).split()

PRESET_NAMES = {
    "United States English": "us",
    "England English": "england",
    "Australian English": "australia",
    "Scottish English": "scotland",
    "Irish English": "ireland",
    "Northern Irish": "northernireland",
    "Canadian English": "canada",
    "New Zealand English": "newzealand",
    "Welsh English": "wales",
    "India and South Asia (India, Pakistan, Sri Lanka)": "indian",
    "Filipino": "philippines",
    "Hong Kong English": "hongkong",
    "Malaysian English": "malaysia",
    "Singaporean English": "singapore",
    "Southern African (South Africa, Zimbabwe, Namibia)": "african",
    "South Atlantic (Falkland Islands, Saint Helena)": "southatlandtic",
    "West Indies and Bermuda (Bahamas, Bermuda, Jamaica, Trinidad)": "bermuda",
}


@pytest.mark.parametrize("code", OLD_CODES)
def test_an_old_code_is_its_own_label(code):
    assert parse(code) == ParsedAccent(code, None, (code,))


@pytest.mark.parametrize(("name", "label"), PRESET_NAMES.items())
def test_a_preset_name_of_later_releases(name, label):
    assert parse(name).label == label
    assert parse(f"  {name.upper().replace(' ', '  ')}\t").label == label
    assert name in labels.inverse(label)


@pytest.mark.parametrize(
    ("raw", "label"), [("en-US", "us"), ("en_AU", "australia"), ("American", "us"), ("us,", "us"), ("|us", "us")]
)
def test_short_spellings(raw, label):
    assert parse(raw).label == label


@pytest.mark.parametrize("raw", ["", "  ", None, "nan", "None", "|", " , "])
def test_no_accent(raw):
    assert parse(raw) == ParsedAccent(None, "no accent")


@pytest.mark.parametrize("raw", ["other", "British", "somewhere in Kent", "Slavic (Russian, Polish)", "a (b, c", "x|y"])
def test_unknown_accent(raw):
    parsed = parse(raw)
    assert (parsed.label, parsed.reason) == (None, "unknown accent")
    assert not any(parsed.parts)


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        ("England English,United States English", ("england", "us")),
        ("England English|Scottish English", ("england", "scotland")),
        ("India and South Asia (India, Pakistan, Sri Lanka),England English", ("indian", "england")),
        ("India and South Asia (India, Pakistan, Sri Lanka)|us", ("indian", "us")),
        ("us,us", ("us", "us")),
        ("us | US", ("us", "us")),
        ("United States English,Midwestern", ("us", None)),
        ("Irish English (Cork, Scottish English", (None, "scotland")),
    ],
)
def test_compound_accent(raw, parts):
    assert parse(raw) == ParsedAccent(None, "compound accent", parts)


def test_extra_spellings_win():
    assert parse("Geordie", {"geordie": "england"}).label == "england"
    assert parse("us", {"US": "northamerica"}).label == "northamerica"
    assert labels.inverse("england", {"Geordie": "england"})[-1] == "Geordie"
    assert parse("us").label == "us"


def test_no_spelling_belongs_to_two_labels():
    spelt = [labels.normalise(s) for label in labels.SPELLINGS for s in labels.inverse(label)]
    owners = {}
    for label in labels.SPELLINGS:
        for spelling in labels.inverse(label):
            assert owners.setdefault(labels.normalise(spelling), label) == label
            assert parse(spelling).label == label
    assert len(spelt) >= len(owners)


def test_three_accents_preset():
    assert labels.PRESETS["three"] == ("us", "england", "australia")


def test_sixteen_accents_preset():
    """Common Voice's codes up to version 7, without "other"; Northern Ireland came later."""
    assert len(labels.PRESETS["sixteen"]) == 16
    assert set(labels.PRESETS["sixteen"]) == set(labels.SPELLINGS) - {"northernireland"}


def test_preset_takes_names_and_lists():
    assert labels.preset("three") == ("us", "england", "australia")
    assert labels.preset("wales, us") == ("wales", "us")
    assert labels.preset(["kentish"]) == ("kentish",)


@pytest.mark.parametrize("accents", [[], ["us", "us"], "us,,england", [1], ""])
def test_preset_refuses(accents):
    with pytest.raises(ConfigError, match="distinct names, or one of three, sixteen"):
        labels.preset(accents)


@pytest.mark.parametrize(
    ("raw", "gender"),
    [
        ("male_masculine", "male"),
        ("female_feminine", "female"),
        ("Female", "female"),
        ("non-binary", "non-binary"),
        ("do_not_wish_to_say", ""),
        ("", ""),
        (None, ""),
    ],
)
def test_gender(raw, gender):
    assert labels.gender(raw) == gender


def test_a_mapping_is_written_either_way(tmp_path):
    (tmp_path / "map.yaml").write_text("Geordie: england\naustralia: [Strine, Ocker]\n", encoding="utf-8")
    mapping = labels.read_mapping(tmp_path / "map.yaml")
    assert [parse(raw, mapping).label for raw in ("geordie", "STRINE", "Ocker")] == [
        "england",
        "australia",
        "australia",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[Geordie]", "is not a table"),
        ("", "is not a table"),
        ("Geordie: [", "is not YAML"),
        ("no: england", "in quotes"),
        ("Geordie: null", "in quotes"),
        ("Geordie: ' '", "in quotes"),
        ("' ': england", "in quotes"),
        ("Geordie: england\ngeordie: wales", "maps 'geordie' to england and to wales"),
        ("!!python/object/apply:os.system [ls]", "is not YAML"),
    ],
)
def test_a_mapping_that_cannot_be_meant(tmp_path, text, message):
    (tmp_path / "map.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        labels.read_mapping(tmp_path / "map.yaml")


CORPORA = ["commonaccent", "edacc", "globe", "l2arctic", "parler", "slr83", "vctk", "voxprofile"]


def test_a_mapping_ships_for_each_corpus():
    assert labels.mapping_names() == CORPORA


@pytest.mark.parametrize("name", CORPORA)
def test_a_mapping_that_ships_names_its_source_and_contradicts_no_built_in_spelling(name):
    text = (Path(labels.__file__).parent / "mappings" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    mapping = labels.read_mapping(name)
    for spelling, label in mapping.items():
        assert parse(spelling, mapping).label == label
        assert parse(spelling).label in (None, label)


@pytest.mark.parametrize(
    ("name", "raw", "label"),
    [
        ("vctk", "English", "england"),
        ("vctk", "British", "england"),
        ("vctk", "NorthernIrish", "northernireland"),
        ("vctk", "SouthAfrican", "african"),
        ("vctk", "NewZealand", "newzealand"),
        ("vctk", "p248", "indian"),
        ("vctk", "p280", None),
        ("edacc", "Southern British English", "england"),
        ("edacc", "Mainstream US English", "us"),
        ("edacc", "Jamaican English", "bermuda"),
        ("edacc", "Ghanain English", "ghana"),
        ("edacc", "European", None),
        ("slr83", "midlands_english_female", "england"),
        ("slr83", "irish_male", "ireland"),
        ("slr83", "welsh_english_male", "wales"),
        ("globe", "Received Pronunciation", "england"),
        ("globe", "German English,Non native speaker", "german"),
        ("globe", "England English,New Zealand English", None),
        ("l2arctic", "Mandarin", "mandarin"),
        ("l2arctic", "TNI", "indian"),
        ("commonaccent", "southatlandtic", "southatlandtic"),
        ("voxprofile", "English", "england"),
        ("voxprofile", "South Asia", "indian"),
        ("voxprofile", "Oceania", "oceania"),
        ("voxprofile", "Other", None),
        ("parler", "English", "england"),
        ("parler", "en_GB", "england"),
        ("parler", "RP", "england"),
        ("parler", "AU", "australia"),
        ("parler", "en_pl", "polish"),
        ("parler", "Unknown", None),
    ],
)
def test_spellings_of_a_corpus(name, raw, label):
    assert parse(raw, labels.read_mapping(name)).label == label


def test_a_mapping_that_is_not_there(tmp_path):
    with pytest.raises(
        ConfigError, match="cannot be read: No such file .*\n.* or one of commonaccent, .*, voxprofile$"
    ):
        labels.read_mapping(tmp_path / "map.yaml")


@pytest.mark.parametrize("module", ["data.labels", "audio.codecs", "data.splits", "data.prepare"])
def test_no_heavy_import(module):
    code = f"import sys, accent_plugin.{module}; print([m for m in ('torch', 'datasets', 'tqdm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
