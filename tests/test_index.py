from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from voxelstem.errors import ConfigError, StoreError
from voxelstem.index import Entry, Index
from voxelstem.store.subjects import PSEUDONYM

SPACE, OUT = "5" * 64, 8


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def person(number: int) -> str:
    pseudonym = "s" + key(number)[:24]
    assert PSEUDONYM.fullmatch(pseudonym)
    return pseudonym


def unit(seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal(OUT)
    return (drawn / np.linalg.norm(drawn)).astype(np.float32)


def entry(number: int, *, subject: int | None = None) -> Entry:
    return Entry(key=key(number), subject=person(number if subject is None else subject), vector=unit(number))


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Ten scans of five people, of which three have a report."""
    made = Index.create(tmp_path / "index", space=SPACE, out=OUT).add([entry(n, subject=n % 5) for n in range(10)])
    return made.add_reports({key(n): unit(100 + n) for n in (7, 2, 4)})


def test_what_was_added_is_found_after_opening_again(index: Index):
    again = Index.open(index.path)
    assert len(again) == 10
    assert list(again.keys()) == [key(n) for n in range(10)]
    assert again.reported() == {key(2), key(4), key(7)}
    for number in range(10):
        first = again.best(unit(number), 1)[0]
        assert first.key == key(number)
        assert first.score == pytest.approx(1, abs=1e-3)
        np.testing.assert_allclose(again.vector(number), unit(number), atol=5e-4)


def test_scans_are_ordered_as_a_plain_sort_of_the_stored_numbers_orders_them(index: Index):
    query = unit(50)
    wanted = sorted(
        (-float(unit(n).astype(np.float16).astype(np.float64) @ query.astype(np.float64)), key(n)) for n in range(10)
    )
    found = index.best(query, 10)
    assert [hit.key for hit in found] == [name for _, name in wanted]
    np.testing.assert_allclose([hit.score for hit in found], [-score for score, _ in wanted], atol=1e-12)


def test_equal_scans_come_in_the_order_of_their_keys(tmp_path: Path):
    same = [Entry(key=key(n), subject=person(n), vector=unit(0)) for n in range(30)]
    index = Index.create(tmp_path / "i", space=SPACE, out=OUT).add(same)
    assert [hit.key for hit in index.best(unit(1), 7)] == sorted(key(n) for n in range(30))[:7]


def test_reports_are_searched_by_themselves_and_named_by_their_scans(index: Index):
    found = index.best(unit(104), 5, among="reports")
    assert found[0].key == key(4)
    assert {hit.key for hit in found} == {key(2), key(4), key(7)}
    hidden = index.of_subject(person(4))
    assert {hit.key for hit in index.best(unit(104), 5, among="reports", hidden=hidden)} == {key(2), key(7)}
    assert index.compared("reports", hidden) == 2


def test_a_patient_s_scans_can_be_hidden(index: Index):
    assert np.flatnonzero(index.of_subject(person(3))).tolist() == [3, 8]
    assert np.flatnonzero(index.of_same_subject(8)).tolist() == [3, 8]
    found = index.best(unit(3), 10, hidden=index.of_same_subject(8))
    assert {hit.key for hit in found} == {key(n) for n in range(10)} - {key(3), key(8)}


def test_many_questions_find_what_each_finds_alone(index: Index):
    queries = np.stack([unit(200 + n) for n in range(70)])
    together = index.best_of_each(queries, 4)
    assert together == [index.best(query, 4) for query in queries]


def test_a_key_is_found_by_how_it_begins(index: Index):
    for letters in (1, 2, 9, 64):
        starts = [n for n in range(10) if key(n).startswith(key(6)[:letters])]
        if len(starts) == 1:
            assert index.row(key(6)[:letters]) == 6
        else:
            with pytest.raises(ConfigError, match=f"{len(starts)} scans"):
                index.row(key(6)[:letters])
    assert index.row("0" * 16) is None


def test_an_interrupted_addition_leaves_the_index_as_it_was(index: Index):
    # What lies there when a process dies after it wrote a row and before it said so.
    with (index.path / "vectors.f16").open("ab") as file:
        file.write(unit(77).astype(np.float16).tobytes())
    again = Index.open(index.path)
    assert len(again) == 10
    assert (index.path / "vectors.f16").stat().st_size == 11 * 2 * OUT
    grown = again.add([entry(88)])
    assert (index.path / "vectors.f16").stat().st_size == 11 * 2 * OUT
    assert grown.best(unit(88), 1)[0].key == key(88)
    assert grown.best(unit(77), 1)[0].key != key(77)


def test_of_two_that_add_at_once_the_later_is_told_to_run_again(index: Index):
    other = Index.open(index.path)
    index.add([entry(20)])
    with pytest.raises(StoreError, match="another process"):
        other.add([entry(21)])


def test_nothing_is_added_twice_and_no_report_without_its_scan(index: Index):
    with pytest.raises(ConfigError, match="in the index already"):
        index.add([entry(3)])
    with pytest.raises(ConfigError, match="in the index already"):
        index.add([entry(30), entry(30)])
    with pytest.raises(ConfigError, match="1 reports are of scans"):
        index.add_reports({key(99): unit(1)})
    assert index.add_reports({key(2): unit(1)}).facts.texts == 3
    assert index.add([]) is index


@pytest.mark.parametrize("vector", [np.zeros(OUT), np.full(OUT, np.nan), np.ones(OUT), np.ones(OUT - 1)])
def test_only_vectors_of_length_one_get_in(index: Index, vector: np.ndarray):
    with pytest.raises(ConfigError, match=f"have {OUT} finite numbers and length 1"):
        index.add([Entry(key=key(50), subject=person(1), vector=vector)])
    assert len(Index.open(index.path)) == 10


def test_an_index_of_other_weights_is_refused(index: Index):
    assert len(Index.create(index.path, space=SPACE, out=OUT)) == 10
    with pytest.raises(ConfigError, match="was made by other weights"):
        Index.create(index.path, space="6" * 64, out=OUT)


def test_damage_is_said(index: Index, tmp_path: Path):
    facts = index.path / "index.json"
    whole = facts.read_text()
    for text in (
        "{",
        "[]",
        json.dumps({"space": SPACE}),
        *(whole.replace('"scans": 10', f'"scans": {x}') for x in ("-1", "true")),
        whole.replace('"out": 8', '"out": 0'),
        "[" * 99999,
    ):
        facts.write_text(text)
        with pytest.raises(StoreError, match="damaged"):
            Index.open(index.path)
    facts.write_text(whole.replace('"format": 1', '"format": 2'))
    with pytest.raises(StoreError, match="newer version"):
        Index.open(index.path)
    facts.write_text(whole)
    (index.path / "keys.bin").write_bytes(b"short")
    with pytest.raises(StoreError, match=r"keys\.bin .* cut short"):
        Index.open(index.path)
    with pytest.raises(StoreError, match="there is no index"):
        Index.open(tmp_path / "nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(StoreError, match="holds other files"):
        Index.create(tmp_path / "full", space=SPACE, out=OUT)


def test_questions_of_another_length_are_refused(index: Index):
    with pytest.raises(ValueError, match="queries are"):
        index.best(np.ones(OUT + 1), 1)
    with pytest.raises(ValueError, match="top >= 1"):
        index.best(np.ones(OUT), 0)


def test_an_empty_index_finds_nothing(tmp_path: Path):
    index = Index.create(tmp_path / "i", space=SPACE, out=OUT)
    assert index.best(unit(0), 3) == []
    assert index.best(unit(0), 3, among="reports") == []


def test_an_index_whose_making_was_killed_is_made_again(tmp_path: Path):
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "vectors.f16").touch()
    (tmp_path / "i" / ".index.json.unfinished").write_text("{")
    assert len(Index.create(tmp_path / "i", space=SPACE, out=OUT).add([entry(1)])) == 1
    assert len(Index.create(tmp_path / "i", space=SPACE, out=OUT)) == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "vectors.f16").write_bytes(b"somebody's")
    with pytest.raises(StoreError, match="holds other files"):
        Index.create(tmp_path / "full", space=SPACE, out=OUT)


def test_reports_of_scans_that_are_not_there_and_vectors_that_are_no_numbers_are_damage(index: Index):
    whole = (index.path / "texts.rows").read_bytes()
    for rows in ([7, 10, 4], [7, -1, 4]):
        (index.path / "texts.rows").write_bytes(np.array(rows, np.int32).tobytes())
        with pytest.raises(StoreError, match=r"texts\.rows .* damaged"):
            Index.open(index.path)
    (index.path / "texts.rows").write_bytes(whole)
    stored = np.fromfile(index.path / "vectors.f16", np.float16).reshape(10, OUT)
    stored[3, 0] = np.nan
    (index.path / "vectors.f16").write_bytes(stored.tobytes())
    with pytest.raises(StoreError, match="vectors of 'index' are damaged"):
        Index.open(index.path).best(unit(0), 2)


def test_a_question_without_numbers_is_refused(index: Index):
    with pytest.raises(ConfigError, match="no finite numbers"):
        index.best(np.full(OUT, np.nan, np.float32), 1)
