"""kill -9 at any moment: the final name holds a whole basis or nothing, and the next run succeeds."""

import os
import platform
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from peft_attrsub import Basis, BasisError
from tests.basis.helpers import random_factors, save_lora

from .zygote import wait_until

LARGE = {f"blocks.{i}.fc": (768, 640) for i in range(24)}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Eight adapters whose mining takes about a second."""
    root = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    return [save_lora(root / f"texture-{i}", random_factors(LARGE, 16, generator), lora_alpha=16) for i in range(8)]


def whole(folder):
    """The digest of a complete, intact basis; fails on a partial one."""
    basis = Basis.from_pretrained(folder)
    basis.verify()
    return basis.digest


def visible(folder):
    """What a user or a glob sees there."""
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def build(large, out, *extra):
    return ["build-basis", *large, "-o", out, "--dim", 64, *extra]


def test_killed_while_mining_or_saving(cli, large, tmp_path):
    started = time.monotonic()
    result = cli(*build(large, tmp_path / "first"))
    assert result.code == 0, result.err
    duration, digest = time.monotonic() - started, whole(tmp_path / "first")
    moments = random.Random(0)
    outcomes = []
    for attempt in range(8):
        parent = tmp_path / f"try{attempt}"
        parent.mkdir()
        run = cli.start(*build(large, parent / "basis"))
        if attempt % 2:  # as soon as anything appears on disk: in the middle of writing
            assert wait_until(lambda parent=parent: any(parent.iterdir())), "nothing was ever written"
            time.sleep(moments.uniform(0, 0.02))
        else:
            time.sleep(moments.uniform(0, duration))
        run.kill()
        killed = run.wait().code == -signal.SIGKILL
        outcomes.append(killed)
        if killed and not (parent / "basis").exists():
            assert visible(parent) == [], "a partial result is in plain view"
            with pytest.raises(BasisError):
                Basis.from_pretrained(parent / "basis")
        else:
            assert whole(parent / "basis") == digest
    assert sum(outcomes) >= 4, "hardly any run was caught alive: make it slower"
    again = cli(*build(large, tmp_path / "try1" / "basis"))
    assert again.code == 0, again.err
    assert whole(tmp_path / "try1" / "basis") == digest and visible(tmp_path / "try1") == ["basis"]


def test_overwrite_killed_leaves_the_old_basis(cli, large, tmp_path):
    assert cli(*build(large[:4], tmp_path / "basis")).code == 0
    old = whole(tmp_path / "basis")
    moments = random.Random(1)
    caught = 0
    for _ in range(5):
        run = cli.start(*build(large, tmp_path / "basis", "--overwrite"))
        hidden = {p.name for p in tmp_path.iterdir()}
        assert wait_until(lambda hidden=hidden: {p.name for p in tmp_path.iterdir()} - hidden)
        time.sleep(moments.uniform(0, 0.01))
        run.kill()
        if run.wait().code == -signal.SIGKILL:
            now = whole(tmp_path / "basis")
            caught += now == old
            if now != old:
                break
    assert caught >= 1, "no run was caught before it had finished"


def crash_everywhere(cli, args, folder, check):
    """Run again and again, killed just before the 1st, 2nd, 3rd ... change on disk, until a run gets through."""
    for number in range(1, 80):
        result = cli(*args, crash_at=number, crash_in=folder)
        check(result)
        if result.code != -signal.SIGKILL:
            assert result.code == 0, result.err
            return number - 1
    raise AssertionError("the run never got through")


def test_killed_before_every_change_on_disk(cli, adapters, tmp_path):
    out = tmp_path / "out" / "basis"
    out.parent.mkdir()
    moments = 0
    for number in range(1, 80):
        result = cli("build-basis", *sorted(adapters.iterdir()), "-o", out, crash_at=number, crash_in=out.parent)
        if result.code != -signal.SIGKILL:
            assert result.code == 0, result.err
            break
        moments += 1
        if out.exists():
            whole(out)
            for file in out.iterdir():
                file.unlink()
            out.rmdir()
        else:
            assert visible(out.parent) == []
    assert moments >= 3, "the run was not interrupted often enough to prove anything"
    assert visible(out.parent) == ["basis"]
    whole(out)


def test_overwrite_killed_before_every_change_on_disk(cli, adapters, tmp_path):
    out = tmp_path / "out" / "basis"
    paths = sorted(adapters.iterdir())
    assert cli("build-basis", *paths, "-o", out, "--dim", 1).code == 0
    allowed = {whole(out)}
    assert cli("build-basis", *paths, "-o", tmp_path / "new", "--dim", 2).code == 0
    new = whole(tmp_path / "new")
    args = ["build-basis", *paths, "-o", out, "--dim", 2, "--overwrite"]

    def old_or_new(result):
        assert whole(out) in allowed | {new}, f"neither basis is there ({result.out})"
        assert visible(out.parent) == ["basis"]

    assert crash_everywhere(cli, args, out.parent, old_or_new) >= 4
    assert whole(out) == new


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_by_the_user(number, cli, large, tmp_path):
    """Ctrl-C and SIGTERM clean up behind themselves and show one sentence."""
    for attempt, delay in enumerate((0.1, 0.05, 0.0, 0.0, 0.0)):  # on a busy machine the signal may come too late
        parent = tmp_path / f"out-{attempt}"
        parent.mkdir()
        run = cli.start(*build(large, parent / "basis"))
        assert wait_until(run.has_spoken)
        time.sleep(delay)
        run.kill(number)
        result = run.wait()
        if result.code != 0:
            break
    assert result.code == 128 + number, "it was too late every time: make the run slower"
    assert list(parent.iterdir()) == []
    assert "Traceback" not in result.err


def test_the_next_run_clears_what_a_killed_one_left(tmp_path, cli, adapters):
    # a pid that has ended, and one that lives: only the first one's remains may go
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, alive = (tmp_path / f".basis.partial-{platform.node()}-{pid}-x" for pid in (ended.pid, os.getpid()))
    for folder in (dead, alive):
        folder.mkdir()
    result = cli("build-basis", adapters / "texture-0", "-o", tmp_path / "basis")
    assert result.code == 0, result.err
    assert not dead.exists() and alive.exists()
