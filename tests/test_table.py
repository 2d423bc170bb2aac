from __future__ import annotations

import subprocess
import sys

import pytest

from voxelstem import table
from voxelstem.errors import ConfigError
from voxelstem.table import Table

COUNTS = Table("counting", {"ordered": "collections:OrderedDict", "counter": "collections:Counter"})


def test_a_line_opens_the_class_it_names():
    import collections

    assert COUNTS["counter"] is collections.Counter


def test_a_table_lists_its_names():
    assert sorted(COUNTS) == ["counter", "ordered"]
    assert len(COUNTS) == 2
    assert "counter" in list(COUNTS)


def test_a_misspelt_name_says_what_was_meant():
    with pytest.raises(ConfigError, match="unknown counting 'conter'\n  hint: did you mean 'counter'"):
        COUNTS["conter"]


def test_a_name_like_no_other_lists_all():
    with pytest.raises(ConfigError, match="known: counter, ordered"):
        COUNTS["xyz"]


def test_nothing_is_imported_before_it_is_asked_for():
    code = (
        "import sys; from voxelstem.table import Table; lines = Table('x', {'a': 'wave:open'});"
        "list(lines); print('wave' in sys.modules); lines['a']; print('wave' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "True"]


def test_a_line_from_outside_is_found_but_never_hides_ours(tmp_path, monkeypatch: pytest.MonkeyPatch):
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[voxelstem.counting]\nchain = collections:ChainMap\ncounter = collections:UserDict\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import collections

    assert COUNTS["chain"] is collections.ChainMap
    assert COUNTS["counter"] is collections.Counter


def test_closest_prefers_a_guess_over_a_list():
    assert table.closest("lrr", ["lr", "steps"]) == "did you mean 'lr'?"
