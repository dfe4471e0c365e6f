"""Clients of a Hub as processes of their own: one process imports everything once, then forks for each job.

A job is a function of jobs.py or a `peft-attrsub` command, with a cache (HF_HOME), a token and settings of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cli.zygote import Run

ROOT = Path(__file__).resolve().parents[2]
# Settings of whoever runs the tests, which must not reach the clients.
_OTHERS = [
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"),
    *("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE"),
]

SERVER = r"""
import importlib, json, os, sys, time, traceback, warnings
import torch, peft, transformers, accelerate, huggingface_hub.constants, peft_attrsub.cli
import peft_attrsub.analysis, peft_attrsub.tuner, peft_attrsub.basis.build, peft_attrsub.basis.remote
import tests.hub.jobs as jobs

for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        _, status = os.waitpid(job["wait"], 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(job["out"], flags, 0o600), 1)
        os.dup2(os.open(job["err"], flags, 0o600), 2)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", 1), open(2, "w", 1)
        os.chdir(job["cwd"])
        for name, value in job["env"].items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        # Both read the environment when they are imported; here that was before it was set.
        constants = vars(importlib.reload(huggingface_hub.constants))
        for module in [vars(m) for name, m in sys.modules.items() if name.startswith("peft_attrsub")]:
            module.update({name: constants[name] for name in module if name.startswith("HF_")})
        if job["env"]["MATPLOTLIB"] != "there":
            sys.modules["matplotlib"] = None
        if job["env"]["MATPLOTLIB"] == "unused":
            warnings.filterwarnings("ignore", ".*matplotlib")
        if job["env"]["NO_WAITING"]:
            time.sleep = lambda seconds: None  # between the client's own attempts
        code = 0
        try:
            if "args" in job:
                sys.argv = ["peft-attrsub", *job["args"]]
                code = peft_attrsub.cli.main() or 0
            else:
                answer = jobs.call(job["job"], job["kwargs"])
                with open(job["answer"], "w") as file:
                    json.dump(answer, file)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)
    print(json.dumps(pid), flush=True)
"""


@dataclass
class Done:
    """How a process ended: its exit code (negative: killed), what it printed, and a job's answer."""

    code: int
    out: str
    err: str
    answer: dict[str, Any] | None = None

    def ok(self) -> Done:
        """The process ended well."""
        assert self.code == 0 and (self.answer is None or "value" in self.answer), (self.err, self.answer)
        return self

    @property
    def value(self) -> Any:
        """What the job returned."""
        assert self.answer is not None, self.err
        assert "value" in self.answer, self.answer
        return self.answer["value"]

    @property
    def sentence(self) -> str:
        """The BasisError that the job, or the sentence on stderr that the command, ended with: one, on one line."""
        if self.answer is None:
            # huggingface_hub may have told before that it tries again.
            told, _, text = self.err.rstrip("\n").rpartition("peft-attrsub: ")
            assert self.code == 2 and self.out == "" and not told.rpartition("\n")[2], (self.code, self.out, self.err)
            assert "Traceback" not in told and "Warning" not in told, told
        else:
            assert "error" in self.answer, self.answer
            text = self.answer["error"]
        assert text and "\n" not in text and "Traceback" not in text, text
        return text


class Worker:
    """Forks clients of the Hub at one address."""

    def __init__(self, address: str) -> None:
        self.address = address
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        env.update(HF_ENDPOINT=address, HF_HUB_DISABLE_PROGRESS_BARS="1")
        for name in _OTHERS:
            env.pop(name, None)
        self.env = env
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.scratch = tempfile.TemporaryDirectory(prefix="hub-jobs-")
        self.count = 0

    def ask(self, message: dict[str, Any]) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the client's modules cannot be imported"
        return json.loads(answer)

    def start(self, message: dict[str, Any], env: dict[str, str | None], cwd: Path) -> Started:
        self.count += 1
        out, err, answer = (Path(self.scratch.name) / f"{self.count}.{kind}" for kind in ("out", "err", "answer"))
        places = {"out": str(out), "err": str(err), "answer": str(answer), "cwd": str(cwd), "env": env}
        return Started(self, self.ask({**message, **places}), out, err, answer)

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()
        self.scratch.cleanup()


class Started(Run):
    """A client at work: `kill()` it, or `finish()`."""

    def __init__(self, worker: Worker, pid: int, out: Path, err: Path, answer: Path) -> None:
        super().__init__(worker, pid, out, err)
        self._answer = answer

    def finish(self) -> Done:
        ended = self.wait()
        answer = json.loads(self._answer.read_text()) if self._answer.exists() else None
        return Done(ended.code, ended.out, ended.err, answer)


class Client:
    """client("push", folder=..., repo=...) runs a job, client.cli("push", ...) the command; each a new process.

    Options: home (the name of its cache; another name is an empty one), as_token (None: nobody), offline,
    xet (whether hf_xet may be used), matplotlib ("there", "missing", or "unused": missing, and nobody minds; drawing
    is slow), impatient (does not wait between attempts).
    """

    def __init__(self, worker: Worker, root: Path, token: str | None) -> None:
        self.worker, self.root, self.token = worker, root, token

    def __call__(self, job: str, /, **kwargs: Any) -> Done:
        return self.start(job, **kwargs).finish()

    def start(self, job: str, /, **kwargs: Any) -> Started:
        env = self._environment(kwargs)
        plain = json.loads(json.dumps(kwargs, default=os.fspath))
        return self.worker.start({"job": job, "kwargs": plain}, env, self.root)

    def cli(self, *args: object, **options: Any) -> Done:
        return self.start_cli(*args, **options).finish()

    def start_cli(self, *args: object, **options: Any) -> Started:
        env = self._environment(options)
        assert not options, options
        return self.worker.start({"args": [str(a) for a in args]}, env, self.root)

    def python(self, code: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """A new interpreter, which has imported nothing."""
        env = {**self.worker.env, **self._environment(options)}
        command = [sys.executable, "-c", code]
        plain = {name: value for name, value in env.items() if value is not None}
        return subprocess.run(command, env=plain, cwd=self.root, capture_output=True, text=True, timeout=120)

    def _environment(self, options: dict[str, Any]) -> dict[str, str | None]:
        home = self.root / options.pop("home", "home")
        return {
            "HF_HOME": str(home),
            "HF_TOKEN": options.pop("as_token", self.token),
            "HF_HUB_OFFLINE": "1" if options.pop("offline", False) else None,
            "HF_HUB_DISABLE_XET": None if options.pop("xet", False) else "1",
            "MATPLOTLIB": options.pop("matplotlib", "unused"),
            "NO_WAITING": "1" if options.pop("impatient", False) else None,
        }
