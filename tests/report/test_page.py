from __future__ import annotations

from html.parser import HTMLParser

import pytest

from voxelstem.metrics import Interval, Score
from voxelstem.report import page
from voxelstem.report.figures import Picture

PNG = Picture(png=b"\x89PNG\r\n\x1a\nfake", alt='a "quoted" & <odd> text', caption="caption <b>")
VOID = {"meta", "img", "link", "br"}


class Reader(HTMLParser):
    """Collects tags and text, and sees that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def interval(estimate: float, low: float | None, high: float | None) -> Interval:
    return Interval(estimate=estimate, low=low, high=high, subjects=12 if low is not None else 2, note="")


def score(name: str, **changes: object) -> Score:
    usual: dict[str, object] = {
        "name": name,
        "task": "segment",
        "mode": "probe",
        "metric": "dice",
        "budget": 2,
        "labelled": 2,
        "repeats": 3,
        "value": interval(0.5, 0.4, 0.6),
    }
    return Score(**(usual | changes))  # pyright: ignore[reportArgumentType]


def whole() -> str:
    scores = [
        score(
            "pretrained",
            over_scratch=interval(0.1, 0.02, 0.2),
            over_intensity=interval(-0.1, -0.2, -0.02),
            parts={"liver": interval(0.7, 0.6, 0.8)},
        ),
        score("scratch", over_intensity=interval(0.01, -0.1, 0.1)),
        score("intensity", over_scratch=interval(-0.01, -0.1, 0.1)),
    ]
    sections = [
        page.ingest_section(kept=7, subjects=5, splits={"train": 3, "test": 2}, refused={"corrupt": 2}, remarks=["r"]),
        page.section("Training", page.paragraph("1 < 2"), page.picture(PNG), page.facts({"Steps": 7})),
        page.scores_section(scores),
        page.limits_section(2, phantoms=True),
        page.environment_section({"torch": "2"}),
    ]
    return page.page("Title & <more>", sections, lead="lead")


def test_the_page_fetches_nothing_and_runs_nothing() -> None:
    html = whole()
    reader = read(html)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in reader.tags}
    sources = [attributes[name] for _, attributes in reader.tags for name in ("src", "href") if name in attributes]
    assert sources
    assert all(source and source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert "url(" not in html
    assert "@import" not in html
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]
    policy = next(a["content"] for _, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_every_picture_has_a_text_for_those_who_cannot_see_it() -> None:
    images = [attributes for tag, attributes in read(whole()).tags if tag == "img"]
    assert len(images) == 2
    assert all(image["alt"] for image in images)
    assert images[0]["alt"] == PNG.alt


def test_texts_are_escaped() -> None:
    html = whole()
    assert "<odd>" not in html
    assert "<more>" not in html
    reader = read(html)
    assert "Title & <more>" in reader.text
    assert "1 < 2" in reader.text
    assert "caption <b>" in reader.text


def test_every_link_within_the_page_has_its_place() -> None:
    tags = read(whole()).tags
    places = {attributes["id"] for _, attributes in tags if "id" in attributes}
    links = {(attributes["href"] or "")[1:] for tag, attributes in tags if tag == "a"}
    assert links == places


def test_the_page_fits_phones_and_dark_rooms() -> None:
    html = whole()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "prefers-color-scheme: dark" in html
    assert '<html lang="en">' in html


def test_differences_are_said_in_words_and_not_only_in_colour() -> None:
    text = read(whole()).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "+0.100 [+0.020, +0.200] better" in text
    assert "-0.100 [-0.200, -0.020] worse" in text
    assert "+0.010 [-0.100, +0.100] unclear" in text


def test_tables_have_headings_for_rows_and_columns() -> None:
    scopes = [attributes.get("scope") for tag, attributes in read(whole()).tags if tag == "th"]
    assert set(scopes) == {"row", "col"}


def test_what_was_refused_is_counted_by_reason() -> None:
    assert "corrupt2" in read(whole()).text
    nothing = page.ingest_section(kept=1, subjects=1, splits={}, refused={})
    assert "Nothing was refused." in nothing.body


def test_the_limits_are_said_plainly() -> None:
    text = read(whole()).text
    for words in ("2 held-out subjects", "not patients", "Not a medical device", "includes zero"):
        assert words in text
    assert "not patients" not in page.limits_section(1).body
    assert "1 held-out subject." in page.limits_section(1).body


def test_only_the_caller_knows_how_large_the_model_is() -> None:
    assert "tiny" not in page.limits_section(1).body
    assert "The model is tiny." in page.limits_section(1, remarks=["The model is tiny."]).body


def test_two_subjects_are_shown_one_by_one() -> None:
    two = Interval(estimate=0.45, low=None, high=None, subjects=2, note="n=2, no interval")
    body = page.scores_section([score("run", value=two, each=(0.4, 0.5), over_scratch=two)]).body
    assert "0.450 (n=2, no interval)" in body
    assert "subject 2" in body
    assert "+0.450 (n=2, no interval)" in body


@pytest.mark.parametrize(("title", "anchor"), [("What the tokens see", "what-the-tokens-see"), ("A & B?", "a-b")])
def test_anchors_are_made_of_letters(title: str, anchor: str) -> None:
    assert page.section(title).anchor == anchor
