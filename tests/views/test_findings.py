from __future__ import annotations

import collections
import json
import os
from pathlib import Path

import pytest

from voxelstem.errors import ConfigError
from voxelstem.sources.anatomy import report as phantom_report
from voxelstem.sources.paired import PairedConfig, facts, paired_report
from voxelstem.sources.phantom import PhantomConfig, phantom_anatomy
from voxelstem.study import Report
from voxelstem.views.findings import read_rules, statuses

DATA = Path(os.environ.get("VOXELSTEM_DATA", Path(__file__).parents[3] / "shared" / "data"))
REPORTS = DATA / "reports" / "siim_ct_reports.jsonl"
RULES = read_rules()
P, A, U, N = "present", "absent", "uncertain", "unmentioned"

# Read and labelled by hand: what each line of the file names or denies; all else it does not mention. A mass or a
# cavitary lesion of the lung counts as a nodule, atherosclerosis as calcification, and fluid and air as an effusion.
# Eight reports of five people, which were read before the rules were written: a check that the rules say what a
# reader says, and no measure of how they do on reports that nobody has looked at.
BY_HAND = {
    1: {
        **dict.fromkeys(("Arterial wall calcification", "Atelectasis", "Lung nodule", "Bronchiectasis"), P),
        "Pulmonary fibrotic sequela": P,
        **dict.fromkeys(("Cardiomegaly", "Pericardial effusion", "Lymphadenopathy", "Pleural effusion"), A),
    },
    2: {
        **dict.fromkeys(("Arterial wall calcification", "Atelectasis", "Lung nodule", "Bronchiectasis"), P),
        "Pulmonary fibrotic sequela": P,
        **dict.fromkeys(("Cardiomegaly", "Pericardial effusion", "Lymphadenopathy"), A),
    },
    3: dict.fromkeys(("Lung nodule", "Lymphadenopathy"), P),
    4: {
        **dict.fromkeys(("Medical material", "Pericardial effusion", "Lymphadenopathy", "Emphysema"), P),
        **dict.fromkeys(("Pleural effusion", "Interlobular septal thickening"), P),
    },
    5: {
        **dict.fromkeys(("Medical material", "Hiatal hernia", "Emphysema", "Pleural effusion"), P),
        "Interlobular septal thickening": P,
        **dict.fromkeys(("Cardiomegaly", "Pericardial effusion", "Lymphadenopathy"), A),
    },
    6: dict.fromkeys(("Lymphadenopathy", "Emphysema", "Lung nodule", "Pleural effusion"), P),
    7: {"Lymphadenopathy": A},
    8: {**dict.fromkeys(("Lymphadenopathy", "Lung nodule", "Emphysema"), P), "Lung opacity": A},
}


def rates(pairs, status):
    """Precision and recall of a status, from pairs of true and found."""
    hits = sum(true == found == status for true, found in pairs)
    return hits / sum(found == status for _, found in pairs), hits / sum(true == status for true, _ in pairs)


@pytest.mark.skipif(not REPORTS.is_file(), reason="the eight real reports are absent (VOXELSTEM_DATA)")
def test_eight_reports_labelled_by_hand_are_read_as_a_reader_reads_them():
    pairs = []
    for number, line in enumerate(REPORTS.read_text().splitlines(), start=1):
        told = json.loads(line)
        found = statuses(Report(findings_text=told["findings"], impression_text=told["impression"]), RULES)
        pairs += [(BY_HAND[number].get(name, N), found[name]) for name in RULES.findings]
    count = collections.Counter(true for true, _ in pairs)
    assert count == {P: 30, A: 12, N: 102}
    assert rates(pairs, P) == (1.0, 1.0)
    assert rates(pairs, A) == (1.0, 1.0)


def test_the_names_used_by_hand_are_ct_rate_s_eighteen():
    assert len(RULES.findings) == len(set(RULES.findings)) == 18
    assert {name for said in BY_HAND.values() for name in said} <= set(RULES.findings)


def test_on_true_reports_of_phantoms_what_is_there_is_found_and_nothing_else():
    effusions, nodules = [], []
    for seed in range(40):
        config = PairedConfig(seed=seed)
        truth = facts(config).values()
        found = statuses(paired_report(config), RULES)
        effusions.append((A if truth["effusion"] == "none" else P, found["Pleural effusion"]))
        nodules.append((A if truth["lung_side"] == "none" else P, found["Lung nodule"]))
        assert found["Cardiomegaly"] in (A, N)
        assert found["Pericardial effusion"] in (A, N)
    for pairs in (effusions, nodules):
        assert rates(pairs, P) == (1.0, 1.0)
        assert rates(pairs, A)[0] == 1.0
        assert rates(pairs, A)[1] > 0.6, "not every report denies what is not there"


def test_on_plain_phantoms_nodules_are_found_and_the_liver_s_lesions_are_none():
    seen = collections.Counter()
    for seed in range(12):
        anatomy = phantom_anatomy(PhantomConfig(seed=seed))
        found = statuses(phantom_report(anatomy), RULES)
        nodule = any(lesion.organ == "lung" for lesion in anatomy.lesions)
        assert found["Lung nodule"] == (P if nodule else A)
        assert found["Cardiomegaly"] == A
        seen[nodule] += 1
    assert min(seen[True], seen[False]) > 0


SENTENCES = [
    ("Pleural effusion was not detected.", "Pleural effusion", A),
    ("No pericardial or pleural effusion.", "Pleural effusion", A),
    ("No pericardial or pleural effusion.", "Pericardial effusion", A),
    ("Neither pleural nor pericardial effusion.", "Pericardial effusion", A),
    ("Pericardial effusion.", "Pleural effusion", N),
    ("Pericardium: no effusion.", "Pleural effusion", N),
    ("No pleural effusion, mild basal atelectasis.", "Atelectasis", P),
    ("No pneumothorax but a small effusion.", "Pleural effusion", P),
    ("There is no effusion on the right. There is one effusion on the left.", "Pleural effusion", P),
    ("Pericardial effusion cannot be excluded.", "Pericardial effusion", U),
    ("Possible bronchiectasis in the lingula.", "Bronchiectasis", U),
    ("Opacity may represent consolidation.", "Consolidation", U),
    ("Opacity may represent consolidation.", "Lung opacity", P),
    ("Consolidation is likely.", "Consolidation", U),
    ("No suspicious nodule.", "Lung nodule", A),
    ("Consolidation has resolved.", "Consolidation", A),
    ("The effusion is no longer seen.", "Pleural effusion", A),
    ("No significant change in the pulmonary nodules.", "Lung nodule", P),
    ("CT without contrast shows consolidation.", "Consolidation", P),
    ("Several lymph nodes, none enlarged.", "Lymphadenopathy", A),
    ("No enlarged supraclavicular, axillary, mediastinal, or hilar lymph nodes.", "Lymphadenopathy", A),
    ("No\nmediastinal lymphadenopathy.", "Lymphadenopathy", A),
    ("The heart is not enlarged.", "Cardiomegaly", A),
    ("Heart of normal size.", "Cardiomegaly", A),
    ("Heart size has increased.", "Cardiomegaly", P),
    ("Nodule: none.", "Lung nodule", A),
    ("Nodule in the left thyroid lobe.", "Lung nodule", N),
    ("Liver: mass in the left lobe.", "Lung nodule", N),
    ("Subcutaneous emphysema.", "Emphysema", N),
    ("Coronary artery calcifications.", "Arterial wall calcification", N),
    ("Coronary artery calcifications.", "Coronary artery wall calcification", P),
    ("Calcified plaques in the wall of the aorta.", "Arterial wall calcification", P),
    ("Calcified plaques in the wall of the aorta.", "Coronary artery wall calcification", N),
    ("Portal vein is patent.", "Medical material", N),
    ("Devices/Tubes/Lines: none.", "Medical material", A),
    ("2.5 cm nodule. No effusion.", "Lung nodule", P),
]


@pytest.mark.parametrize(("text", "name", "status"), SENTENCES)
def test_a_no_reaches_as_far_as_a_reader_takes_it(text, name, status):
    assert statuses(text, RULES)[name] == status


def test_history_is_not_read_for_it_says_what_was_feared():
    report = Report(history_text="Pleural effusion?", findings_text="Emphysema.", rest_text="Cardiomegaly in 2019.")
    assert {name: status for name, status in statuses(report, RULES).items() if status != N} == {"Emphysema": P}


def test_rules_carry_the_digest_of_their_file(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('name = "own"\nversion = 3\n[[finding]]\nname = "Cyst"\nsaid = ["cysts?", "fluid ~ lesion"]\n')
    rules = read_rules(path)
    assert (rules.name, rules.version, rules.findings) == ("own", 3, ("Cyst",))
    assert statuses("A fluid filled round lesion.", rules) == {"Cyst": P}
    assert len({rules.sha256, RULES.sha256}) == 2
    path.write_text(path.read_text() + "\n")
    assert read_rules(path).sha256 != rules.sha256


@pytest.mark.parametrize(
    "text",
    [
        "no toml =",
        'name = "own"\nversion = 1',
        'name = "own"\nversion = 1\n[[finding]]\nname = "Cyst"\nsaid = "cyst"',
        'name = "own"\nversion = 1\n[[finding]]\nname = "Cyst"\nsaid = []',
        'name = "own"\nversion = 1\n[[finding]]\nname = "Cyst"\nsaid = ["("]',
    ],
)
def test_a_list_that_is_none_is_a_clear_error(tmp_path, text):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="list of findings cannot be read"):
        read_rules(path)


def test_a_list_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="no list of findings 'chexpert'"):
        read_rules("chexpert")
    with pytest.raises(ConfigError, match=r"own\.toml cannot be read"):
        read_rules(tmp_path / "own.toml")
