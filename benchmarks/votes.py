"""What a unanimous vote of nearest neighbours is told as, once a temperature was fitted to few subjects.

    python benchmarks/votes.py [--cohorts 200]

Each of five neighbours is right by itself with the same chance; `truth` is then how often a unanimous vote is right.
Cohorts of 13, 30 and 200 labelled subjects fit the temperature; printed are the 10th, 50th and 90th of 100 cohorts,
as votes are taken and temperatures fitted now, and with plain shares and plain log loss.
"""

from __future__ import annotations

import argparse

import numpy as np

from voxelstem.certainty.calibrators import fit_temperature, log_probabilities
from voxelstem.heads.neighbours import softened

VOTERS = 5


def told(rng: np.random.Generator, subjects: int, right: float, *, now: bool) -> float:
    """Probability that a cohort's temperature gives to a vote without an opponent."""
    truth = np.arange(subjects) % 2
    agree = rng.random((subjects, VOTERS)) < right
    share = np.where(agree, truth[:, None], 1 - truth[:, None]).mean(axis=1)
    votes = np.stack([1 - share, share], axis=1)
    asked = np.array([0.0, 1.0])
    if now:
        votes, asked = np.array([softened(row, VOTERS) for row in votes]), softened(asked, VOTERS)
    fitted = fit_temperature(log_probabilities(votes), truth, modest=now)
    return float(fitted.apply(asked[None])[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=int, default=200)
    asked = parser.parse_args()
    print("| a neighbour is right | truth | subjects | before | now |\n|---|---|---|---|---|")
    for right in (0.5, 0.6, 0.75):
        truth = right**VOTERS / (right**VOTERS + (1 - right) ** VOTERS)
        for subjects in (13, 30, 200):
            cells = []
            for now in (False, True):
                rng = np.random.default_rng(0)
                found = [told(rng, subjects, right, now=now) for _ in range(asked.cohorts)]
                cells.append(" / ".join(f"{value:.3f}" for value in np.quantile(found, [0.1, 0.5, 0.9])))
            print(f"| {right} | {truth:.3f} | {subjects} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
