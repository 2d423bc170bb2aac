from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from voxelstem.report.run import summary
from voxelstem.report.training import training_page, warnings

SOURCE = "estimated (10 W per busy core)"
LINES = [
    {"step": 0, "loss": 3.0, "lr": 0.0, "grad_norm": 2.0, "seconds": 10.0, "effective_rank": 20.0, "spread/cls": 0.9}
    | {"probe/patch_knn": 0.25, "kwh": 0.1, "energy": SOURCE, "data_wait_share": 0.01, "look_seconds": 1.5},
    {"step": 1, "skipped": "the loss is <not> a number", "samples": ["3fa277b1", "c44a8e90"]},
    {"step": 2, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "seconds": 20.0},
    {"step": 3, "effective_rank": 18.0, "spread/cls": 0.8, "probe/patch_knn": 0.5, "data_wait_share": 0.02},
]


def facts(lines: list[dict[str, Any]] = LINES, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "recipe": "tiny.dino",
        "steps": 3,
        "finished": True,
        "checkpoints": ["step-00000003"],
        "bytes": 2**21,
        "settings": {"optim.lr": 0.1, "recipe": "tiny.dino"},
        "begun_from": "",
        "data": ["4 CT scans from nifti sources"],
    }
    return found | summary(lines, batch=4) | changes


def text(html: str) -> str:
    """What a reader sees."""
    seen: list[str] = []
    parser = HTMLParser()
    parser.handle_data = seen.append  # type: ignore[method-assign]
    parser.feed(html)
    return " ".join(" ".join(seen).split())


def test_a_page_holds_cost_health_and_what_was_left_out():
    said = text(training_page(facts(), LINES))
    for part in (
        "Pretraining tiny.dino",
        "2 of 3 steps, finished",
        "kNN probe 0.25 0.5 +0.25",
        "rank of patches 20 18 -2",
        "Samples 8",
        "Time 0 min 20 s",
        "Waiting for data 2.0%",
        f"0.1 kWh, {SOURCE}",
        "step-00000003",
        "4 CT scans from nifti sources",
        "1 the loss is <not> a number 3fa277b1, c44a8e90",
        "optim.lr 0.1",
        "Not a medical device",
        "The energy is an estimate",
    ):
        assert part in said
    assert "The run began from weights" not in said


def test_a_page_fetches_nothing_and_escapes_what_it_shows():
    html = training_page(facts(), LINES)
    assert "<not>" not in html
    assert "http:" not in html.replace("http-equiv", "")
    assert "<script" not in html
    assert html.count("<img") == html.count("data:image/png;base64") == 1


def test_a_continued_run_says_what_it_gained_or_forgot():
    said = text(training_page(facts(begun_from="0123456789abcdef"), LINES))
    assert "The run began from weights 0123456789abcdef" in said
    assert "made the network forget" in said


def test_a_healthy_run_has_no_warning():
    assert warnings(facts()) == []
    assert "Nothing stands out" in training_page(facts(), LINES)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"probe/patch_knn": 0.25}, "The kNN probe did not rise"),
        ({"effective_rank": 9.0}, "The rank of patches fell from 20 to 9: look for collapse"),
        ({"spread/cls": 0.1}, "The spread of blocks fell to 0.1"),
        ({"data_wait_share": 0.5}, "waited 50% of its time"),
        ({"teacher_information": 0.001}, "one answer to all views"),
        ({"rolled_back_to": 2, "excluded": [2]}, "went back to a checkpoint: 1;"),
    ],
)
def test_what_stands_out_is_said(line: dict[str, Any], said: str):
    (warning,) = warnings(facts([*LINES, {"step": 4, **line}]))
    assert said in warning


def test_a_run_that_began_only_now_has_a_page():
    nothing = training_page(facts([], finished=False, checkpoints=[], settings={}, data=[], steps=None), [])
    said = text(nothing)
    for part in ("0 steps, not finished", "was not looked at yet", "Energy not measured", "holds no config.toml"):
        assert part in said


def test_ways_back_and_quarantined_scans_are_listed():
    lines = [
        *LINES,
        {"step": 2, "rolled_back_to": 2, "excluded": [2, 3]},
        {"step": 3, "quarantined": "77b1", "reason": "damaged"},
    ]
    said = text(training_page(facts(lines), lines))
    assert "2 too many bad steps 2, 3" in said
    assert "77b1 3 damaged" in said


def test_long_lists_are_cut_and_say_so():
    lines = [{"step": n, "skipped": "the loss is not a number", "samples": []} for n in range(60)]
    assert "the first 50 of 60" in training_page(facts(lines), lines)


def test_settings_on_the_page_name_no_folder_of_a_user():
    said = training_page(facts(settings={"objective.text.source": "/srv/qzxvornq/towers/qwen"}), [])
    assert "qwen" in said
    assert "qzxvornq" not in said
