"""A worker process: samples, renders and stores one scene after another, as `pool.Pool` tells it to.

Run as a file, never imported by the parent's package: `python -P worker.py`. A renderer needs neither the package's
`__init__` nor the registration with PEFT that it prepares; an empty package of the same name stands in for it, so that
a worker, which is started anew every 50 scenes, imports this room and nothing else.

Standard input: one line of JSON with the setup, then one line per scene. Standard output: one line per scene, and
nothing else; whatever libraries print, from C too, goes to standard error, which is the worker's log.
"""

from __future__ import annotations

import errno
import importlib
import importlib.machinery
import inspect
import json
import os
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = "peft_attrsub"


class StoppedError(Exception):
    """Somebody asked the worker to stop: the scene it is in is left."""


class Stop:
    """SIGINT and SIGTERM: leave at once while waiting for work, after the current view while rendering."""

    def __init__(self) -> None:
        self.asked, self.idle = False, True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        if self.idle:
            raise SystemExit(0)


def die_with(parent: int) -> None:
    """Have Linux kill this process when its parent dies, so that no orphan renders on beside the next run."""
    try:
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError, ImportError, TypeError):
        pass  # elsewhere the worker notices at the end of its scene, by the end of its standard input
    if os.getppid() != parent:
        raise SystemExit(0)


def stand_in(package: str) -> None:
    """An empty module in place of the package's `__init__`, through which its rooms are found all the same."""
    module = types.ModuleType(PACKAGE)
    module.__path__ = [package]
    module.__spec__ = importlib.machinery.ModuleSpec(PACKAGE, None, is_package=True)
    sys.modules[PACKAGE] = module


def load(name: str) -> Any:
    """The attribute that "module:attribute" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


class SceneMaker:
    """Turns numbers of scenes into folders, by the plan of the dataset."""

    def __init__(self, plan: dict[str, Any], tag: str, stop: Stop, threads: int | None = None) -> None:
        self.storage = importlib.import_module("peft_attrsub.scenes.storage")
        self.plan, self.tag, self.stop = plan, tag, stop
        kind = load(plan["recipe"]["class"])
        self.recipe = getattr(kind, "from_plan", kind)(**plan["recipe"]["fields"])
        self.sampler = load(plan["sampler"])
        self.renderer = load(plan["renderer"])
        self.options = dict(plan["options"])
        # Not in the plan: it changes how fast a picture comes, never the picture.
        if threads is not None and "threads" in inspect.signature(self.renderer).parameters:
            self.options.setdefault("threads", threads)
        self.form = self.storage.SceneFormat(jpeg=plan["jpeg"], depth=plan["depth"])

    def make(self, index: int, partial: Path, final: Path, redo: list[int] | None, replace: bool) -> int:
        """Scene `index` in `partial`, renamed to `final` at the end; returns its size in bytes.

        redo: the views of a finished scene to render again, the others are taken over; None: all of them.
        replace: what has the final name is broken, take its place.
        """
        if self.plan["textures"] is None:
            scene = self.sampler(self.recipe, index)
        else:
            scene = self.sampler(self.recipe, index, textures=self.plan["textures"])
        if redo is not None:
            before = self.storage.read_manifest(final)
            manifest = self._render(scene, partial, final, set(redo))
            if manifest["files"] == before["files"]:
                self.storage.publish(partial, final, replace=True)
                return int(manifest["bytes"])
            # The views look different today (another version of a library): the scene must come from one hand.
        manifest = self._render(scene, partial)
        self.storage.publish(partial, final, replace)
        return int(manifest["bytes"])

    def _render(self, scene: Any, partial: Path, old: Path | None = None, redo: set[int] | None = None) -> Any:
        remove(partial)
        writer = self.storage.SceneWriter(partial, scene, self.form, self.tag)
        with self.renderer(scene, **self.options) as renderer:
            for index in range(len(scene.cameras)):
                if self.stop.asked:
                    raise StoppedError
                if old is not None and redo is not None and index not in redo:
                    writer.keep(index, old)
                else:
                    writer.add(index, renderer.render(index))
        return writer.finish()


def remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def attempt(maker: SceneMaker, job: dict[str, Any]) -> dict[str, Any]:
    """Make one scene; whatever goes wrong becomes the reply."""
    partial = Path(job["partial"])
    reply: dict[str, Any] = {"index": job["index"], "kind": "error"}
    try:
        size = maker.make(job["index"], partial, Path(job["final"]), job["redo"], job["replace"])
        return reply | {"kind": "done", "bytes": size}
    except StoppedError:
        reply["kind"] = "stopped"
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            reply["kind"] = "disk"
        elif isinstance(error, ImportError):
            reply["kind"] = "missing"
        elif type(error).__name__ == "NoDeviceError":  # of view.py, which this file does not import at its top
            reply["kind"] = "no device"
        reply |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        print(reply["traceback"], file=sys.stderr, flush=True)
    remove(partial)
    return reply


def main() -> None:
    stop = Stop()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    setup = json.loads(sys.stdin.buffer.readline())
    die_with(setup["parent"])
    sys.path[:] = setup["path"]
    stand_in(setup["package"])
    release: Callable[[], None] = load("peft_attrsub._machine:release_memory")
    maker: SceneMaker | None = None
    for line in iter(sys.stdin.buffer.readline, b""):
        stop.idle = False
        job = json.loads(line)
        start = time.monotonic()
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} scene {job['index']}", file=sys.stderr, flush=True)
        try:
            maker = maker or SceneMaker(setup["plan"], setup["tag"], stop, setup["threads"])
            reply = attempt(maker, job)
        except Exception as error:  # nothing of the plan can be made, whatever the scene
            reply = {"index": job["index"], "kind": "missing", "error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        release()
        print(f"{reply['kind']} after {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        replies.write(json.dumps(reply) + "\n")
        stop.idle = True
        if stop.asked:
            break


if __name__ == "__main__":
    main()
