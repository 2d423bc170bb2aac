from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.spaces import PLANTED, aligned_weights, reported_store

from voxelstem.store import Store
from voxelstem.terminal import DONE, SOME_REFUSED, WRONG

FLAGS = [
    *(
        "--index",
        "--add",
        "--top",
        "--among",
        "--exclude-same-patient",
        "--page",
        "--protocol",
        "--store",
        "--split",
        "--seed",
    ),
    *("--weights", "--tokenizer", "--commercial", "--json"),
]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    reported_store(tmp_path / "store", scans=3)
    aligned_weights(tmp_path / "weights")
    return tmp_path


def test_help_names_every_flag_and_shows_examples(say):
    code, out, _ = say("search", "--help")
    assert code == DONE
    assert "voxelstem search --index index" in out.split("For example:")[1]
    assert [flag for flag in FLAGS if flag not in out] == []


def test_an_index_is_built_asked_and_measured(say, home: Path):
    index = home / "index"
    code, out, _ = say("search", "--index", index, "--add", home / "store", "--weights", home / "weights", "--json")
    assert (code, json.loads(out)) == (
        DONE,
        {"added": 3, "there": 0, "reports": 3, "cut": 0, "silent": 0, "scans": 3, "refused": 0, "refusals": []},
    )
    code, out, err = say("search", "--index", index, f"{PLANTED}: a nodule of 4 mm", "--top", "2", "--json")
    found = json.loads(out)
    assert (code, found["asked"], found["among"], found["pool"], len(found["hits"])) == (DONE, "text", "scans", 3, 2)
    assert PLANTED not in out + err
    key = found["hits"][0]["key"]
    code, out, _ = say("search", "--index", index, key[:16], "--exclude-same-patient", "--among", "reports")
    lines = out.splitlines()
    assert code == DONE
    assert lines[-1] == "the best 2 of 2 reports"
    assert key not in out
    assert lines[0].startswith("   1  ")
    code, out, _ = say(
        "search", "--index", index, "--protocol", "ct-rate-full-report", "--store", home / "store", "--split", "any"
    )
    assert code == DONE
    assert out.startswith(
        "ct-rate-full-report-1: 3 studies, report to scan; 0 not in the index, 0 without that section\n"
    )
    assert "R@5 of a pool of 3: 1.000" in out
    assert "others' figures on others' pools" in out
    assert "SPECTRE: R@5 of a pool of 1564: 17.5 %" in out
    words = (
        "search",
        "--index",
        index,
        "--protocol",
        "ct-rate-full-report",
        "--store",
        home / "store",
        "--split",
        "any",
        "--json",
    )
    facts = json.loads(say(*words)[1])
    assert (facts["split"], facts["seed"]) == ("any", 0)
    assert [line["pool"] for line in facts["recalls"]] == [3] * 4
    assert facts["published_elsewhere"]["figures"][0] == {"model": "CT-CLIP", "pool": 1564, "k": 5, "percent": 2.9}


def test_a_store_with_a_damaged_scan_is_indexed_in_part(say, home: Path):
    damaged = next(path for path in sorted((home / "store" / "volumes").rglob("*")) if path.is_file())
    damaged.write_bytes(b"")
    words = ("search", "--index", home / "index", "--add", home / "store", "--weights", home / "weights")
    code, out, _ = say(*words)
    assert code == SOME_REFUSED
    assert "refused (damaged) volume" in out
    assert "2 added, 0 there already, 1 refused" in out


def test_one_thing_is_asked_at_a_time(refusal, home: Path):
    assert "say one of" in refusal("search", "--index", home / "index")
    assert "say one of" in refusal("search", "text", "--index", home / "index", "--add", home / "store")
    assert "there is no index" in refusal("search", "text", "--index", home / "nothing")


def test_a_protocol_needs_a_store(say, refusal, home: Path):
    say("search", "--index", home / "index", "--add", home / "store", "--weights", home / "weights")
    assert "reads the reports from a store" in refusal(
        "search", "--index", home / "index", "--protocol", "merlin-findings"
    )


def test_several_questions_make_a_page_with_a_picture_for_every_scan(say, home: Path):
    index, page = home / "index", home / "out" / "found.html"
    assert say("search", "--index", index, "--add", home / "store", "--weights", home / "weights")[0] == DONE
    words = ("search", "--index", index, "calcified <nodule>", "no spleen", "--top", "2", "--page", page)
    code, _, err = say(*words)
    assert code == WRONG
    assert "--store" in err
    code, out, _ = say(*words, "--store", home / "store")
    assert (code, out.strip()) == (DONE, str(page))
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 4
    assert "calcified &lt;nodule&gt;" in text
    assert "ot a medical device" in text
    assert "the search did not read them" in text


def test_a_page_says_what_was_compared_and_shows_no_path(say, home: Path):
    index, page = home / "index", home / "found.html"
    assert say("search", "--index", index, "--add", home / "store", "--weights", home / "weights")[0] == DONE
    record = next(iter(Store.open(home / "store")))
    (home / PLANTED).mkdir()
    (home / PLANTED / "asked.txt").write_text("effusion")
    asked = ("search", "--index", index, home / PLANTED / "asked.txt", record.key, "--page", page)
    assert say(*asked, "--store", home / "store", "--among", "reports", "--top", "1")[0] == DONE
    text = page.read_text()
    assert f"{PLANTED}/" not in text
    assert "“question 1: a text from a file”" in text
    assert f"“scan {record.key[:16]}”" in text
    assert "the search did not read them" not in text
    assert "Best 1 of a pool of 3 reports." in text


def test_without_a_page_there_is_one_question(say, home: Path):
    assert say("search", "--index", home / "index", "--add", home / "store", "--weights", home / "weights")[0] == DONE
    code, _, err = say("search", "--index", home / "index", "one", "two")
    assert code == WRONG
    assert "one question at a time, got 2" in err
