from __future__ import annotations

from voxelstem.seen import BEFORE, digests_of, seen_digest, seen_line


def test_the_order_of_scans_changes_nothing_and_one_more_scan_does() -> None:
    assert seen_digest(["b", "a", "a"]) == seen_digest(["a", "b"])
    assert seen_digest(["a", "b"]) != seen_digest(["a", "b", "c"])
    assert seen_digest(["ab"]) != seen_digest(["a", "b"])


def test_a_card_s_lines_give_the_digest_of_every_pretraining() -> None:
    last, first = seen_line(["a"]), seen_line(["b"])
    data = (f"{BEFORE}5 CT scans", f"{BEFORE}{first}", "3 CT scans", last)
    assert digests_of(data) == (seen_digest(["a"]), seen_digest(["b"]))
    assert digests_of((f"{BEFORE}{BEFORE}{first}", f"{BEFORE}{first}", last)) == (
        seen_digest(["a"]),
        seen_digest(["b"]),
        seen_digest(["b"]),
    )


def test_one_pretraining_without_a_digest_makes_all_unknown() -> None:
    last = seen_line(["a"])
    assert digests_of(()) == ()
    assert digests_of(("3 CT scans",)) == ()
    assert digests_of((f"{BEFORE}5 CT scans", "3 CT scans", last)) == ()
    assert digests_of((last + "0",)) == ()
