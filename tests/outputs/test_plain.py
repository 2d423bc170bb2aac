from __future__ import annotations

from tests.clinic import findings

from voxelstem.findings import of_json
from voxelstem.outputs import plain
from voxelstem.outputs.result import Result


def test_the_file_reads_back_to_equal_findings(tmp_path):
    told = findings()
    done = plain.write(Result(findings=told), tmp_path / "out")
    assert of_json(done.files[0].read_text(encoding="utf-8")) == told
    assert (done.output, len(done.files)) == ("json", 1)


def test_the_same_findings_have_the_same_file(tmp_path):
    once, twice = (plain.write(Result(findings=findings()), tmp_path) for _ in range(2))
    assert once.files == twice.files
    assert len(list(tmp_path.iterdir())) == 1


def test_letters_beyond_ascii_stay_readable(tmp_path):
    told = findings(findings=())
    told = findings(findings=(), unsaid=(told.unsaid[0].__class__(what="Größe", why="zu klein für 微小"),))
    done = plain.write(Result(findings=told), tmp_path)
    assert "Größe" in done.files[0].read_text(encoding="utf-8")
