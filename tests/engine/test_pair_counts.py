from __future__ import annotations

from voxelstem.distributed import Ranks
from voxelstem.engine import pair_counts
from voxelstem.engine.pair_counts import PairCounts, shares
from voxelstem.engine.reading import Reading, Slot

SLOT = Slot(key="a" * 64, epoch=0, place=0, phases=(0, 1))
READING = Reading(
    partners=("a" * 64, "b" * 64),
    refused=((("c" * 64, "axes"), ("d" * 64, "field of view")), (("c" * 64, "axes"),)),
)


def counted(*samples: int) -> PairCounts:
    counts = PairCounts()
    for sample in samples:
        counts.add(SLOT, READING, sample)
    return counts


def test_only_the_sample_that_was_used_is_counted():
    assert counted(0).shares() == {"copy_share": 1.0, "pairs_refused": 2}
    assert counted(1).shares() == {"copy_share": 0.0, "pairs_refused": 1}
    assert counted(0, 1).shares() == {"copy_share": 0.5, "pairs_refused": 3}


def test_samples_without_a_second_scan_count_for_nothing():
    counts = PairCounts()
    assert counts.add(SLOT, Reading(), 0) == []
    assert counts.shares() == {}


def test_each_two_scans_are_told_once_and_in_words():
    counts = PairCounts()
    first = counts.add(SLOT, READING, 0)
    assert [(note["with"], note["unpaired"]) for note in first] == [("a" * 16, "c" * 16), ("a" * 16, "d" * 16)]
    assert [note["reason"] for note in first] == [pair_counts.REFUSALS[word] for word in ("axes", "field of view")]
    assert counts.add(SLOT, READING, 1) == []


def test_a_checkpoint_gives_back_what_each_process_counted_and_told():
    kept = [counted(0).facts(), counted(1).facts()]
    again = PairCounts()
    again.restore(kept, Ranks(rank=1, count=2))
    assert again == counted(1)
    again.restore([], Ranks())
    assert again == PairCounts()


def test_another_number_of_processes_goes_on_from_the_same_sum():
    kept = [counted(0).facts(), counted(1).facts()]
    one = PairCounts()
    one.restore(kept, Ranks())
    assert one == counted(0, 1)
    four = [PairCounts() for _ in range(4)]
    for rank, counts in enumerate(four):
        counts.restore(kept, Ranks(rank=rank, count=4))
    assert shares([counts.facts() for counts in four]) == shares(kept) == one.shares()
