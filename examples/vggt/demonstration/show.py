"""What a person sees of a running demo: lines, a bar with the time left, and the page that grows.

It also keeps OUT/demo.json: what the demo is made with, what was measured, and the seconds of each call.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from peft_attrsub.evaluation.files import write_atomically

from .estimate import Forecast, Job, choose_scale, spoken
from .page import Status, write_page
from .plan import SPEED, Step, opening, plan, read_json, write_settings
from .runner import Running, record_of
from .scales import ATTRIBUTES, AUTOMATIC, SCALES

RECORD = "demo.json"
#: Seconds between two lines where there is no terminal, and between two versions of the page.
LINE, REDRAW = 20.0, 5.0


class Show:
    """The watcher of the runner. settings: as in demo.json; "scale" is None until it is chosen.

    clock, say: replaced by tests.
    """

    def __init__(
        self,
        out: Path,
        settings: dict[str, Any],
        workers: int,
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.out, self.settings, self.workers, self.clock = out, settings, workers, clock
        self.start = clock()
        self.calls: list[float] = settings.setdefault("calls", [])
        self.forecast: Forecast | None = None
        self.running: dict[str, Job] = {}
        self.left: float | None = None
        self.stopped = ""
        self._drawn = self._told = -1e9
        self._changed = True
        self.bar = tqdm(
            total=100.0,
            bar_format="{bar:20} {elapsed}  {desc}",
            dynamic_ncols=True,
            leave=False,
            disable=say is not None or not sys.stderr.isatty(),
        )
        self._say = say
        self.steps = self._known()
        self.done = self._records()
        if not self.finished_all:
            self.calls.append(0.0)

    def _known(self) -> list[Step]:
        """The steps that are known: all, or as long as the scale is not chosen the first."""
        name, size = self.settings["scale"], self.settings["image_size"]
        if name is not None:
            write_settings(self.out, size, SCALES[name])
            return plan(self.out, self.settings["model"], size, SCALES[name])
        write_settings(self.out, size, SCALES[AUTOMATIC[0]])
        return opening(self.out, self.settings["model"], size, SCALES[AUTOMATIC[0]])

    def _records(self) -> dict[str, float]:
        found = {step.name: record_of(self.out, step) for step in self.steps}
        return {name: float(record["seconds"]) for name, record in found.items() if record is not None}

    @property
    def finished_all(self) -> bool:
        return self.settings["scale"] is not None and len(self.done) == len(self.steps)

    # --- what the runner calls ---------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        if self._say is not None:
            self._say(text)
        elif self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def finished(self, step: Step, seconds: float) -> Sequence[Step]:
        self.done[step.name], self._changed = seconds, True
        if step.name != "speed":
            return []
        before = {known.name for known in self.steps}
        self.know_speed()
        return [known for known in self.steps if known.name not in before]

    def tick(self, running: Sequence[Running]) -> None:
        self.running = {job.step.name: job.job() for job in running}
        self.update()

    # --- the scale ---------------------------------------------------------------------------------------------------

    def know_speed(self) -> None:
        """Once speed.py has measured: the scale, where it is still to be chosen, and the time that it takes."""
        path = self.out / "speed" / SPEED
        if not path.is_file():
            return
        speed = read_json(path)
        self.forecast = Forecast({name: float(speed[name]) for name in ("start", "scene", "step")}, self.workers)
        if self.settings.get("speed") is not None and self.settings["scale"] is not None:
            return
        asked, model, size = self.settings["scale"], self.settings["model"], self.settings["image_size"]
        names = AUTOMATIC if asked is None else (asked,)
        plans = {name: plan(self.out, model, size, SCALES[name]) for name in names}
        scale, why, seconds = choose_scale(self.forecast, plans, asked)
        self.settings |= {
            "scale": scale,
            "why": why,
            "estimated_seconds": {name: round(value) for name, value in seconds.items()},
            "speed": speed,
            "workers": self.workers,
            "adapters": len(ATTRIBUTES) * SCALES[scale].datasets,
        }
        self.say(why)
        self.keep()
        self.steps = self._known()
        self.done = self._records() | self.done

    def keep(self) -> None:
        """Write demo.json."""
        if self.calls:
            self.calls[-1] = round(self.clock() - self.start, 1)
        write_atomically(self.out / RECORD, (json.dumps(self.settings, indent=1) + "\n").encode())

    @property
    def total(self) -> float:
        """Seconds of all calls."""
        return sum(self.calls)

    # --- the bar, the lines and the page -----------------------------------------------------------------------------

    def status(self) -> Status:
        share = 0.0
        if self.forecast is not None:
            self.left = self.forecast.left(self.steps, self.done, self.running)
            share = self.forecast.share(self.steps, self.done, self.running)
        titles = {step.name: step.title for step in self.steps}
        running = tuple((titles[name], job.share) for name, job in self.running.items())
        return Status(share, self.left, running, self.stopped)

    def update(self) -> None:
        """Bring the bar, the line and the page up to date where it is time for it."""
        now = self.clock()
        redraw = now - self._drawn >= (1.0 if self._changed else REDRAW)
        tell = self.bar.disable and now - self._told >= LINE
        if not (redraw or tell or not self.bar.disable):
            return
        status = self.status()
        if not self.bar.disable:
            self.bar.n = 100 * status.share
            self.bar.set_description_str(line(status))
        elif tell:
            # Nothing to say in the first moment.
            if self._told > 0:
                self.say(line(status))
            self._told = now
        if redraw:
            self._drawn, self._changed = now, False
            self.draw(status)

    def draw(self, status: Status) -> None:
        """Write the unfinished page, and the seconds so far."""
        self.keep()
        write_page(self.out, self.settings, self.steps, status)

    def close(self, stopped: str = "") -> list[str]:
        """The last page, finished or stopped; the sentences of a finished one."""
        self.bar.close()
        self.running, self.stopped = {}, stopped
        if stopped:
            self.draw(self.status())
            return []
        self.keep()
        return write_page(self.out, self.settings, self.steps)


def line(status: Status) -> str:
    """The status in one line, such as "34 %, about 3 min left: adapters on texture 40 %, generic scenes"."""
    work = ", ".join(title + (f" {100 * share:.0f} %" if share else "") for title, share in status.running)
    if status.left is None:
        return work
    return f"{100 * status.share:.0f} %, about {spoken(status.left)} left: {work}"
