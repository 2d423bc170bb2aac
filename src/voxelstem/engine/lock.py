"""One training at a time in a run folder."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from voxelstem import distributed
from voxelstem.errors import ConfigError

LOCK = ".lock"


@contextmanager
def locked(run: Path) -> Generator[None]:
    """Hold the run folder, making it if need be. Of processes that train together, number 0 holds it for all.

    The kernel lets go when the process ends, however it ends, so nothing stale is ever left behind; the file stays and
    means nothing by itself. On a network drive this keeps other machines out where the drive carries locks from one
    to the other (NFS does since version 4; Lustre wants the mount option `flock`). Where it carries none at all, that
    is an error rather than a run without a lock.

    Raises:
        ConfigError: another process trains in this folder, or it cannot be written or locked.
    """
    if distributed.ranks().rank != 0:
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK).open("ab")
    except OSError as error:
        raise ConfigError(
            f"the run folder '{run.name}' cannot be written: {error.strerror}",
            hint="check its rights and free some space, then run the same command again",
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise _refused(run, error) from error
        yield


def _refused(run: Path, error: OSError) -> ConfigError:
    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
        return ConfigError(
            f"another process trains in the run folder '{run.name}'",
            hint="wait until it is done (`voxelstem show` tells how far it is), end it, or choose another --out",
        )
    return ConfigError(
        f"the run folder '{run.name}' cannot be locked: {error.strerror}",
        hint="put the run on a drive that knows locks (a local one, or NFS version 4)",
    )
