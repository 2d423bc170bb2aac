"""The command that searches: fill an index, ask it, and measure how often it is right."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from voxelstem.errors import ConfigError
from voxelstem.terminal import DONE, answer, listed, refused, verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """How the index is asked."""

    top: int = 10
    """How many of the best are listed."""
    among: Literal["scans", "reports"] = "scans"
    """What is compared with the question: indexed scans, or their reports."""
    exclude_same_patient: bool = False
    """Leave out other scans of the patient whose scan is asked with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measuring:
    """How often the index is right."""

    protocol: str | None = None
    """Measure instead of asking: ct-rate-full-report, merlin-findings, merlin-impressions or merlin-full-report."""
    store: Path | None = None
    """With --protocol, the store that holds the indexed scans and their reports."""
    split: Literal["any", "train", "validation", "test"] = "any"
    """With --protocol, measure on this part of the store."""
    seed: int = 0
    """With --protocol, of the random pools."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Aligning:
    """What brings scans and words into one space."""

    weights: str | None = None
    """Aligned weights: a folder or a name that `voxelstem models` lists; those inside the index when left out."""
    tokenizer: Path | None = None
    """Folder of the text tower's tokenizer, for weights that came without it (SPECTRE's)."""
    commercial: bool = False
    """With --add, say that the use is commercial: weights whose licence forbids that are refused."""


def search(
    question: str | None = None,
    /,
    *,
    index: Path,
    add: Annotated[list[Path] | None, Parameter(consume_multiple=True)] = None,
    asking: Annotated[Asking, Parameter(name="*")] = Asking(),
    measuring: Annotated[Measuring, Parameter(name="*")] = Measuring(),
    aligning: Annotated[Aligning, Parameter(name="*")] = Aligning(),
    json: bool = False,
) -> int:
    """Find the scans that are most like a text or a scan, among all of an index.

    For example:

        voxelstem search --index index --add store --weights runs/aligned/weights

        voxelstem search --index index "pleural effusion on the left"

        voxelstem search --index index scan.nii.gz --exclude-same-patient

    Args:
        question: A text, a .txt file with one, a scan's path, or the first letters of an indexed scan's key.
        index: Folder of the index.
        add: Add the scans and reports of stores, or what `voxelstem embed` made; run again, it goes on.
        asking: How the index is asked.
        measuring: How often it is right.
        aligning: What brings scans and words into one space.
        json: Answer in JSON.
    """
    wanted = [question is not None, add is not None, measuring.protocol is not None]
    if sum(wanted) != 1:
        raise ConfigError(
            "say one of: a question, --add or --protocol", hint="`voxelstem search --help` shows an example of each"
        )
    if add is not None:
        return _add(index, add, aligning, as_json=json)
    from voxelstem.search import Search

    asked = Search(index, weights=aligning.weights, tokenizer=aligning.tokenizer)
    if measuring.protocol is not None:
        return _measure(asked, measuring.protocol, measuring, as_json=json)
    assert question is not None
    found = asked.find(question, top=asking.top, among=asking.among, exclude_same_patient=asking.exclude_same_patient)
    # The question is not said again: it may be a report.
    lines = [f"{place:>4}  {hit.score:+.4f}  {hit.key}" for place, hit in enumerate(found.hits, start=1)]
    facts = {"asked": found.asked, "among": found.among, "pool": found.pool, "hits": list(map(asdict, found.hits))}
    answer(facts, "\n".join([*lines, f"the best {len(found.hits)} of {found.pool} {found.among}"]), as_json=json)
    return DONE


def _add(index: Path, sources: list[Path], aligning: Aligning, *, as_json: bool) -> int:
    from voxelstem.indexer import build

    built = build(
        index, sources, weights=aligning.weights, tokenizer=aligning.tokenizer, commercial=aligning.commercial
    )
    facts = {name: value for name, value in asdict(built).items() if name != "refusals"}
    facts |= {"refused": len(built.refusals), "refusals": listed(built.refusals)}
    lines = refused(built.refusals)
    if built.cut:
        lines.append(f"{built.cut} reports are longer than the text tower reads: their ends count for nothing")
    lines.append(f"{built.added} added, {built.there} there already, {len(built.refusals)} refused")
    lines.append(f"{built.reports} reports added; {built.scans} scans in {index}")
    answer(facts, "\n".join(lines), as_json=as_json)
    return verdict(built.added + built.there, len(built.refusals), "give a store of the weights' modality")


def _measure(asked: Any, name: str, measuring: Measuring, *, as_json: bool) -> int:
    from voxelstem.store import Store

    if measuring.store is None:
        raise ConfigError("--protocol reads the reports from a store", hint="add --store with the indexed scans")
    found = asked.measure(name, Store.open(measuring.store), split=measuring.split, seed=measuring.seed)
    protocol = found.protocol
    published = [asdict(figure) for figure in protocol.published]
    facts = {
        "protocol": protocol.name,
        "studies": found.studies,
        "not_indexed": found.not_indexed,
        "without_text": found.without_text,
        "recalls": [asdict(line) | {"chance": line.chance} for line in found.recalls],
        "published_elsewhere": {"source": protocol.source, "figures": published},
    }
    beside = f"{found.not_indexed} not in the index, {found.without_text} without that section"
    lines = [f"{protocol.name}: {found.studies} studies, report to scan; {beside}", *map(str, found.recalls)]
    lines.append(f"for comparison, others' figures on others' pools ({protocol.source}):")
    lines += [f"  {one.model}: R@{one.k} of a pool of {one.pool}: {one.percent:.1f} %" for one in protocol.published]
    answer(facts, "\n".join(lines), as_json=as_json)
    return DONE
