from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from voxelstem.losses.terms import Counted, Term, add_up, counted_mean

Cells = st.lists(st.tuples(st.floats(-5, 5, width=32), st.booleans()), min_size=1, max_size=20)


@given(cells=Cells)
def test_the_mean_is_over_what_is_known(cells: list[tuple[float, bool]]) -> None:
    values, known = torch.tensor([value for value, _ in cells]), torch.tensor([flag for _, flag in cells])
    found = counted_mean(values, known)
    kept = [value for value, flag in cells if flag]
    assert float(found.count) == len(kept)
    assert float(found.value) == pytest.approx(np.mean(kept) if kept else 0.0, abs=1e-5)


@given(shares=st.lists(Cells, min_size=2, max_size=4))
def test_the_mean_over_parts_is_the_mean_over_all_that_any_of_them_knows(shares: list) -> None:
    counts = torch.tensor([float(sum(flag for _, flag in cells)) for cells in shares])
    parts = [
        counted_mean(torch.tensor([v for v, _ in cells]), torch.tensor([f for _, f in cells]), count=counts.mean())
        for cells in shares
    ]
    kept = [value for cells in shares for value, flag in cells if flag]
    assert float(torch.stack([part.value for part in parts]).mean()) == pytest.approx(
        np.mean(kept) if kept else 0.0, abs=1e-4
    )


def test_a_term_that_rests_on_nothing_says_its_count_and_no_loss() -> None:
    slope = torch.tensor([2.0, 3.0], requires_grad=True)
    nothing = counted_mean(slope.square(), torch.zeros(2, dtype=torch.bool))
    out = add_up({"volumes": Term.of(5.0, nothing), "voxels": Term(weight=2.0, value=slope.sum())})
    assert out.scalars == {"loss/voxels": 5.0, "known/volumes": 0.0}
    assert float(out.loss.detach()) == 10.0
    out.loss.backward()
    assert slope.grad is not None
    assert slope.grad.tolist() == [2.0, 2.0]


def test_losses_are_said_unweighed_and_weighed_in_the_sum() -> None:
    some = Counted(value=torch.tensor(0.5), count=torch.tensor(3.0))
    out = add_up({"a": Term(weight=0.1, value=torch.tensor(4.0)), "b": Term.of(2.0, some)})
    assert float(out.loss) == pytest.approx(1.4)
    assert out.scalars == {"loss/a": 4.0, "loss/b": 0.5, "known/b": 3.0}
