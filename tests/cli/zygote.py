"""Real processes of the command without paying for its imports each time: one process imports, then forks.

Each run is a process of its own, with its own argv, stdout, stderr and exit code, that can be killed.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SERVER = r"""
import json, os, sys, threading
import torch, peft, transformers, accelerate
import peft_attrsub.analysis, peft_attrsub.tuner, peft_attrsub.basis.build, peft_attrsub.basis.remote
import peft_attrsub.basis.convert
from peft_attrsub.cli import main

def crash_before_event(number, folder):
    # Stands for kill -9 at the worst moment: just before the number-th change of the file system.
    count = [0]
    changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "ctypes.dlsym", "os.link", "os.truncate"}
    def hook(event, args):
        if event == "open":
            path, mode, flags = args
            hit = isinstance(path, (str, bytes)) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            path, hit = (args[0] if args else ""), event in changes
        if not hit:
            return
        inside = event == "ctypes.dlsym" or os.fsdecode(path if not isinstance(path, int) else "").startswith(folder)
        if inside or (isinstance(path, str) and not os.path.isabs(path)):
            count[0] += 1
            if count[0] == number:
                os.write(1, f"crash before {event}".encode())
                os.kill(os.getpid(), 9)
    sys.addaudithook(hook)

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
        os.environ.update(job["env"])
        sys.argv = ["peft-attrsub", *job["args"]]
        if job["crash_at"]:
            crash_before_event(job["crash_at"], job["crash_in"])
        code = 0
        try:
            code = main() or 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 1
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)
    print(json.dumps(pid), flush=True)
"""


@dataclass
class Result:
    """Exit code (negative: killed by that signal), stdout and stderr of one run."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


class Run:
    """A run in flight."""

    def __init__(self, zygote, pid, out, err):
        self.zygote, self.pid, self._out, self._err = zygote, pid, out, err

    def kill(self, signum=signal.SIGKILL):
        os.kill(self.pid, signum)

    def has_spoken(self):
        """Whether anything is on stdout yet: the plan, printed before the work begins."""
        return self._out.exists() and self._out.stat().st_size > 0

    def wait(self) -> Result:
        code = self.zygote.ask({"wait": self.pid})
        return Result(code, self._out.read_text(), self._err.read_text())


class Zygote:
    """Starts `peft-attrsub` with any arguments as a new process."""

    def __init__(self):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.scratch = Path(tempfile.mkdtemp(prefix="cli-output-"))
        self.count = 0

    def ask(self, message):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the command's modules cannot be imported"
        return json.loads(answer)

    def start(self, *args, cwd="/", crash_at=0, crash_in="", **env) -> Run:
        self.count += 1
        out, err = (self.scratch / f"{self.count}.{kind}" for kind in ("out", "err"))
        job = {"args": [str(a) for a in args], "out": str(out), "err": str(err), "cwd": str(cwd), "env": env}
        pid = self.ask({**job, "crash_at": crash_at, "crash_in": str(crash_in)})
        return Run(self, pid, out, err)

    def __call__(self, *args, **kwargs) -> Result:
        return self.start(*args, **kwargs).wait()

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()
        for file in self.scratch.iterdir():
            file.unlink()
        self.scratch.rmdir()


def wait_until(condition, seconds=20.0):
    """Poll closely until the condition holds; False when time runs out."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.0005)
    return False
