"""One measurement of `render.py` in a process of its own: `python _render_jobs.py JOB.json RESULT.json`.

Runs in any interpreter that has the renderer: torch and PEFT, which the package's `__init__` would bring, stay out,
as in the workers that make the datasets.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import types
from pathlib import Path

from _common import HERE, Timer, _status_mib, load

MIXED = {"attribute": "mixed", "seed": 0, "layout": "room", "trajectory": "spline"}


def stand_in() -> None:
    """An empty package in place of ours, through which its rooms are found all the same."""
    module = types.ModuleType("peft_attrsub")
    module.__path__ = [str(HERE.parent / "peft_attrsub")]
    sys.modules[module.__name__] = module


def sample(job: dict, index: int):
    """Scene `index` of the recipe and `views` indices of its cameras, spread over the path."""
    from peft_attrsub.scenes.sampling import AttributeRecipe, sample_scene

    recipe = AttributeRecipe(**MIXED | {"size": job["size"], "triangles": job["triangles"]})
    scene = sample_scene(recipe, index)
    count = len(scene.cameras)
    return scene, [view * count // job["views"] for view in range(job["views"])]


def probe(job: dict) -> dict:
    """Whether this interpreter has the packages of a renderer, and which versions."""
    found = {}
    for name in job["packages"]:
        try:
            __import__(name)
        except ImportError as error:
            return {"missing": f"{name} cannot be imported ({error})"}
        module = sys.modules[name]
        found[name] = module.app.version_string if name == "bpy" else str(getattr(module, "__version__", "unknown"))
    return {"versions": found}


def mesh(job: dict) -> dict:
    """Seconds of every step before the first picture, scene by scene."""
    from peft_attrsub.scenes.meshes import build_mesh
    from peft_attrsub.scenes.raycast import RaycastRenderer
    from peft_attrsub.scenes.textures import render_maps

    rounds = []
    for index in range(job["scenes"]):
        with Timer() as sampled:
            scene, _ = sample(job, index)
        with Timer() as built:
            made = build_mesh(scene)
        with Timer() as painted:
            maps = [render_maps(material) for material in scene.materials]
        with Timer() as planted, RaycastRenderer(scene, mesh=made, maps=maps):
            pass
        steps = {"sample_scene": sampled, "build_mesh": built, "render_maps": painted, "trees": planted}
        rounds.append({"triangles": len(made.triangles), "shapes": len(scene.shapes), "lamps": len(scene.lights)})
        rounds[-1]["materials"] = len(scene.materials)
        rounds[-1]["seconds"] = {name: timer.wall for name, timer in steps.items()}
    return {"rounds": rounds}


def raycast(job: dict) -> dict:
    """Views of one scene, rendered and written; ends and begins on a clock that all processes share."""
    from peft_attrsub.scenes.raycast import RaycastRenderer
    from peft_attrsub.scenes.storage import SceneWriter

    scene, views = sample(job, job["scene"])
    with tempfile.TemporaryDirectory() as folder:
        with Timer() as setup:
            renderer = RaycastRenderer(scene, supersample=job["supersample"], threads=job["threads"])
            writer = SceneWriter(folder, scene)
        with renderer:
            writer.add(views[0], renderer.render(views[0]))  # the first touches everything once
            print("ready", flush=True)
            sys.stdin.readline()
            start, cpu, casting = time.monotonic(), time.process_time(), 0.0
            for index in views:
                with Timer() as timer:
                    view = renderer.render(index)
                casting += timer.wall
                writer.add(index, view)
            end, cpu = time.monotonic(), time.process_time() - cpu
        names = [name for index in views for name in writer.form.names(index).values()]
        size = sum(writer.files[name]["bytes"] for name in names) / len(views)
    return {
        "views": len(views), "start": start, "end": end, "cpu_seconds": cpu, "render_seconds": casting,
        "setup_seconds": setup.wall, "bytes_per_view": size,
    }  # fmt: skip


def memory(job: dict) -> dict:
    """Resident memory after each scene of a long run, in MiB."""
    from peft_attrsub._machine import release_memory
    from peft_attrsub.scenes.raycast import RaycastRenderer
    from peft_attrsub.scenes.storage import SceneWriter

    after = []
    with Timer() as timer:
        for index in range(job["scenes"]):
            scene, views = sample(job, index)
            with tempfile.TemporaryDirectory() as folder, RaycastRenderer(scene) as renderer:
                writer = SceneWriter(folder, scene)
                for view in views:
                    writer.add(view, renderer.render(view))
            del renderer, writer
            release_memory()
            after.append(round(_status_mib("VmRSS").get("VmRSS", 0.0), 1) if Path("/proc/self/status").exists() else 0)
    return {"rss_mib": after, "seconds": timer.wall}


def cycles(job: dict) -> dict:
    """The same views in turn by the bare operator and by us, on the same Blender scene with the same settings."""
    from peft_attrsub.scenes import blender
    from peft_attrsub.scenes.cycles import CyclesRenderer
    from peft_attrsub.scenes.deferring import quiet_stdout
    from peft_attrsub.scenes.storage import SceneWriter

    scene, views = sample(job, 0)
    load_before = load()
    with tempfile.TemporaryDirectory() as folder:
        with Timer() as setup:
            renderer = CyclesRenderer(scene, samples=job["samples"], denoise=job["denoise"])
            writer = SceneWriter(folder, scene)
        import bpy

        def bare(index: int) -> dict:
            target = bpy.context.scene
            blender.aim(target, scene, scene.cameras[index])
            with quiet_stdout(), Timer() as timer:
                bpy.ops.render.render(write_still=False)
            return {"bare": timer.wall}

        def ours(index: int) -> dict:
            with Timer() as both:
                with Timer() as rendered:
                    view = renderer.render(index)
                writer.add(index, view)
            return {"render": rendered.wall, "render_and_write": both.wall}

        with renderer:
            first = ours(views[-1])["render"]
            bare(views[0])
            rounds = []
            for number in range(job["rounds"]):
                seen = [{} for _ in views]
                # By turns in the order too, so that none always comes after the other.
                for contender in (bare, ours) if number % 2 == 0 else (ours, bare):
                    for place, index in enumerate(views):
                        seen[place] |= contender(index)
                rounds.append(seen)
    return {"setup_seconds": setup.wall, "first_seconds": first, "rounds": rounds, "load": load_before}


JOBS = {"probe": probe, "mesh": mesh, "raycast": raycast, "memory": memory, "cycles": cycles}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_bytes())
    stand_in()
    Path(sys.argv[2]).write_text(json.dumps(JOBS[job["kind"]](job)), encoding="utf-8")


if __name__ == "__main__":
    main()
