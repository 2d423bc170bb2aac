"""One self-contained HTML page: no script, nothing fetched, readable on a phone, in the dark and by a screen reader."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from voxelstem.metrics import Interval, Score
from voxelstem.report.figures import Picture, comparison

STYLE = """
:root { color-scheme: light dark; --ink:#1d2733; --soft:#5b6673; --line:#dce1e8; --paper:#fff; --tint:#f4f6f9;
  --accent:#0b62a4; --warn:#8a5a00; --warntint:#fff6e0 }
@media (prefers-color-scheme: dark) { :root { --ink:#e6eaf0; --soft:#a3adba; --line:#333d4a; --paper:#12171e;
  --tint:#1a212b; --accent:#7cc0f5; --warn:#f0c46a; --warntint:#2b2413 } }
* { box-sizing: border-box }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.55 system-ui,-apple-system,"Segoe UI",
  Roboto,"Helvetica Neue",Arial,sans-serif; text-rendering:optimizeLegibility }
main, header, footer { max-width:62rem; margin:0 auto; padding:0 1.25rem }
header { padding-top:2.5rem } footer { padding-bottom:3rem; color:var(--soft); font-size:.875rem }
h1 { font-size:1.9rem; line-height:1.2; margin:0 0 .5rem; letter-spacing:-.01em }
h2 { font-size:1.3rem; margin:0 0 .75rem; letter-spacing:-.005em } h3 { font-size:1rem; margin:1.75rem 0 .5rem }
p { margin:.5rem 0 1rem; max-width:44rem } .lead { font-size:1.1rem; color:var(--soft) }
nav { margin:1.25rem 0 0; font-size:.9rem } nav a { display:inline-block; margin:0 1rem .25rem 0 }
a { color:var(--accent) }
section { border-top:1px solid var(--line); padding:1.75rem 0 1.25rem; margin-top:1.75rem }
figure { margin:1.25rem 0 1.75rem } figure img { display:block; max-width:100%; height:auto; border-radius:6px;
  border:1px solid var(--line); background:#fff }
figcaption, caption { color:var(--soft); font-size:.875rem; text-align:left; max-width:44rem }
figcaption { margin-top:.5rem }
.wide { overflow-x:auto; margin:1rem 0 1.5rem }
table { border-collapse:collapse; font-size:.9rem; font-variant-numeric:tabular-nums; min-width:60% }
caption { padding-bottom:.5rem; font-weight:600; color:var(--ink) }
th, td { padding:.4rem .9rem .4rem 0; border-bottom:1px solid var(--line); text-align:left; vertical-align:top }
th { white-space:nowrap; font-weight:600 } thead th { color:var(--soft); border-bottom-width:2px }
dl { display:grid; grid-template-columns:max-content 1fr; gap:.35rem 1.25rem; margin:1rem 0 } dt { color:var(--soft) }
dd { margin:0; overflow-wrap:anywhere }
@media (max-width:34rem) { dl { grid-template-columns:1fr } dd { margin-bottom:.5rem } h1 { font-size:1.5rem } }
ul { padding-left:1.2rem; max-width:44rem } li { margin:.35rem 0 }
.note { background:var(--warntint); border-left:4px solid var(--warn); padding:.75rem 1rem; border-radius:0 6px 6px 0 }
.found { display:grid; grid-template-columns:repeat(auto-fill,minmax(10.5rem,1fr)); gap:1rem; margin:.5rem 0 1.5rem }
.found figure { margin:0 } .found p { margin:.25rem 0 0 } .found code { font-size:.75rem }
.scan { position:relative } .found .scan img { width:100%; background:#000 }
.scan span { position:absolute; top:50%; left:.4rem; color:#ffd84d; font-weight:700; font-size:.8rem;
  text-shadow:0 0 3px #000,0 0 3px #000 } .scan span + span { left:auto; right:.4rem }
.note ul { margin:.25rem 0 } @media print { nav { display:none } section { break-inside:avoid } }
""".strip()

MEANING = {
    "scratch": "the same network untrained, several seeds averaged: what the architecture knows by itself",
    "unet": "a U-Net from scratch by nnU-Net's rule, trained on the same labelled scans",
    "intensity": "how bright the body (or each patch) is, and nothing else",
    "atlas": "labels of the most similar labelled scan, laid over so that the bodies' boxes match",
    "majority": "the shares of the classes among the labelled scans, without looking at the scan",
    "mean": "the mean of the labelled subjects' numbers, without looking at the scan",
    "kaplan_meier": "the labelled subjects' Kaplan-Meier curve, and equal risk for everybody",
    "radiomics": "first-order radiomics by IBSI's definitions, of the region or of the body",
    "morphometry": "a head on volumes of structures, as somebody else measured them",
}
LESS_IS_BETTER = ("ece", "mae", "integrated_brier")
NOT_A_DEVICE = "Not a medical device. Nothing here is validated for any diagnosis or treatment."


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page. `body` is HTML that the functions below made: they escape every text."""

    title: str
    body: str

    @property
    def anchor(self) -> str:
        """Name within the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def page(title: str, sections: Sequence[Section], *, lead: str = "") -> str:
    """Put the whole page together as one HTML document."""
    links = "".join(f'<a href="#{part.anchor}">{escape(part.title)}</a>' for part in sections)
    body = "\n".join(
        f'<section id="{part.anchor}"><h2>{escape(part.title)}</h2>\n{part.body}</section>' for part in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>
{f'<p class="lead">{escape(lead)}</p>' if lead else ""}
<nav aria-label="Contents">{links}</nav></header>
<main>
{body}
</main>
<footer><p>{NOT_A_DEVICE}</p></footer>
</body>
</html>
"""


def section(title: str, *parts: str) -> Section:
    """Make a section of parts made by `paragraph`, `picture`, `table`, `facts`, `bullets` or `note`."""
    return Section(title=title, body="\n".join(parts))


def paragraph(text: str) -> str:
    """One paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def note(*lines: str) -> str:
    """A box for what must not be overlooked."""
    return f'<div class="note">{bullets(lines) if len(lines) > 1 else escape("".join(lines))}</div>'


def bullets(lines: Sequence[str]) -> str:
    """A list of plain texts."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def facts(pairs: Mapping[str, object]) -> str:
    """Names and values, one pair a line."""
    return "<dl>" + "".join(f"<dt>{escape(n)}</dt><dd>{escape(str(v))}</dd>" for n, v in pairs.items()) + "</dl>"


def picture(drawn: Picture) -> str:
    """A figure, inlined, with its alternative text and caption."""
    data = base64.b64encode(drawn.png).decode("ascii")
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(drawn.alt, quote=True)}">'
    return f"<figure>{image}<figcaption>{escape(drawn.caption)}</figcaption></figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "") -> str:
    """A table of plain texts; the first cell of each row is its heading."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{said}<thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def ingest_section(
    *, kept: int, subjects: int, splits: Mapping[str, int], refused: Mapping[str, int], remarks: Sequence[str] = ()
) -> Section:
    """What came in and what was refused, by reason."""
    counts = {"Scans kept": kept, "Subjects": subjects}
    shares = {f"Subjects in {name}": count for name, count in splits.items()}
    ledger = (
        table(["reason", "sources"], [[code, str(count)] for code, count in sorted(refused.items())], caption="Refused")
        if refused
        else paragraph("Nothing was refused.")
    )
    return section("What was ingested and refused", facts(counts | shares), ledger, bullets(remarks) if remarks else "")


def scores_section(scores: Sequence[Score], title: str = "Pretrained, scratch, intensity") -> Section:
    """The results: a chart and a table for each task and metric, and every organ by itself."""
    parts: list[str] = []
    for task, mode, metric in dict.fromkeys((score.task, score.mode, score.metric) for score in scores):
        chosen = [s for s in scores if (s.task, s.mode, s.metric) == (task, mode, metric)]
        spoken = metric.replace("_", " ") + (" (less is better)" if metric in LESS_IS_BETTER else "")
        parts.append(f"<h3>{escape(f'{task} · {mode} · {spoken}')}</h3>")
        parts.append(picture(comparison(chosen, metric)))
        head = ["contestant", "labelled", "repeats", "n", spoken, "minus scratch", "minus intensity"]
        rows = [
            [
                score.name,
                str(score.labelled),
                str(score.repeats),
                str(score.value.subjects),
                _say(score.value),
                _difference(score.over_scratch, less_is_better=metric in LESS_IS_BETTER),
                _difference(score.over_intensity, less_is_better=metric in LESS_IS_BETTER),
            ]
            for score in chosen
        ]
        parts.append(
            table(head, rows, caption=f"{spoken} on n held-out subjects, 95 % bootstrap intervals over subjects")
        )
        parts += [_organs(chosen, spoken), _each(chosen, spoken)]
    names = dict.fromkeys(score.name for score in scores)
    parts.append(facts({name: MEANING[name] for name in names if name in MEANING}))
    return section(title, *parts)


def asked_section(asked: Sequence[Mapping[str, Any]]) -> Section:
    """In which words runs were asked, by a set of prompts that can be looked up, and of how many."""
    parts: list[str] = []
    for one in asked:
        how = "each is there or not" if one["answers"] == "each" else "one of them is true"
        labels = f"{one['calibrated_on']} validation subjects" if one["calibrated_on"] else "none"
        parts.append(f"<h3>{escape(str(one['run']))}</h3>")
        parts.append(
            facts(
                {
                    "Prompt set": f"{one['prompts']}, version {one['version']}",
                    "SHA-256": one["sha256"],
                    "Prompts": one["prompts_said"],
                    "Classes": f"{len(one['classes'])}, {how}",
                    "Labels learned from": labels,
                    "Pool": f"{one['pool']} test scans of {one['subjects']} subjects",
                }
            )
        )
        rows = [[name, str(count)] for name, count in one["classes"].items()]
        parts.append(table(["class", "n"], rows, caption=one["counted"]))
    return section("Asked in words", *parts)


def limits_section(test_subjects: int, *, phantoms: bool = False, remarks: Sequence[str] = ()) -> Section:
    """What the numbers cannot show, always in the same place and in the same plain words."""
    people = "1 held-out subject" if test_subjects == 1 else f"{test_subjects} held-out subjects"
    lines = [
        f"These figures rest on {people}. Intervals say how much they would move with other subjects of the same "
        "kind; they say nothing about other hospitals, scanners or diseases.",
        "With fewer than three subjects there is no interval at all, only each subject's own figure.",
        "If the difference to scratch includes zero, pretraining has not been shown to help here.",
        *(
            ["Phantoms are drawn by a program and are not patients: a result on them proves nothing about patients."]
            if phantoms
            else []
        ),
        *remarks,
        NOT_A_DEVICE,
    ]
    return section("What these numbers cannot show", note(*lines))


def environment_section(pairs: Mapping[str, object]) -> Section:
    """Versions, seeds, machine and minutes: what is needed to make the page again."""
    return section("Environment", facts(pairs))


def _say(value: Interval) -> str:
    if value.low is None:
        return str(value)
    return _together(str(value)) + (f" ({value.note})" if value.note else "")


def _difference(value: Interval | None, *, less_is_better: bool = False) -> str:
    """A signed difference and, in a word, whether its interval leaves zero out."""
    if value is None:
        return "–"
    if value.low is None or value.high is None:
        return f"{value.estimate:+.3f} ({value.note})"
    more, less = ("worse", "better") if less_is_better else ("better", "worse")
    word = more if value.low > 0 else less if value.high < 0 else "unclear"
    return _together(f"{value.estimate:+.3f} [{value.low:+.3f}, {value.high:+.3f}]") + f" {word}"


def _together(text: str) -> str:
    """The same text, which no line break may tear apart."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _organs(scores: Sequence[Score], spoken: str) -> str:
    organs = list(dict.fromkeys(organ for score in scores for organ in score.parts))
    if not organs:
        return ""
    rows = [
        [
            f"{score.name}, {score.labelled} labelled",
            *(f"{score.parts[organ].estimate:.2f}" if organ in score.parts else "–" for organ in organs),
        ]
        for score in scores
    ]
    asked = any(score.task in ("classify", "zeroshot") for score in scores)
    what = "class, where it is known" if asked else "organ, mean over the subjects that have it"
    return table(["contestant", *organs], rows, caption=f"{spoken} of each {what}")


def _each(scores: Sequence[Score], spoken: str) -> str:
    rows = [
        [f"{score.name}, {score.labelled} labelled", *(f"{v:.3f}" for v in score.each)]
        for score in scores
        if score.each
    ]
    if not rows:
        return ""
    count = max(len(row) for row in rows) - 1
    head = ["contestant", *(f"subject {index + 1}" for index in range(count))]
    return table(head, rows, caption=f"{spoken} of each held-out subject (n={count}, no interval)")
