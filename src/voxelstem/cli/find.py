"""The command that searches: fill an index, ask it, and measure how often it is right."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from voxelstem.errors import ConfigError
from voxelstem.terminal import DONE, answer, listed, refused, verdict

if TYPE_CHECKING:
    from voxelstem.search import Found, Search


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """How the index is asked."""

    top: int = 10
    """How many of the best are listed."""
    among: Literal["scans", "reports"] = "scans"
    """What is compared with the question: indexed scans, or their reports."""
    exclude_same_patient: bool = False
    """Leave out other scans of the patient whose scan is asked with."""
    page: Path | None = None
    """Write the best scans of each question, with pictures and the first words of reports out of --store, to this HTML
    page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measuring:
    """How often the index is right."""

    protocol: str | None = None
    """Measure instead of asking: ct-rate-full-report, merlin-findings, merlin-impressions or merlin-full-report."""
    store: Path | None = None
    """With --protocol and --page, the store that holds the indexed scans and their reports."""
    split: Literal["any", "train", "validation", "test"] = "test"
    """With --protocol, measure on this part of the store; `any` takes what may have been trained on too."""
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
    *questions: str,
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

        voxelstem search --index index "calcified nodule" "no spleen" --top 5 --page found.html --store store

    Args:
        questions: A text, a .txt file with one, a scan's path, or the first letters of an indexed scan's key; several
            with --page.
        index: Folder of the index.
        add: Add the scans and reports of stores, or what `voxelstem embed` made; run again, it goes on.
        asking: How the index is asked.
        measuring: How often it is right.
        aligning: What brings scans and words into one space.
        json: Answer in JSON.
    """
    question = next(iter(questions), None)
    wanted = [question is not None, add is not None, measuring.protocol is not None]
    if sum(wanted) != 1:
        raise ConfigError(
            "say one of: a question, --add or --protocol", hint="`voxelstem search --help` shows an example of each"
        )
    if len(questions) > 1 and asking.page is None:
        raise ConfigError(f"one question at a time, got {len(questions)}", hint="or write them all to a --page")
    if add is not None:
        return _add(index, add, aligning, as_json=json)
    from voxelstem.search import Search

    asked = Search(index, weights=aligning.weights, tokenizer=aligning.tokenizer)
    if measuring.protocol is not None:
        return _measure(asked, measuring.protocol, measuring, as_json=json)
    if asking.page is not None:
        return _draw(asked, questions, asking.page, asking, store=measuring.store, as_json=json)
    assert question is not None
    found = _ask(asked, question, asking)
    # The question is not said again: it may be a report.
    lines = [f"{place:>4}  {hit.score:+.4f}  {hit.key}" for place, hit in enumerate(found.hits, start=1)]
    facts = {"asked": found.asked, "among": found.among, "pool": found.pool, "hits": list(map(asdict, found.hits))}
    answer(facts, "\n".join([*lines, f"the best {len(found.hits)} of {found.pool} {found.among}"]), as_json=json)
    return DONE


def _ask(asked: Search, question: str, asking: Asking) -> Found:
    return asked.find(question, top=asking.top, among=asking.among, exclude_same_patient=asking.exclude_same_patient)


def _draw(
    asked: Search, questions: tuple[str, ...], page: Path, asking: Asking, *, store: Path | None, as_json: bool
) -> int:
    """Write the page of what was found."""
    from voxelstem.manifest import write_whole
    from voxelstem.report.retrieval import asked_of, retrieval_page
    from voxelstem.store import Store

    if store is None:
        raise ConfigError("--page takes its pictures from a store", hint="add --store with the indexed scans")
    opened = Store.open(store)
    found = [_ask(asked, question, asking) for question in questions]
    panels = [
        asked_of(opened, said, one.pool, [(hit.key, hit.score) for hit in one.hits], among=one.among)
        for said, one in zip(map(_shown, questions, count(1), found), found, strict=True)
    ]
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_whole(page, retrieval_page(panels, about={"Weights": asked.aligned.sha256[:16]}).encode())
    except OSError as error:
        raise ConfigError(
            f"'{page.name}' cannot be written: {error.strerror}", hint="choose another place for --page"
        ) from error
    answer({"page": str(page)}, str(page), as_json=as_json)
    return DONE


def _shown(question: str, place: int, found: Found) -> str:
    """What the page says was asked. Never a path, which may name a person."""
    from voxelstem.search import is_place

    if is_place(question):
        return f"question {place}: a {found.asked} from a file"
    return f"scan {question[:16]}" if found.asked == "scan" else question


def _add(index: Path, sources: list[Path], aligning: Aligning, *, as_json: bool) -> int:
    from voxelstem.indexer import build

    built = build(
        index, sources, weights=aligning.weights, tokenizer=aligning.tokenizer, commercial=aligning.commercial
    )
    facts = {name: value for name, value in asdict(built).items() if name != "refusals"}
    facts |= {"refused": len(built.refusals), "refusals": listed(built.refusals)}
    lines = refused(built.refusals)
    if built.silent:
        lines.append(f"{built.silent} reports say nothing that can be searched, or are of a wrong encoding")
    if built.cut:
        lines.append(f"{built.cut} reports are longer than the text tower reads: their ends count for nothing")
    lines.append(f"{built.added} added, {built.there} there already, {len(built.refusals)} refused")
    lines.append(f"{built.reports} reports added; {built.scans} scans in {index}")
    answer(facts, "\n".join(lines), as_json=as_json)
    return verdict(built.added + built.there, len(built.refusals), "give a store of the weights' modality")


def _measure(asked: Search, name: str, measuring: Measuring, *, as_json: bool) -> int:
    from voxelstem.store import Store

    if measuring.store is None:
        raise ConfigError("--protocol reads the reports from a store", hint="add --store with the indexed scans")
    found = asked.measure(name, Store.open(measuring.store), split=measuring.split, seed=measuring.seed)
    protocol = found.protocol
    published = [asdict(figure) for figure in protocol.published]
    facts = {
        "protocol": protocol.name,
        "split": measuring.split,
        "seed": measuring.seed,
        "studies": found.studies,
        "not_indexed": found.not_indexed,
        "without_text": found.without_text,
        "recalls": [asdict(line) | {"chance": line.chance} for line in found.recalls],
        "published_elsewhere": {"source": protocol.source, "figures": published},
    }
    beside = f"{found.not_indexed} not in the index, {found.without_text} without that section"
    unmade = ", ".join(str(pool) for pool in protocol.pools if pool > found.studies)
    lines = [f"{protocol.name}: {found.studies} studies, report to scan; {beside}", *map(str, found.recalls)]
    if unmade:
        lines.append(f"too few studies for pools of {unmade}")
    lines.append(f"for comparison, others' figures on others' pools ({protocol.source}):")
    lines += [f"  {one.model}: R@{one.k} of a pool of {one.pool}: {one.percent:.1f} %" for one in protocol.published]
    answer(facts, "\n".join(lines), as_json=as_json)
    return DONE
