"""Subjects leave the clinic under a keyed hash. The key belongs to a user or a site and lies outside every store."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import unicodedata
import uuid
from pathlib import Path

from voxelstem.errors import ConfigError

KEY_BYTES = 32
MOST_SHIFTED_DAYS = 365
_A_KEY = re.compile(rf"\s*[0-9a-fA-F]{{{2 * KEY_BYTES}}}\s*")
PSEUDONYM = re.compile(r"s[0-9a-f]{24}")
_log = logging.getLogger(__name__)


def site_key_path() -> Path:
    """Where the key lies: the file named by the environment's VOXELSTEM_KEY, else one in the user's config folder."""
    named = os.environ.get("VOXELSTEM_KEY", "")
    if named:
        return Path(named).expanduser()
    config = os.environ.get("XDG_CONFIG_HOME", "") or "~/.config"
    return Path(config).expanduser() / "voxelstem" / "site.key"


def site_key() -> bytes:
    """Read the site's key; on first use make one that only its owner can read, and log where it lies.

    Stores made with one key can be compared and merged; without it a pseudonym cannot be traced to a person.

    Raises:
        ConfigError: the file cannot be read or made, or does not hold a key; or its name is a key.
    """
    path = site_key_path()
    # A file of that name would show the key to whoever lists the folder, and hold another one.
    if _A_KEY.fullmatch(os.environ.get("VOXELSTEM_KEY", "")) and not path.exists():
        raise ConfigError(
            "VOXELSTEM_KEY holds a key itself, where the path of a file is wanted",
            hint="write the key into a file that only you can read, and set VOXELSTEM_KEY to its path",
        )
    try:
        _make_once(path)
        text = path.read_text(encoding="ascii").strip()
        key = bytes.fromhex(text)
    except OSError as error:
        raise ConfigError(
            f"the site key '{path}' cannot be read or made: {error.strerror}",
            hint="set VOXELSTEM_KEY to a file that you may read",
        ) from error
    except ValueError as error:
        raise ConfigError(f"'{path}' does not hold a site key", hint=_BROKEN_KEY) from error
    if len(key) != KEY_BYTES:
        raise ConfigError(f"'{path}' holds {len(key)} bytes, a site key has {KEY_BYTES}", hint=_BROKEN_KEY)
    return key


_BROKEN_KEY = "restore it from a backup, or point VOXELSTEM_KEY at another file: a new key gives new pseudonyms"


def _make_once(path: Path) -> None:
    """Make the key file if there is none; of two processes that try, one wins and both read its key."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(KEY_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # unlike rename, this fails where another process was faster
    except FileExistsError:
        return
    finally:
        draft.unlink()
    _log.warning("made a new site key for subject pseudonyms: %s (keep a backup; it never enters a store)", path)


def pseudonym(raw_subject: str, key: bytes) -> str:
    """Replace a person's id by `s` and 24 hex digits (HMAC-SHA256, RFC 2104, cut to 96 bits).

    Blanks around the id and the way in which accents are encoded make no difference.

    Raises:
        ValueError: the id is empty.
    """
    return "s" + _keyed("subject", _plain(raw_subject), key).hex()[:24]


def keyed_id(kind: str, raw: str, key: bytes) -> str:
    """Replace any other id (a UID, a device's number) by 24 hex digits, as `pseudonym` does for people.

    The same id gives another hash as another `kind`, so that nothing can be joined which was not meant to be.
    Empty stays empty.
    """
    return _keyed(kind, raw.strip().strip("\0"), key).hex()[:24] if raw.strip().strip("\0") else ""


def keyed_uid(raw: str, key: bytes) -> str:
    """Replace a UID by another valid one: `2.25.` and a UUID in decimals (PS3.5, B.2)."""
    return f"2.25.{uuid.UUID(bytes=_keyed('uid', raw.strip().strip(chr(0)), key)[:16], version=5).int}"


def shift_days(raw_subject: str, key: bytes) -> int:
    """By how many days all dates of a person are shifted: 1 to 365, to either side.

    One shift for all scans of the person, so the intervals between them stay (PS3.15, option 113107).

    Raises:
        ValueError: the id is empty.
    """
    drawn = int.from_bytes(_keyed("days", _plain(raw_subject), key)[:8], "big") % (2 * MOST_SHIFTED_DAYS)
    return drawn - MOST_SHIFTED_DAYS if drawn < MOST_SHIFTED_DAYS else drawn - MOST_SHIFTED_DAYS + 1


def _plain(raw_subject: str) -> str:
    plain = unicodedata.normalize("NFC", raw_subject).strip()
    if not plain:
        raise ValueError("a subject's id is empty")
    return plain


def _keyed(kind: str, text: str, key: bytes) -> bytes:
    """HMAC-SHA256 of a text of some kind; a kind holds no NUL, so no two kinds' texts are ever alike."""
    return hmac.new(key, kind.encode() + b"\0" + text.encode("utf-8", "surrogateescape"), hashlib.sha256).digest()


def key_mark(key: bytes) -> str:
    """Twelve hex digits by which a store remembers which key it was made with, and nothing more about it."""
    return hmac.new(key, b"mark", hashlib.sha256).hexdigest()[:12]


def source_name(relative: str, key: bytes) -> str:
    """Name a source in the ledger without naming anybody.

    Folder and file names often are a person's name or number, so none of them is kept: the ledger shows 16 hex digits
    of a keyed hash of the path below SRC, and the ending if it is one of the formats we know. Whoever has the key
    and the files can find the source again.
    """
    digest = _keyed("source", relative, key).hex()[:16]
    ending = re.search(r"\.(nii|nii\.gz|nrrd|nhdr|mha|mhd|dcm|zip|json)$", relative.lower())
    return digest + (ending.group() if ending else "")
