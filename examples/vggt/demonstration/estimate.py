"""How long the demo's commands take on this machine, and how much time is left.

A command's work is counted in kinds, such as training steps and rooms. Seconds of each kind come from the three speeds
that speed.py has measured here and on one reference machine:

    seconds[kind] = KINDS[kind].seconds * speeds[KINDS[kind].like] / MEASURED[KINDS[kind].like]

The time left is that of a simulation of the runner: each free core takes the first command that can be started. What
is seen of a command's family (its name up to the first "-") corrects what is expected of the rest of the family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .plan import Step
from .scales import AUTOMATIC, BUDGET


class Kind(NamedTuple):
    """CPU seconds on the reference machine, and the speed that they grow with."""

    seconds: float
    like: str


#: The reference: one core of an AMD EPYC (Zen 5) with the instructions of AVX2, in float32.
MEASURED = {"start": 6.0, "scene": 2.1, "step": 0.41}
KINDS = {
    "start": Kind(5.0, "start"),  # a command's imports and weights
    "dataset": Kind(1.4, "scene"),  # the workers of a dataset's renderer, and its contact sheet
    "scene": Kind(0.67, "scene"),  # six views, ray cast
    "room": Kind(0.96, "scene"),  # with people, in eight views
    "step": Kind(0.41, "step"),  # of a training
    "adapter": Kind(0.6, "start"),  # put on the model, and saved
    "mining": Kind(0.7, "start"),  # of the basis of eight adapters
    "sequence": Kind(1.0, "step"),  # through the model, aligned and measured
}
#: A family's correction counts for as much as this many seconds of work with a correction of 1.
PRIOR = 5.0


@dataclass(frozen=True)
class Job:
    """A command at work: the seconds since it was started, and the share of its work that is done. first: the same
    two when the first progress was seen, which comes after the start."""

    seconds: float
    share: float
    first: tuple[float, float] | None = None


@dataclass
class Forecast:
    """What the remaining commands take. speeds: seconds of start, scene and step, from speed.json."""

    speeds: Mapping[str, float]
    workers: int
    _best: float = field(default=0.0, init=False)

    def seconds(self, step: Step) -> float:
        """Expected of a command before any was seen."""
        work = [(count, KINDS[kind]) for kind, count in step.effort.items()]
        return sum(count * kind.seconds * self.speeds[kind.like] / MEASURED[kind.like] for count, kind in work)

    def total(self, steps: Sequence[Step], done: Sequence[str] = ()) -> float:
        """Expected of all of them, side by side, but for those of the names `done`."""
        return self.left(steps, dict.fromkeys(done, 0.0), {})

    def left(self, steps: Sequence[Step], done: Mapping[str, float], running: Mapping[str, Job]) -> float:
        """Seconds until all is done. done: name -> seconds it took, 0 where that is not known. running: by name."""
        ratios = self._ratios(steps, done, running)
        known = {step.name: step for step in steps}
        ends = {name: self._remaining(known[name], job, ratios) for name, job in running.items()}
        waiting = [step for step in steps if step.name not in done and step.name not in running]
        finished, now = set(done), 0.0
        while waiting or ends:
            for step in [step for step in waiting if finished.issuperset(step.after)]:
                if len(ends) < self.workers:
                    waiting.remove(step)
                    ends[step.name] = now + self.seconds(step) * ratios.get(family(step.name), 1.0)
            if not ends:  # what it waits for is not in the plan
                break
            name = min(ends, key=lambda name: ends[name])
            now = max(now, ends.pop(name))
            finished.add(name)
        return now

    def share(self, steps: Sequence[Step], done: Mapping[str, float], running: Mapping[str, Job]) -> float:
        """The share of all work that is done, in [0, 1], by what was expected at first; it never falls."""
        total = sum(self.seconds(step) for step in steps) or 1.0
        part = sum(
            self.seconds(step) * (1.0 if step.name in done else running[step.name].share)
            for step in steps
            if step.name in done or step.name in running
        )
        self._best = max(self._best, min(1.0, part / total))
        return self._best

    def _ratios(
        self, steps: Sequence[Step], done: Mapping[str, float], running: Mapping[str, Job]
    ) -> dict[str, float]:
        """Family -> what its commands have taken, by what was expected of them."""
        taken: dict[str, list[tuple[float, float]]] = {}
        for step in steps:
            expected = self.seconds(step)
            if done.get(step.name):
                taken.setdefault(family(step.name), []).append((done[step.name], expected))
            elif step.name in running and (whole := observed(running[step.name])) is not None:
                # As much as is seen of it counts.
                share = running[step.name].share
                taken.setdefault(family(step.name), []).append((whole * share, expected * share))
        return {
            name: (sum(took for took, _ in pairs) + PRIOR) / (sum(expected for _, expected in pairs) + PRIOR)
            for name, pairs in taken.items()
        }

    def _remaining(self, step: Step, job: Job, ratios: Mapping[str, float]) -> float:
        """Of a running command: by its own progress the more, the more is seen of it."""
        expected = self.seconds(step) * ratios.get(family(step.name), 1.0)
        # A command that takes longer than expected and says nothing of its progress is not about to end.
        guess = max(expected - job.seconds, 0.1 * expected, 0.1 * job.seconds)
        if (whole := observed(job)) is None:
            return guess
        weight = min(1.0, 3 * job.share)
        return max(0.0, weight * (whole - job.seconds) + (1 - weight) * guess)


def observed(job: Job) -> float | None:
    """The whole time of a running command by the speed of its progress so far; None where there is none yet."""
    if job.first is None or job.share <= job.first[1] or job.seconds <= job.first[0]:
        return None
    return job.seconds + (1 - job.share) * (job.seconds - job.first[0]) / (job.share - job.first[1])


def family(name: str) -> str:
    return name.partition("-")[0]


def spoken(seconds: float) -> str:
    """For people: "20 s", "3 min", "1 h 20 min"; rounded up to what an estimate can know."""
    if seconds < 55:
        return f"{max(5, 5 * -(-int(seconds) // 5))} s"
    minutes = max(1, round(seconds / 60))
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def choose_scale(
    forecast: Forecast, plans: Mapping[str, Sequence[Step]], asked: str | None
) -> tuple[str, str, dict[str, float]]:
    """The scale, why as a sentence, and the expected seconds of each scale. plans: scale -> its steps.

    asked: the scale that the user wants, or None for the first of `AUTOMATIC` that stays within `BUDGET` seconds, or
    else the last.
    """
    seconds = {name: forecast.total(steps) for name, steps in plans.items()}
    step = f"A training step takes {forecast.speeds['step']:.2f} s on this machine"
    if asked is not None:
        return asked, f"{step}; the scale {asked}, as asked for, takes about {spoken(seconds[asked])}.", seconds
    scale = next((name for name in AUTOMATIC if seconds[name] <= BUDGET), AUTOMATIC[-1])
    larger = AUTOMATIC[: AUTOMATIC.index(scale)]
    more = "".join(f", and not the scale {name}, which would take about {spoken(seconds[name])}" for name in larger)
    return scale, f"{step}: the scale is {scale}, about {spoken(seconds[scale])} in all{more}.", seconds
