from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from voxelstem import prompts as package
from voxelstem.errors import ConfigError
from voxelstem.prompts import NAMES, Prompts, read_prompts

PINNED = {
    ("abdomen", 1): "d80967261ebd879798be0bf76f17ec46b529c250b5240a7da76f88b68891d035",
    ("ct_rate", 1): "eb5934c89d8b4c4f2a549e6b90e3648141a4440d8457531fcc4dcfa3d858516b",
    ("phantom", 1): "e75c56b9c2f42c24875664bc4ed13eface88de86ad88c0edc56b10fb87ad2121",
}
"""Every version that was ever published: a changed set gets a new version and a new line, no line goes."""
SMALL = """
name = "small"
version = 3
language = "en"
about = "Two things."

[effusion_left]
positive = ["Fluid on the left.", "Left effusion."]
negative = ["No fluid on the left."]

[effusion_right]
positive = ["Fluid on the right."]
negative = ["No fluid on the right."]

[sides]
effusion = ["effusion_left", "effusion_right"]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "small.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_set_has_a_new_version(name: str) -> None:
    found = read_prompts(name)
    assert PINNED.get((name, found.version)) == found.sha256, (
        f"{name}.toml changed: raise its version and pin ({name!r}, {found.version + 1})"
    )


def test_every_file_of_the_package_has_a_name_and_no_name_is_without_file() -> None:
    files = Path(package.__file__).parent.glob("*.toml")
    assert sorted(path.stem for path in files) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_class_is_said_and_denied_in_several_ways(name: str) -> None:
    found = read_prompts(name)
    assert (found.name, found.language) == (name, "en")
    assert all(len(said.positive) >= 3 and len(said.negative) >= 3 for said in found.ensembles.values())
    assert found.count == sum(len(said.positive) + len(said.negative) for said in found.ensembles.values())


def test_the_set_for_ct_rate_asks_for_the_18_findings_that_reports_are_searched_for() -> None:
    import tomllib

    from voxelstem import views

    table = tomllib.loads((Path(views.__file__).parent / "findings_ct_rate.toml").read_text())
    prompts = read_prompts("ct_rate")
    assert [prompts.spelt(finding["name"]) for finding in table["finding"]] == list(prompts.classes)
    assert len(prompts.classes) == 18


@pytest.mark.parametrize("name", NAMES)
def test_left_and_right_are_said_in_the_same_words(name: str) -> None:
    found = read_prompts(name)
    for left, right in found.sides.values():
        one, other = found.ensembles[left], found.ensembles[right]
        assert tuple(text.replace("left", "right") for text in one.positive) == other.positive
        assert tuple(text.replace("left", "right") for text in one.negative) == other.negative


def test_a_file_of_ones_own_is_read_whole(tmp_path: Path) -> None:
    path = written(tmp_path, SMALL)
    found = read_prompts(path)
    assert (found.name, found.version, found.classes) == ("small", 3, ("effusion_left", "effusion_right"))
    assert found.ensembles["effusion_left"].positive == ("Fluid on the left.", "Left effusion.")
    assert found.sides == {"effusion": ("effusion_left", "effusion_right")}
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert str(found) == f"small v3 (sha256 {found.sha256[:16]})"


def small(tmp_path: Path) -> Prompts:
    return read_prompts(written(tmp_path, SMALL))


@pytest.mark.parametrize("name", ["effusion_left", "Effusion left", "EFFUSION-LEFT", " effusion  left "])
def test_spelling_does_not_matter(tmp_path: Path, name: str) -> None:
    assert small(tmp_path).spelt(name) == "effusion_left"


def test_an_unknown_class_gets_the_closest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'effusion_left'"):
        small(tmp_path).only(["efusion left"])
    with pytest.raises(ConfigError, match="named twice"):
        small(tmp_path).only(["effusion_left", "Effusion left"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version = 3", "version = 0", "'version' must be a whole number"),
        ("version = 3", 'version = "3"', "'version' must be a whole number"),
        ("version = 3", "version = true", "'version' must be a whole number"),
        ('name = "small"', "", "'name' must be a text"),
        ("about =", "abuot =", "did you mean 'about'"),
        ("[effusion_left]", "[Effusion left]", "is not TOML"),
        ("[effusion_left]", '["Effusion left"]', "not one lower-case word"),
        ('positive = ["Fluid on the left."', 'positiv = ["Fluid on the left."', "did you mean 'positive'"),
        ('["Fluid on the right."]', "[]", "no positive prompt"),
        ('["Fluid on the right."]', '["  "]', "none empty"),
        ('["Fluid on the right."]', '"Fluid"', "must be a list"),
        ('["Fluid on the right."]', '["a", "a"]', "twice"),
        ('["Fluid on the right."]', '["No fluid on the right."]', "as positive and as negative"),
        ('"effusion_left", "effusion_right"', '"effusion_left"', "a left and a right"),
        ('"effusion_left", "effusion_right"', '"effusion_left", "efusion_right"', "did you mean 'effusion_right'"),
    ],
)
def test_a_wrong_file_is_one_clear_sentence(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SMALL
    with pytest.raises(ConfigError, match=message):
        read_prompts(written(tmp_path, SMALL.replace(old, new, 1)))


def test_unknown_sets_and_absent_files_are_said_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'ct_rate'"):
        read_prompts("ct-rate")
    with pytest.raises(ConfigError, match=r"no prompt file 'absent\.toml'"):
        read_prompts(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="names no class"):
        read_prompts(written(tmp_path, 'name = "x"\nversion = 1\nlanguage = "en"\nabout = "y"\n'))
