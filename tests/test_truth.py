from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from voxelstem.errors import AuditError, ConfigError
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Fractions, Store, write
from voxelstem.store.subjects import pseudonym, site_key
from voxelstem.study import InputSpec, LabelMap, Study, Survival
from voxelstem.tasks.classify import Classify
from voxelstem.tasks.regress import Regress
from voxelstem.tasks.segment import Segment
from voxelstem.tasks.survive import Survive
from voxelstem.tasks.zeroshot import Zeroshot
from voxelstem.truth import Truth, class_names, draw, is_aligned, is_survival, read_truth, told_each

SPEC = InputSpec(spacing_mm=(8.0, 8.0, 8.0), block_ijk=(16, 16, 16))
FRACTIONS = Fractions(train=0.6, validation=0.0, test=0.4)
ASKED = Zeroshot(prompts="phantom")


@pytest.fixture(autouse=True)
def one_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests here share one site key, because they share one store."""
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of coarse phantoms, the table of who has contrast, and a labels.json."""
    folder = tmp_path_factory.mktemp("truth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))
        store = Store.create(folder / "store", fractions=FRACTIONS)
        rows = [("subject", "label")]
        for seed in range(12):
            study = phantom(
                PhantomConfig(seed=seed, spacing_mm=(12.0, 12.0, 12.0), phase="portal" if seed % 2 else "none")
            )
            write(store, replace(study, subject=pseudonym(study.subject, site_key())))
            rows.append((study.subject, study.labels["contrast"]))
    with (folder / "contrast.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (folder / "labels.json").write_text(json.dumps({"classes": {"1": "lung_left", "2": "lung_right", "3": "liver"}}))
    return folder


def table(folder: Path, text: str) -> Path:
    path = folder / "findings.csv"
    path.write_text(text)
    return path


def test_tasks_say_whether_they_compare_with_texts() -> None:
    assert [is_aligned(task) for task in (Classify(), Segment(), Zeroshot())] == [False, False, True]


def test_a_column_for_each_class_says_yes_no_or_nothing(place: Path, tmp_path: Path) -> None:
    """Merlin's label files say -1 where nobody knows; pandas writes 1.0."""
    path = table(
        tmp_path,
        "subject,Spleen enlarged,contrast\nphantom-0000,1,no\nphantom-0001,0.0,-1\nphantom-0002,,yes\nphantom-0003,,\n",
    )
    truth = read_truth(Store.open(place / "store"), path, ASKED, SPEC)
    named = {pseudonym(f"phantom-{n:04d}", site_key()): n for n in range(4)}
    assert {named[subject]: told for subject, told in truth.findings.items()} == {
        0: {"spleen_enlarged": True, "contrast": False},
        1: {"spleen_enlarged": False},
        2: {"contrast": True},
    }
    assert truth.classes == ("spleen_enlarged", "contrast")
    assert len(truth.records) == 3


def test_a_column_called_label_is_about_the_one_class_asked_for(place: Path, tmp_path: Path) -> None:
    store = Store.open(place / "store")
    truth = read_truth(store, place / "contrast.csv", Zeroshot(prompts="phantom", classes=("contrast",)), SPEC)
    assert sorted(told["contrast"] for told in truth.findings.values()) == [False] * 6 + [True] * 6
    path = table(
        tmp_path, "subject,label\nphantom-0000,enlarged\nphantom-0001,normal\nphantom-0002,-1\nphantom-0003,-1.0\n"
    )
    spleen = Zeroshot(prompts="phantom", classes=("spleen_enlarged",), present=("enlarged",))
    said = read_truth(store, path, spleen, SPEC).findings.values()
    assert sorted(told["spleen_enlarged"] for told in said) == [False, True]


def test_one_of_several_is_read_by_name(place: Path, tmp_path: Path) -> None:
    path = table(tmp_path, "subject,label\nphantom-0000,Effusion left\nphantom-0001,effusion_right\n")
    truth = read_truth(Store.open(place / "store"), path, replace(ASKED, answers="one"), SPEC)
    assert truth.classes == ("effusion_left", "effusion_right")
    assert sorted(truth.labels.values()) == ["effusion_left", "effusion_right"]
    some = Zeroshot(prompts="phantom", answers="one", classes=("contrast", "effusion_left"))
    with pytest.raises(ConfigError, match="'effusion_right' is not among the wished"):
        read_truth(Store.open(place / "store"), path, some, SPEC)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("subject,label\nphantom-0000,yes\n", {}, "which class its labels are about"),
        ("subject,contrst\nphantom-0000,1\n", {}, "did you mean 'contrast'"),
        ("subject,label\nphantom-0000,lung\n", {"answers": "one"}, "'lung' is no class"),
        ("subject,contrast\nphantom-0000,perhaps\n", {}, "row 2: 'perhaps' is neither 1 nor 0"),
        ("subject,contrast,Contrast\nphantom-0000,1,1\n", {}, "two columns are about the same class"),
        ("subject,contrast\nphantom-0000,1\nmueller,0\n", {}, "1 of 2 labelled subjects have no CT scan .*: row 3"),
        ("subject,contrast\nphantom-0000,1\nphantom-0000,0\n", {}, "rows 2 and 3 label the same subject"),
        ("subject,contrast\nphantom-0000,\n", {}, "says nothing of any class"),
        ("subject,contrast\nmueller,1\n", {}, "none of the 1 labelled subjects"),
        ("subject,contrast\nphantom-0000,1\n", {"classes": ("spleen_enlarged",)}, "no column for a wished class"),
    ],
)
def test_wrong_label_files_are_one_clear_sentence(
    place: Path, tmp_path: Path, text: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_truth(Store.open(place / "store"), table(tmp_path, text), replace(ASKED, **changes), SPEC)  # pyright: ignore
    assert "mueller" not in str(caught.value)
    assert "phantom-0" not in str(caught.value)


@pytest.mark.parametrize("task", [ASKED, Classify()])
def test_labels_without_a_scan_are_left_out_where_that_is_allowed_and_counted(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, task: Zeroshot | Classify
) -> None:
    rows = "".join(f"phantom-{n:04d},{n % 2}\n" for n in range(12))
    path = table(tmp_path, f"subject,contrast\n{rows}mueller,1\n")
    with pytest.raises(ConfigError, match="1 of 13 labelled subjects have no CT scan in the store: row 14"):
        read_truth(Store.open(place / "store"), path, task, SPEC)
    truth = read_truth(Store.open(place / "store"), path, task, SPEC, unknown="left_out")
    assert caplog.messages == ["1 of 13 labelled subjects are not in the store (no CT scan)"]
    assert (truth.left_out, len(truth.findings), len(truth.records)) == (1, 12, 12)


def many(cells: dict[int, str], names: str = "cyst,stone") -> str:
    return f"subject,{names}\n" + "".join(f"phantom-{n:04d},{said}\n" for n, said in cells.items())


def test_classify_reads_a_column_for_each_class_by_the_same_words(place: Path, tmp_path: Path) -> None:
    store = Store.open(place / "store")
    text = many({0: "1,no", 1: "0.0,-1", 2: ",yes", 3: ","} | dict.fromkeys(range(4, 12), "1,0"))
    truth = read_truth(store, table(tmp_path, text), Classify(), SPEC)
    named = {pseudonym(f"phantom-{n:04d}", site_key()): n for n in range(12)}
    assert {named[subject]: told for subject, told in truth.findings.items()} == {
        0: {"cyst": True, "stone": False},
        1: {"cyst": False},
        2: {"stone": True},
        **{n: {"cyst": True, "stone": False} for n in range(4, 12)},
    }
    assert (truth.classes, truth.labels, truth.both_ways) == (("cyst", "stone"), {}, True)
    text = many(dict.fromkeys(range(12), "1,no,41"), "cyst,stone,age")
    with pytest.raises(ConfigError, match="row 2: '41' is neither 1 nor 0") as caught:
        read_truth(store, table(tmp_path, text), Classify(), SPEC)
    assert "head.classes" in caught.value.hint
    some = read_truth(store, table(tmp_path, text), Classify(classes=("stone",)), SPEC)
    assert (some.classes, list(some.findings.values())) == (("stone",), [{"stone": False}] * 12)
    with pytest.raises(ConfigError, match="no column 'ston'"):
        read_truth(store, table(tmp_path, text), Classify(classes=("ston",)), SPEC)
    with pytest.raises(ConfigError, match="gives every subject one label"):
        read_truth(store, place / "contrast.csv", Classify(classes=("yes",)), SPEC)


def test_a_class_of_which_all_say_the_same_is_refused_by_its_name(place: Path, tmp_path: Path) -> None:
    store = Store.open(place / "store")
    train = len(store.subjects("train"))
    truth = read_truth(store, table(tmp_path, many({n: f"{n % 2},1" for n in range(12)})), Classify(), SPEC)
    with pytest.raises(AuditError, match=f"of 'stone' all {train} labelled training subjects say yes"):
        draw(truth, None, 0, voxels=False)
    truth = read_truth(store, table(tmp_path, many({n: f"{n % 2}," for n in range(12)})), Classify(), SPEC)
    with pytest.raises(AuditError, match="of 'stone' no training subject says anything"):
        draw(truth, None, 0, voxels=False)


def test_folds_of_the_file_come_along(place: Path, tmp_path: Path) -> None:
    rows = "".join(f"phantom-{n:04d},{n % 3},{n}\n" for n in range(12))
    truth = read_truth(Store.open(place / "store"), table(tmp_path, f"subject,fold,value\n{rows}"), Regress(), SPEC)
    assert truth.folds == {pseudonym(f"phantom-{n:04d}", site_key()): n % 3 for n in range(12)}


def test_a_draw_is_of_the_split_that_is_asked_for(place: Path) -> None:
    truth = read_truth(
        Store.open(place / "store"), place / "contrast.csv", Zeroshot(prompts="phantom", classes=("contrast",)), SPEC
    )
    drawn = draw(truth, 3, 0, voxels=False, split="train")
    assert len(drawn) == 3
    assert {record.split for record in drawn} == {"train"}
    with pytest.raises(ConfigError, match="no validation subject"):
        draw(truth, None, 0, voxels=False, split="validation")


def test_findings_that_are_the_same_of_all_are_refused(place: Path, tmp_path: Path) -> None:
    rows = "".join(f"phantom-{n:04d},1\n" for n in range(12))
    truth = read_truth(Store.open(place / "store"), table(tmp_path, "subject,contrast\n" + rows), ASKED, SPEC)
    with pytest.raises(AuditError, match="say the same"):
        draw(truth, None, 0, voxels=False)


def test_the_draw_is_by_subject_nested_in_budget_and_balanced(place: Path) -> None:
    store = Store.open(place / "store")
    truth = read_truth(store, place / "contrast.csv", Classify(), SPEC)
    two, four = (draw(truth, budget, 5, voxels=False) for budget in (2, 4))
    assert {record.key for record in two} < {record.key for record in four}
    assert sorted(truth.labels[record.subject] for record in four) == ["no", "no", "yes", "yes"]
    assert all(record.split == "train" for record in four)
    others = [{r.key for r in draw(truth, 2, seed, voxels=False)} for seed in range(8)]
    assert len({frozenset(keys) for keys in others}) > 1


def test_without_a_wish_the_organs_are_those_that_all_labelled_scans_name(place: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text("{}")
    truth = read_truth(Store.open(place / "store"), tmp_path / "labels.json", Segment(), SPEC)
    names = class_names(truth, truth.of("train"), voxels=True)
    assert "liver" in names
    assert names == tuple(sorted(names))
    wished = read_truth(Store.open(place / "store"), place / "labels.json", Segment(), SPEC)
    assert class_names(wished, wished.of("train"), voxels=True) == ("lung_left", "lung_right", "liver")


@pytest.fixture
def partly(tmp_path: Path) -> Store:
    """Eight subjects with organs and no lesion, eight with lesions only."""
    store = Store.create(tmp_path / "partly", fractions=FRACTIONS)
    for seed in range(16):
        study = phantom(PhantomConfig(seed=seed, spacing_mm=(12.0, 12.0, 12.0)))
        volume = study.volumes[0]
        assert volume.labels is not None
        looked = {n: name for n, name in volume.labels.classes.items() if (name == "lesion") == (seed % 2 == 1)}
        array = np.where(np.isin(volume.labels.array, list(looked)), volume.labels.array, 0).astype(np.int16)
        volume = replace(volume, labels=LabelMap(array=array, classes=looked))
        write(store, Study(subject=pseudonym(study.subject, site_key()), volumes=(volume,)))
    return store


def asking(tmp_path: Path, *names: str) -> Path:
    path = tmp_path / "wanted.json"
    path.write_text(json.dumps({"classes": {str(n): name for n, name in enumerate(names, start=1)}}))
    return path


@pytest.mark.parametrize("names", [("lesion",), ("liver", "spleen")])
def test_only_scans_in_which_every_wanted_class_was_looked_for_count_and_the_others_are_told(
    partly: Store, tmp_path: Path, names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    truth = read_truth(partly, asking(tmp_path, *names), Segment(), SPEC)
    assert (len(truth.records), truth.left_out) == (8, 8)
    assert caplog.messages == [
        "8 of 16 labelled scans are left out: not every class of wanted.json was looked for in them"
    ]
    assert all(set(names) <= set(record.classes.values()) for record in truth.records)


def test_classes_that_were_never_looked_for_together_are_refused_with_counts(partly: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all 16 labelled scans are left out") as caught:
        read_truth(partly, asking(tmp_path, "liver", "lesion"), Segment(), SPEC)
    assert "'liver' in 8, 'lesion' in 8" in caught.value.problem
    assert "wanted.json only classes" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"classes": {"1": "=liver"}}', "begins like a formula"),
        ('{"classes": {"1": "livr"}}', "did you mean 'liver'"),
        ("[1]", "not a label file"),
        ("{", "not a label file"),
    ],
)
def test_a_wrong_labels_json_is_refused(place: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_truth(Store.open(place / "store"), tmp_path / "labels.json", Segment(), SPEC)
    with pytest.raises(ConfigError, match="no label file"):
        read_truth(Store.open(place / "store"), tmp_path / "absent.json", Segment(), SPEC)


def survivals(place: Path, tmp_path: Path, events: int, *, time: int = 5) -> Truth:
    """All twelve phantoms, of which the last so many have an event."""
    rows = [f"phantom-{n:04d},{time},{int(n >= 12 - events)}\n" for n in range(12)]
    path = table(tmp_path, "subject,time,event\n" + "".join(rows))
    return read_truth(Store.open(place / "store"), path, Survive(), SPEC)


def test_times_and_events_are_read_for_the_task_that_says_it_needs_them(place: Path, tmp_path: Path) -> None:
    assert [is_survival(task) for task in (Classify(), Segment(), Survive())] == [False, False, True]
    truth = survivals(place, tmp_path, 4)
    assert sorted((one.time, one.event) for one in truth.survival.values()) == [(5, False)] * 8 + [(5, True)] * 4
    assert (len(truth.records), truth.labels, truth.values, truth.classes) == (12, {}, {}, ())
    with pytest.raises(ConfigError, match="must name the columns subject,time,event"):
        read_truth(Store.open(place / "store"), place / "contrast.csv", Survive(), SPEC)


@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 0.9])
def test_a_draw_holds_an_event_and_about_the_share_of_events_of_all(place: Path, tmp_path: Path, share: float) -> None:
    """Curves depend on that share: as many with as without would say that half of all patients die."""
    truth = survivals(place, tmp_path, 1)
    train = sorted({record.subject for record in truth.of("train")})
    came = round(share * len(train))
    told = {subject: Survival(time=5.0, event=place < came) for place, subject in enumerate(train)}
    truth = replace(truth, survival=told)
    for seed in range(3):
        before: set[str] = set()
        for budget in range(2, len(train) + 1):
            drawn = {record.subject for record in draw(truth, budget, seed, voxels=False)}
            events = sum(told[subject].event for subject in drawn)
            assert len(drawn) == budget
            assert before < drawn
            assert 1 <= events < budget or came == len(train)
            assert abs(events - budget * came / len(train)) <= 1
            before = drawn
    others = [frozenset(r.subject for r in draw(truth, 3, seed, voxels=False)) for seed in range(8)]
    assert len(set(others)) > 1


@pytest.mark.parametrize(("events", "time"), [(0, 5), (12, 0)])
def test_censored_subjects_only_are_refused_with_their_number(
    place: Path, tmp_path: Path, events: int, time: int
) -> None:
    truth = survivals(place, tmp_path, events, time=time)
    train = len({record.subject for record in truth.of("train")})
    censored = 0 if events else train
    with pytest.raises(AuditError, match=f"{censored} of {train} labelled training subjects are censored, and none"):
        draw(truth, None, 0, voxels=False)


def test_one_subject_shows_nothing_of_who_fares_better(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one labelled training subject cannot show") as caught:
        draw(survivals(place, tmp_path, 6), 1, 0, voxels=False)
    assert "--budget 2" in caught.value.hint
    alone = table(tmp_path, "".join(["subject,time,event\n", *_trained(place, 1)]))
    with pytest.raises(ConfigError, match="one labelled training subject cannot show") as caught:
        draw(read_truth(Store.open(place / "store"), alone, Survive(), SPEC), None, 0, voxels=False)
    assert "label more" in caught.value.hint


def _trained(place: Path, count: int) -> list[str]:
    train = set(Store.open(place / "store").subjects("train"))
    names = [f"phantom-{n:04d}" for n in range(12)]
    return [f"{name},3,1\n" for name in names if pseudonym(name, site_key()) in train][:count]


@pytest.mark.parametrize("name", ["a" * 65, "late\nphase", " late", ""])
def test_a_class_that_findings_could_not_name_is_refused_before_anything_is_read(name: str) -> None:
    truth = Truth(records=(), labels={}, classes=("liver", name))
    for voxels in (True, False):
        with pytest.raises(ConfigError, match=r"the name of the class '.{0,64}' must be 1 to 64 printable characters"):
            class_names(truth, (), voxels=voxels)


KINDS = {
    "labels": ("no", "yes"),
    "values": (63.0, 63.5),
    "survival": (Survival(time=5.0, event=True), Survival(time=5.0, event=False)),
    "findings": ({"cyst": True, "stone": False}, {"cyst": True, "stone": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_said_of_each_subject_is_told_apart_and_told_to_nobody_without_the_key(
    place: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = tuple(Store.open(place / "store"))
    subjects = sorted({record.subject for record in records})
    usual, other = KINDS[kind]
    plain = Truth(records=records, labels={}, classes=("cyst", "stone"))
    told = dict.fromkeys(subjects, usual)
    truth = replace(plain, **{kind: told})
    known = told_each(truth, records, plain.classes)
    assert known == told_each(truth, records[::-1], plain.classes)
    assert len(set(known)) == len(subjects)  # nobody sees of whom the same was said
    turned = told_each(replace(plain, **{kind: told | {subjects[1]: other}}), records, plain.classes)
    assert [a == b for a, b in zip(known, turned, strict=True)] == [at != 1 for at in range(len(subjects))]
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path / "another.key"))
    assert not set(known) & set(told_each(truth, records, plain.classes))


def test_a_column_that_was_not_learned_from_is_no_matter_and_the_order_of_columns_neither(place: Path) -> None:
    records = tuple(Store.open(place / "store"))
    one = Truth(records=records, labels={}, classes=(), findings={r.subject: {"a": True, "b": False} for r in records})
    more = replace(one, findings={r.subject: {"c": True, "b": False, "a": True} for r in records})
    assert told_each(one, records, ("a", "b")) == told_each(more, records, ("a", "b"))
    assert told_each(one, records, ("a", "b")) != told_each(more, records, ("a", "b", "c"))


def test_of_voxels_the_structures_asked_for_are_told_apart_whatever_the_key(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = tuple(replace(record, classes={1: "liver", 2: "spleen"}) for record in Store.open(place / "store"))
    every = Truth(records=records, labels={}, classes=())
    named = replace(every, classes=("spleen", "liver"))
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path / "another.key"))
    known = told_each(every, records, ())
    monkeypatch.undo()
    assert told_each(named, records, ()) == known
    assert not set(told_each(replace(every, classes=("liver",)), records, ())) & set(known)
    assert told_each(every, (), ()) == ()
