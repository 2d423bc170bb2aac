"""What SQLite's own tests do: the n-th call that changes the disk fails or is the last, for every n until all go well.

The calls are counted below Python and SQLite alike, by a small library that is loaded before the C library; so every
write, sync and rename of volumes, folders and the catalogue's transactions has its turn.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <fcntl.h>
#include <sys/types.h>
#include <unistd.h>
static int left = -1, code = 0;                    /* -1: not armed; code 0: the process ends here */
static int fails(void) {
    if (left < 0) return 0;
    if (left > 0 && --left > 0) return 0;
    if (code == 0) _exit(77);                      /* as SIGKILL: nothing is tidied up */
    errno = code; left = -1; return 1;
}
void arm(int n, int what) { left = n; code = what; }
int still_armed(void) { return left > 0; }
#define SHIM(type, name, params, args) \
    type name params { static type (*real) params; if (!real) real = dlsym(RTLD_NEXT, #name); \
                       if (fails()) return -1; return real args; }
SHIM(ssize_t, write, (int fd, const void *data, size_t n), (fd, data, n))
SHIM(ssize_t, pwrite, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at))
SHIM(ssize_t, pwrite64, (int fd, const void *data, size_t n, off64_t at), (fd, data, n, at))
int fsync(int fd) { return fails() ? -1 : 0; }     /* counted, not done: no power is cut here, and tests are many */
int fdatasync(int fd) { return fails() ? -1 : 0; }
SHIM(int, ftruncate, (int fd, off_t size), (fd, size))
SHIM(int, ftruncate64, (int fd, off64_t size), (fd, size))
SHIM(int, rename, (const char *one, const char *two), (one, two))
SHIM(int, link, (const char *one, const char *two), (one, two))
SHIM(int, unlink, (const char *path), (path))
SHIM(int, mkdir, (const char *path, mode_t mode), (path, mode))
"""

DRIVER = """
    import ctypes, errno, hashlib, json, os, shutil, sqlite3, sys
    from pathlib import Path
    import numpy as np
    from voxelstem.errors import VoxelstemError
    from voxelstem.store import Store, Writer
    from voxelstem.store.catalogue import dump
    from voxelstem.store.encoding import encode_study
    from voxelstem.study import Acquisition, LabelMap, Provenance, Report, Study, Volume
    from dataclasses import replace

    shim, place, code, old = ctypes.CDLL(None), Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])

    def study(seed):
        rng = np.random.default_rng(seed)
        volume = Volume(
            array=rng.integers(-1000, 1000, (1, 9, 8, 7)).astype(np.float32), affine_ras=np.eye(4), modality="CT",
            provenance=Provenance(source_format="phantom", sha256="", orientation="RAS"),
            acquisition=Acquisition(group=f"g{seed}"),
            labels=LabelMap(array=rng.integers(0, 2, (9, 8, 7)).astype(np.int16), classes={1: "liver"}),
        )
        made = encode_study(Study(subject=f"s{seed:024x}", volumes=(volume,), report=Report(rest_text="clear")))
        native = encode_study(Study(subject="", volumes=(replace(volume, array=volume.array + 1),))).volumes[0]
        return replace(made, volumes=(replace(made.volumes[0], native=native),))

    studies = [study(1), replace(study(2), volumes=(replace(study(2).volumes[0], native=None, labels=None),))]

    def ingest(root):
        if not (root / "catalogue.sqlite").exists() or catalogue_is_empty(root):
            Store.create(root)
        with Writer(root) as writer:
            for number, each in enumerate(studies):
                if not writer.holds(str(number), "1"):
                    writer.add(each, source=str(number), fingerprint="1")

    def catalogue_is_empty(root):
        try:
            Store.open(root)
        except VoxelstemError as error:
            return "never finished" in error.problem
        return False

    def files(root):
        found = (path for path in sorted(root.rglob("*")) if path.suffix == ".b2nd" or path.name.startswith(".draft"))
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}

    def forked(work):
        child = os.fork()
        if child == 0:
            try:
                work()
                os._exit(0)
            except VoxelstemError:
                os._exit(3)
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(5)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def begin(root):
        if old.is_dir():
            shutil.copytree(old, root)

    begin(place / "straight")
    assert forked(lambda: ingest(place / "straight")) == 0
    wanted, said = files(place / "straight"), dump(place / "straight")
    ends = []
    for at in range(1, 1000):
        root = place / "broken"
        begin(root)
        def hurt():
            shim.arm(at, code)
            ingest(root)
            os._exit(1 if shim.still_armed() else 0)
        end = forked(hurt)
        assert end in (0, 1, 3, 77), (at, end)
        if end == 1:
            break
        ends.append(end)
        def recover():
            if (root / "catalogue.sqlite").exists() and not catalogue_is_empty(root):
                store = Store.open(root)
                for record in store:
                    store.check(record.key)
            ingest(root)
        assert forked(recover) == 0, at
        assert files(root) == wanted, at
        assert dump(root) == said, at
        shutil.rmtree(root)
    print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", folder / "shim.so", folder / "shim.c", "-ldl"]
    subprocess.run(command, check=True)
    return folder / "shim.so"


def run_all(shim: Path, place: Path, code: int, old: Path = Path("none")) -> list[int]:
    answer = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DRIVER), str(place), str(code), str(old)],
        env=os.environ | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(0, id="killed"),
        *(pytest.param(n, id=name, marks=pytest.mark.slow) for n, name in ((28, "ENOSPC"), (5, "EIO"))),
    ],
)
def test_at_every_call_the_store_stays_whole_and_a_rerun_repeats_every_byte(shim, tmp_path, code):
    ends = run_all(shim, tmp_path, code)
    assert len(ends) >= 50, "five files with write, sync, rename and syncs of folders, and the transactions"
    assert set(ends) <= ({77} if code == 0 else {0, 3})
    assert ends.count(77 if code == 0 else 3) > len(ends) / 2


@pytest.mark.slow
def test_an_upgrade_is_whole_or_did_not_happen_at_every_call(shim, tmp_path, format_1):
    ends = run_all(shim, tmp_path, 0, format_1)
    assert len(ends) >= 50
