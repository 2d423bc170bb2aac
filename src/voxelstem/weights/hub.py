"""`load`: weights by folder or name -> Model. What is fetched is recorded at the first time and verified ever after.

Everything fetched lies below VOXELSTEM_CACHE (or the user's cache folder), each name in a folder of its own:
`weights/` is what gets loaded, `fetched.json` holds the commit and the sha256 of every file that came, `files/` holds
foreign files until they are converted; whoever has no network puts them there by hand.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from voxelstem import model
from voxelstem.card import (
    CONFIG,
    README,
    TENSORS,
    check_commercial,
    check_folder,
    check_licence,
    digest,
    members,
    read_card,
)
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.model import Model
from voxelstem.table import closest
from voxelstem.weights.cache import Record, cache_home, compare, read_record, shown, write_record
from voxelstem.weights.known import KNOWN, Known

PREFIX = "hub:"
_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
_REFERENCE = re.compile(rf"hub:({_PART}/{_PART})(?:@([\w.][\w.-]{{0,254}}))?", re.ASCII)
_SPECTRE = KNOWN["spectre-large"]
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A name, understood."""

    name: str
    """As it was given, such as `spectre-large` or `hub:owner/name`."""
    repo: str
    """`owner/name`; an empty word for weights that no Hub has."""
    revision: str = "main"
    place: Path
    """The folder in our cache that everything under this name lies in."""
    known: Known | None = None
    text: bool = False
    """Whether the text tower is wanted too."""


def load(name: str | Path, *, commercial: bool = False) -> Model:
    """Load weights: a folder, a known name (`voxelstem models`), or `hub:owner/name`, `hub:owner/name@revision`.

    With `commercial`, weights whose licence forbids commercial use, or that state none, are refused.

    Raises:
        ConfigError: a malformed name, or the licence is not for commercial use.
        CheckpointError: no such weights, no network, or what is there differs from its record or its card.
    """
    folder = _folder(name)
    known = KNOWN.get(str(name))
    if commercial and folder is None and known is not None:
        check_licence(known.licence, known.origin)  # before gigabytes are fetched
    folder = folder or fetch(name)
    if commercial:
        check_commercial(read_card(folder))
    return model.load(folder)


def fetch(name: str | Path, *, text: bool = False) -> Path:
    """The weights folder of `name`, fetched and converted when this is the first time.

    `text` asks for SPECTRE's text tower too. Later calls need no network: they read what was recorded.

    Raises:
        ConfigError: a malformed name.
        CheckpointError: no such weights, no network, or a file differs from its record.
    """
    if folder := _folder(name):
        return folder
    wanted = _understand(str(name), text=text)
    if not _is_settled(wanted.place):
        from huggingface_hub.utils import WeakFileLock

        try:
            wanted.place.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(wanted.place / ".lock"):  # several processes may start together
                if not _is_settled(wanted.place):
                    _settle(wanted)
        except OSError as error:
            raise CheckpointError(
                f"'{name}' could not be kept in the cache: {error.strerror or type(error).__name__}",
                hint="free some space, or set VOXELSTEM_CACHE to a folder that you may write",
            ) from error
    _verify(wanted)
    return wanted.place / "weights"


def export_hub(folder: Path, out: Path) -> Path:
    """Copy a weights folder to `out` after checking every file in it: whole, and ready to upload as it is.

    Raises:
        CheckpointError: the folder is damaged, `out` exists, or the disk does not take it.
    """
    card = check_folder(folder)
    if out.exists():
        raise CheckpointError(f"{out.name} exists already", hint="choose another folder or remove this one")
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        for name in members(folder, card):
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, unfinished / name)
        check_folder(unfinished)
        unfinished.rename(out)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"'{out.name}' could not be written: {error.strerror}", hint="free some space and run again"
        ) from error
    return out


def _folder(name: str | Path) -> Path | None:
    """The folder that is meant, or None for a name to look up. A weights folder here wins over a name from afar."""
    path, said = Path(name), str(name)
    if (path / CONFIG).is_file():
        return path
    if said in KNOWN or said.startswith(PREFIX):
        return None
    if path.exists() or path.name != said:
        return path  # reading its card will say what is wrong with it
    raise CheckpointError(
        f"'{said}' is not a weights folder, and no known weights have this name",
        hint=f"{closest(said, KNOWN)} Or give a weights folder, or hub:owner/name",
    )


def _understand(name: str, *, text: bool) -> Wanted:
    if known := KNOWN.get(name):
        if text and "text" not in known.optional:
            raise ConfigError(f"'{name}' has no text tower", hint="ask for spectre-large")
        place = cache_home() / "weights" / (f"{name}-text" if text else name)
        return Wanted(name=name, repo=known.repo, place=place, known=known, text=text)
    found = _REFERENCE.fullmatch(name)
    if found is None or any(odd in name for odd in ("..", "--")):
        raise ConfigError(
            "this is no name of weights on the Hub",
            hint="it is hub:owner/name or hub:owner/name@revision, a revision being a commit, a tag or a branch",
        )
    repo, revision = found.group(1), found.group(2) or "main"
    return Wanted(name=name, repo=repo, revision=revision, place=cache_home() / "hub" / repo / revision, text=text)


def _is_settled(place: Path) -> bool:
    record = read_record(place)
    return record is not None and bool(record.weights) and (place / "weights" / CONFIG).is_file()


def _settle(wanted: Wanted) -> None:
    """Bring `weights/` about: from `files/` if they are there, else from the Hub."""
    files, record = wanted.place / "files", read_record(wanted.place)
    if not files.is_dir():
        if not wanted.repo:
            raise CheckpointError(f"'{wanted.name}' is not fetched over the network", hint=_by_hand(wanted))
        record = _download(wanted, record)
    elif record is None:
        names = [path.relative_to(files).as_posix() for path in sorted(files.rglob("*")) if path.is_file()]
        chosen = [name for name in _choose(wanted, names, files) if (files / name).is_file()]
        # Kept once it proves to be weights: a copy that was cut short may be brought again.
        record = Record(repo=wanted.repo, commit="", files={name: digest(files / name) for name in chosen})
    compare(files, record.files, name=wanted.name, place=wanted.place)
    _convert(wanted, record)


def _convert(wanted: Wanted, record: Record) -> None:
    files, weights = wanted.place / "files", wanted.place / "weights"
    shutil.rmtree(weights, ignore_errors=True)  # left by an interruption: the record does not know it
    if _is_ours(files):
        check_folder(files)
        files.rename(weights)
    else:
        _import(wanted, {role: files / name for role, name in _roles(wanted, record.files).items()}, weights)
    write_record(wanted.place, replace(record, weights={CONFIG: digest(weights / CONFIG)}))
    if record.commit:  # not what somebody put there by hand
        shutil.rmtree(files, ignore_errors=True)


def _import(wanted: Wanted, paths: Mapping[str, Path], out: Path) -> None:
    family = wanted.known.family if wanted.known is not None else "spectre"
    if family == "i3resnet":
        from voxelstem.weights.i3resnet import import_i3resnet

        import_i3resnet(list(paths.values()), out)
        return
    if family == "nnssl":
        from voxelstem.weights.nnssl import import_nnssl

        import_nnssl(paths["checkpoint"], out, about=wanted.known)
        return
    if family == "fomo25":
        from voxelstem.weights.fomo25 import import_fomo25

        import_fomo25(paths["checkpoint"], out)
        return
    from voxelstem.weights.spectre import SpectreFiles, import_spectre

    files = SpectreFiles(
        backbone=paths["backbone"],
        combiner=paths.get("combiner"),
        image_head=paths.get("image_head"),
        text_head=paths.get("text_head"),
        text=paths.get("text"),
    )
    about = wanted.known or _SPECTRE
    import_spectre(files, out, spec=about.spec, data=about.data)


def _is_ours(folder: Path) -> bool:
    """Whether config.json there is a card of ours rather than another program's."""
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and "architecture" in raw and "spec" in raw


def _choose(wanted: Wanted, present: Iterable[str], folder: Path) -> list[str]:
    """Which of the `present` files are needed; `folder` has config.json already if there is one."""
    if _is_ours(folder):
        return [CONFIG, TENSORS, *((README,) if README in present else ()), *read_card(folder).extras]
    return list(_roles(wanted, present).values())


def _roles(wanted: Wanted, present: Iterable[str]) -> dict[str, str]:
    """What the importer calls each of the files that are needed."""
    names = set(present)
    files = (wanted.known or _SPECTRE).names(text=wanted.text)
    if wanted.known is None:
        files = {role: file for role, file in files.items() if file in names}
        files = files if "backbone" in files else {"backbone": TENSORS}
    if missing := sorted(set(files.values()) - names):
        what = "neither voxelstem's layout nor SPECTRE's" if wanted.known is None else "not whole"
        raise CheckpointError(
            f"what is there for '{wanted.name}' is {what}: it lacks {', '.join(missing)}", hint=_by_hand(wanted)
        )
    return files


def _download(wanted: Wanted, record: Record | None) -> Record:
    """Fetch the files at one commit, the recorded one if there is a record, and compare or record their digests."""
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, XetDownloadError

    arriving = wanted.place / "arriving"
    try:
        commit, digests = _fetch(wanted, record.commit if record else "", arriving)
    except (HTTPError, OSError, ValueError, EntryNotFoundError, XetDownloadError) as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise
        raise _refusal(error, wanted, record) from error
    if record is not None:
        try:
            compare(arriving, record.files, name=wanted.name, place=wanted.place)
        except CheckpointError:
            shutil.rmtree(arriving, ignore_errors=True)  # or the next try would take these for fetched
            raise
    else:
        record = Record(repo=wanted.repo, commit=commit, files=digests)
        write_record(wanted.place, record)
    shutil.rmtree(arriving / ".cache", ignore_errors=True)  # huggingface_hub's notes on the download
    arriving.rename(wanted.place / "files")
    return record


def _fetch(wanted: Wanted, commit: str, arriving: Path) -> tuple[str, dict[str, str]]:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise OfflineModeIsEnabled
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    asked = commit or wanted.revision
    info = HfApi(endpoint=endpoint).model_info(wanted.repo, revision=asked, files_metadata=True, timeout=10)
    at, siblings = info.sha or "", {entry.rfilename: entry for entry in info.siblings or ()}
    if not re.fullmatch(r"[0-9a-f]{40}", at) or (commit and at != commit):
        raise ValueError("no commit")

    def bring(name: str) -> str:
        path = hf_hub_download(wanted.repo, name, revision=at, local_dir=arriving, endpoint=endpoint, etag_timeout=10)
        found, entry = digest(Path(path)), siblings.get(name)
        if entry is not None and entry.lfs is not None and entry.lfs.sha256 != found:
            Path(path).unlink()
            raise CheckpointError(f"{name} of {wanted.repo} did not arrive as it was sent", hint="fetch it again")
        return found

    first = {CONFIG: bring(CONFIG)} if CONFIG in siblings and wanted.known is None else {}
    return at, {name: first.get(name) or bring(name) for name in _choose(wanted, siblings, arriving)}


def _refusal(error: Exception, wanted: Wanted, record: Record | None) -> CheckpointError:
    """Say why the Hub gave nothing. Of the network's own words only the kind is told: they can hold addresses."""
    from huggingface_hub import errors

    reasons: dict[type[Exception], str] = {
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, so nothing is fetched",
        errors.GatedRepoError: "its owner wants terms accepted on the Hub first, then `hf auth login`",
        errors.RepositoryNotFoundError: "there is no such repository, or it is private and needs `hf auth login`",
        errors.RevisionNotFoundError: "the commit that was recorded is no longer there: its history was rewritten"
        if record
        else f"it has no revision '{wanted.revision}'",
        errors.RemoteEntryNotFoundError: "a file is not there",
        errors.HfHubHTTPError: "the Hub refused",
    }
    reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), "the Hub was not reached")
    detail = type(error.__cause__ or error).__name__
    if isinstance(error, errors.HfHubHTTPError):
        detail = f"HTTP {error.response.status_code}"
    return CheckpointError(f"{wanted.repo} could not be fetched: {reason} ({detail})", hint=_by_hand(wanted))


def _by_hand(wanted: Wanted) -> str:
    """Exactly what to do without a network."""
    files, known = shown(wanted.place / "files"), wanted.known
    if known is None:
        return (
            f"where there is a network run `hf download {wanted.repo} --revision {wanted.revision} --local-dir files`, "
            f"bring that folder here as {files}, and run again"
        )
    return (
        f"where there is a network run `{known.download(text=wanted.text)}`; then either bring "
        f"{', '.join(known.names(text=wanted.text).values())} into {files} here and run again, or run "
        f"`{known.command(wanted.name, text=wanted.text)}` and give that folder instead of the name"
    )


def _verify(wanted: Wanted) -> None:
    record = read_record(wanted.place)
    assert record is not None  # settled
    compare(wanted.place / "weights", record.weights, name=wanted.name, place=wanted.place)
    if (wanted.place / "files").is_dir():
        compare(wanted.place / "files", record.files, name=wanted.name, place=wanted.place)
