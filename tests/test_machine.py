"""What the machine lets a process use, told from the files of many kinds of machines; files on odd file systems."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_attrsub import _files, _machine

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="ascii")
    return root


# ------------------------------------------------------------------------------------------------------------ cores


@pytest.fixture
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


CORES = {
    "no /proc, as on macOS": ({}, 16),
    "no limit, v2": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
    "docker --cpus 2.5, v2": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
    "docker --cpus 0.5, v2": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
    "a parent's limit counts": (
        {
            "proc/self/cgroup": "0::/kubepods/pod7/abc\n",
            "sys/fs/cgroup/kubepods/pod7/abc/cpu.max": "max 100000\n",
            "sys/fs/cgroup/kubepods/pod7/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/cpu.max": "800000 100000\n",
        },
        4,
    ),
    "the host's path in a container, v1": (
        {
            "proc/self/cgroup": "12:cpuset:/x\n4:cpu,cpuacct:/docker/0123\n3:memory:/docker/0123\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "600000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        6,
    ),
    "mounted under one name, v1": (
        {
            "proc/self/cgroup": "4:cpuacct,cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n",
        },
        3,
    ),
    "no limit, v1": (
        {
            "proc/self/cgroup": "4:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        16,
    ),
    "more than there is": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 16),
    "not understood": ({"proc/self/cgroup": "0::/\nnonsense\n", "sys/fs/cgroup/cpu.max": "0 0\n"}, 16),
}


@pytest.mark.parametrize("case", CORES)
def test_cores(tmp_path: Path, sixteen_cores: None, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    files, expected = CORES[case]
    root = write(tmp_path, files)
    assert _machine.available_cores(root) == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert _machine.cores_per_process(root) == max(1, expected // 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert _machine.available_cores(root) == min(2, expected)


def test_cores_where_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "many")
    assert _machine.available_cores(tmp_path) == _machine.cores_per_process(tmp_path) == 1


@given(st.text(max_size=60), st.text(max_size=30), st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_damaged_system_files_raise_nothing(tmp_path_factory: pytest.TempPathFactory, a: str, b: str, c: str) -> None:
    root = tmp_path_factory.mktemp("root")
    for name, text in {"cpu.max": b, "memory.max": b, "memory.current": c, "memory.stat": a}.items():
        (root / "sys/fs/cgroup").mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(text, encoding="utf-8", errors="replace")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/\n" + a, encoding="utf-8", errors="replace")
    (root / "proc/meminfo").write_text("MemAvailable: " + b, encoding="utf-8", errors="replace")
    assert _machine.available_cores(root) >= 1
    assert (_machine.free_memory(root) or 0) >= 0


# ----------------------------------------------------------------------------------------------------------- memory

MEMINFO = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:   {8 * GIB // 1024} kB\n"}
MEMORY = {
    "no groups": ({}, 8 * GIB),
    "no limit, v2": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "max\n",
            "sys/fs/cgroup/memory.current": f"{GIB}\n",
        },
        8 * GIB,
    ),
    "docker --memory 4g, v2; 1 GiB in use, half of it cache": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{GIB}\n",
            "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {GIB // 2}\n",
        },
        4 * GIB - GIB // 2,
    ),
    "a parent's limit, v2": (
        {
            "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/job/memory.max": f"{3 * GIB}\n",
            "sys/fs/cgroup/job/memory.current": f"{GIB}\n",
        },
        2 * GIB,
    ),
    "v1": (
        {
            "proc/self/cgroup": "3:memory:/docker/0123\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB // 4}\n",
        },
        GIB + GIB // 4,
    ),
    "no limit, v1": (
        {
            "proc/self/cgroup": "3:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
        },
        8 * GIB,
    ),
    "over the limit": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/memory.current": f"{2 * GIB}\n",
        },
        0,
    ),
}


@pytest.mark.parametrize("case", MEMORY)
def test_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    files, expected = MEMORY[case]
    root = write(tmp_path, MEMINFO | files)
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert _machine.free_memory(root) == expected
    # ulimit -v, of which half a GiB is used
    write(root, {"proc/self/statm": f"{GIB // 2 // os.sysconf('SC_PAGE_SIZE')} 1 1 0 0 0 0\n"})
    monkeypatch.setattr(resource, "getrlimit", lambda _: (GIB, GIB))
    assert _machine.free_memory(root) == min(expected, GIB // 2)


def test_memory_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _machine.free_memory(tmp_path) is not None  # sysconf tells, as on macOS
    assert _machine.free_shared_memory(tmp_path) is None
    monkeypatch.setattr(os, "sysconf", lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert _machine.free_memory(tmp_path) is None


# ------------------------------------------------------------------------------------------------------------ files


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom peft_attrsub import _files\n"
        "os.umask(int(sys.argv[2], 8))\npath = _files.write_atomically(Path(sys.argv[1]) / 'ours', b'x')\n"
        "(Path(sys.argv[1]) / 'plain').write_bytes(b'x')\nprint(_files.current_umask())\n"
    )
    for number, mask in enumerate(("022", "077", "002")):
        folder = tmp_path / str(number)
        folder.mkdir()
        done = run_python("-c", code, str(folder), mask)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) == int(mask, 8)
        assert (folder / "ours").stat().st_mode == (folder / "plain").stat().st_mode


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "a b;c", ".hidden"])
def test_any_name_that_a_file_may_have_can_be_written(tmp_path: Path, name: str) -> None:
    _files.write_atomically(tmp_path / name, b"old")
    _files.write_atomically(tmp_path / name, b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"new")]


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path: Path) -> None:
    blocks = [bytes([number]) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=_files.write_atomically, args=(tmp_path / "x", block)) for block in blocks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() in blocks


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_file_systems_without_fsync_or_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def unable(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "not permitted")

    monkeypatch.setattr(os, "fsync", unable)
    monkeypatch.setattr(os, "chmod", refuse)
    assert _files.write_atomically(tmp_path / "x", b"data").read_bytes() == b"data"
    _files.sync_path(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_or_broken_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    _files.write_atomically(tmp_path / "x", b"old")

    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=os.strerror(number)):
        _files.write_atomically(tmp_path / "x", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"old")]


def test_a_lock_keeps_other_processes_out_until_its_holder_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys, time\nfrom peft_attrsub._files import locked\n"
        "with locked(sys.argv[1], 'taken'):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, env=environment())
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError, match="come back later"), _files.locked(path, "come back later"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with _files.locked(path, "come back later"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    fcntl = pytest.importorskip("fcntl")

    def unable(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unable)
    with open(tmp_path / "x", "wb") as file:
        assert not _files.lock(file.fileno())
    with _files.locked(tmp_path / "x", "taken"):
        pass


# ------------------------------------------------------------------------------------------------------- fresh Python


def environment(**changes: str | None) -> dict[str, str]:
    """This process's, with this checkout first on the path; changes of None are taken out."""
    found = {**os.environ, "PYTHONPATH": str(ROOT), **changes}
    return {key: value for key, value in found.items() if value is not None}


def run_python(*arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=environment(**changes),
        timeout=240,
    )
