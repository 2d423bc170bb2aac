from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelstem.config import flatten, overlay, parse_assignments, read_toml, to_toml, without_places
from voxelstem.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Warmup:
    share: float = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Optim:
    lr: float = 1e-3
    name: Literal["adamw", "sgd"] = "adamw"
    warmup: Warmup = field(default_factory=Warmup)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    steps: int = 10
    compile: bool = False
    note: str = ""
    limit: float | None = None
    size: tuple[int, int, int] = (8, 8, 8)
    scales: tuple[float, ...] = (0.5, 1.0)
    names: tuple[str, ...] = ()
    kinds: tuple[Literal["near"], ...] | None = None
    optim: Optim = field(default_factory=Optim)
    cooldown: Warmup | None = field(default_factory=Warmup)


texts = st.text(st.characters(codec="utf-8"))
numbers = st.floats(allow_nan=False)
runs = st.builds(
    Run,
    steps=st.integers(-(2**63), 2**63 - 1),
    compile=st.booleans(),
    note=texts,
    limit=st.none() | numbers,
    size=st.tuples(*[st.integers(-100, 100)] * 3),
    scales=st.lists(numbers, max_size=4).map(tuple),
    optim=st.builds(
        Optim,
        lr=st.floats(min_value=0, exclude_min=True, allow_nan=False),
        name=st.sampled_from(["adamw", "sgd"]),
        warmup=st.builds(Warmup, share=numbers),
    ),
    cooldown=st.none() | st.builds(Warmup, share=numbers),
)


@given(runs)
def test_a_written_config_replays_exactly(tmp_path_factory: pytest.TempPathFactory, run: Run):
    path = tmp_path_factory.mktemp("run") / "config.toml"
    path.write_text(to_toml(run), encoding="utf-8")
    assert overlay(Run(), read_toml(path)) == run


@given(runs)
def test_a_line_of_a_written_config_works_on_the_command_line(run: Run):
    assert overlay(Run(), parse_assignments(to_toml(run).strip("\n").split("\n"))) == run


@given(runs)
def test_flattening_and_overlaying_give_the_config_back(run: Run):
    assert overlay(Run(), flatten(run)) == run


def test_not_a_number_replays_too(tmp_path: Path):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(Run(limit=math.nan)))
    assert math.isnan(overlay(Run(), read_toml(path)).limit or 0.0)


def test_a_difference_changes_one_setting_and_no_other():
    assert overlay(Run(), {"optim.warmup.share": 0.2}) == replace(Run(), optim=Optim(warmup=Warmup(share=0.2)))


def test_the_recipe_is_left_alone():
    recipe = Run()
    overlay(recipe, {"steps": 20, "optim.lr": 1.0})
    assert recipe == Run()


def test_tables_and_dotted_names_are_the_same(tmp_path: Path):
    path = tmp_path / "config.toml"
    path.write_text("steps = 3\n[optim]\nlr = 1\n[optim.warmup]\nshare = 0.5\n")
    assert read_toml(path) == {"steps": 3, "optim.lr": 1, "optim.warmup.share": 0.5}


def test_lists_become_tuples_and_ints_become_floats():
    run = overlay(Run(), {"size": [1, 2, 3], "scales": [1, 2], "optim.lr": 1})
    assert run.size == (1, 2, 3)
    assert all(isinstance(scale, float) for scale in (*run.scales, run.optim.lr))


def test_an_optional_group_is_switched_off_by_the_word_none_too():
    assert overlay(Run(), parse_assignments(["cooldown=none"])) == Run(cooldown=None)


def test_an_optional_setting_is_switched_off_by_the_word_none():
    assert overlay(Run(limit=1.0), parse_assignments(["limit=none"])).limit is None


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.lrr=1", r"^unknown setting 'optim.lrr'\n  hint: did you mean 'lr'\?$"),
        ("optimm.lr=1", r"^unknown setting 'optimm'\n  hint: did you mean 'optim'\?$"),
        ("compile=3", "^compile must be bool, got 3$"),
        ("steps=true", "^steps must be int, got True$"),
        ("steps=1.5", "^steps must be int, got 1.5$"),
        ("optim.lr=fast", "^optim.lr must be float, got 'fast'$"),
        ("optim.lr=true", "^optim.lr must be float, got True$"),
        ("note=3", "^note must be str, got 3$"),
        ("optim.name=adam", "^optim.name must be one of 'adamw', 'sgd', got 'adam'\n  hint: did you mean 'adamw'[?]$"),
        ("size=[1, 2]", r"^size must have 3 values, got 2: \[1, 2\]$"),
        ("size=[1, 2, x]", r"^size must be a list such as '\[1, 1, 1\]', got '\[1, 2, x\]'$"),
        ("scales=1", r"^scales must be a list such as '\[0.5, 0.5\]', got 1$"),
        ("names=knn", r"^names must be a list such as '\[\"NAME\", \"NAME\"\]', got 'knn'$"),
        ("kinds=far", r"^kinds must be a list such as '\[\"near\", \"near\"\]' or none, got 'far'$"),
        ("size=[1, 2, 0.5]", r"^size\[2\] must be int, got 0.5$"),
        ("limit=high", "^limit must be float or none, got 'high'$"),
        (
            "optim=adamw",
            "^'optim' is a group of settings, got 'adamw'\n  hint: set one: optim.lr, optim.name, optim.warmup$",
        ),
        ("steps.lr=1", "^'steps' is one value, not a group, so 'steps.lr' is unknown$"),
        (
            "optim.lr=-1",
            "^optim: lr must be positive, got -1.0\n  hint: give 'optim.lr' another value, or leave it out$",
        ),
    ],
)
def test_a_wrong_setting_is_told_in_one_sentence(assignment: str, message: str):
    with pytest.raises(ConfigError, match=message):
        overlay(Run(), parse_assignments([assignment]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Ends:
    low: int = 0
    high: int = 9

    def __post_init__(self) -> None:
        if self.low < 0:
            raise ValueError(f"low must not be negative, got {self.low}")
        if self.low > self.high:
            raise ValueError("the ends are swapped")


@pytest.mark.parametrize(
    ("assignments", "hint"),
    [
        (["low=-1"], "give 'low' another value, or leave it out"),
        (["high=5", "low=-1"], "give 'low' another value, or leave it out"),
        (["low=10"], "give 'low' another value, or leave it out"),
        # Which of the two it was nobody knows.
        (["high=5", "low=6"], ""),
    ],
)
def test_a_value_that_a_config_refuses_is_named_where_that_is_known(assignments: list[str], hint: str):
    with pytest.raises(ConfigError) as caught:
        overlay(Ends(), parse_assignments(assignments))
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1e-3", 0.001),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("probe", "probe"),
        ("a=b", "a=b"),
        ('"7"', "7"),
        ("", ""),
    ],
)
def test_values_on_the_command_line_are_toml_and_bare_words_are_text(text: str, value: object):
    assert parse_assignments([f"a.b={text}"]) == {"a.b": value}


@given(texts.map(lambda text: text.strip()))
def test_no_value_can_smuggle_in_a_second_setting(text: str):
    assert list(parse_assignments([f"a={text}"])) == ["a"]


@pytest.mark.parametrize("words", [["lr"], ["=1"], ["lr=1", "lr=2"]])
def test_a_word_that_is_no_assignment_is_refused(words: list[str]):
    with pytest.raises(ConfigError):
        parse_assignments(words)


def test_an_absent_file_and_a_broken_file_are_told_apart(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"there is no config file 'absent.toml'"):
        read_toml(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("lr = = 1")
    with pytest.raises(ConfigError, match=r"config file 'broken.toml' is not TOML: .*line 1"):
        read_toml(tmp_path / "broken.toml")


def test_a_setting_that_toml_cannot_hold_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        place: object

    with pytest.raises(ConfigError, match="cannot be written"):
        to_toml(Odd(place=object()))


def test_settings_for_others_name_a_folder_and_not_where_it_lies():
    settings = {"objective.text.source": "/srv/someone/qwen", "loader.source": "blosc2", "source.seed": 3, "lr": 0.1}
    assert without_places(settings) == settings | {"objective.text.source": "qwen"}


def test_settings_for_others_name_no_file_of_a_user_wherever_it_lies():
    settings = {
        "features": "cache/of/alice",
        "like": "C:\\klinik\\alice\\weights",
        "head.prompts": "klinik-bern/alice/p.toml",
        "head.tokenizer": "~/tokens",
        "some.other": "/srv/alice/file.csv",
        "another": "D:/alice/x",
        "see.region": "left/right lung",
        "title": "ratio 1:2",
        "seed": 3,
    }
    told = {"features": "alice", "like": "weights", "head.prompts": "p.toml", "head.tokenizer": "tokens"}
    assert without_places(settings) == settings | told | {"some.other": "file.csv", "another": "x"}
    everybodys = {"like": "hub:owner/name@v1", "head.prompts": "ct_rate", "head.tokenizer": None}
    assert without_places(everybodys) == everybodys
