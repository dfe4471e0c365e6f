"""The benchmarks by name: the reader, the frames and the numbers of the paper's protocol."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import numpy as np
import pytest

import peft_attrsub.datasets as room
from peft_attrsub.datasets.opening import BENCHMARKS, open_benchmark, protocol
from peft_attrsub.datasets.scenes import SceneDataset
from peft_attrsub.datasets.splits import THUMAN_TEST
from tests.datasets.test_rendered import VIEW, write
from tests.datasets.test_scenes import generate

pytest.importorskip("PIL.Image", reason="pictures need Pillow")


def test_protocols() -> None:
    facts = {name: (p.metrics, p.scale, p.align, p.icp_threshold, p.depth_align) for name, p in each().items()}
    assert facts == {
        "face": ("points", 1e-3, "sim3+icp", 0.1, None),
        "face-real": ("depth", 1e-2, None, None, "release"),
        "human": ("points", 1e-3, "sim3+icp", 0.1, None),
        "clearpose": ("points", 1e-2, "sim3+icp", 0.1, None),
        "scenes": ("points", 1e-2, "sim3+icp", 0.1, None),
    }
    for name, found in each().items():
        assert found.name == name and found.frames and found.title and found.unit
    for call in (protocol, lambda name: open_benchmark(name, ".")):
        with pytest.raises(ValueError, match="no benchmark 'faces': give one of face, face-real, human, clearpose"):
            call("faces")


def each() -> dict[str, room.Protocol]:
    return {name: protocol(name) for name in BENCHMARKS}


def test_synthetic_faces(tmp_path: Path) -> None:
    write(tmp_path / "00_00" / VIEW, count=42, digits=8, suffix="npy")
    with pytest.raises(FileNotFoundError, match=r"00000000_mask\.npy does not exist"):
        open_benchmark("face", tmp_path)[0]
    whole = open_benchmark("face", tmp_path, masks=False)[0]
    mask = np.zeros((64, 69), bool)
    mask[20:40, 20:50] = True
    for index in range(42):
        np.save(tmp_path / "00_00" / VIEW / "renderings" / f"{index:08d}_mask.npy", mask)
    face = open_benchmark("face", tmp_path)[0]
    assert face.frames == whole.frames == tuple(f"{index:08d}" for index in (0, 6, 12, 18, 24, 30, 36))
    np.testing.assert_array_equal(face.point_masks.numpy(), whole.point_masks.numpy() & mask)
    assert len(open_benchmark("face", tmp_path, views=None)[0]) == 42
    fixed = open_benchmark("face", tmp_path, sequences={f"00_00|{VIEW}": [5]})[0]
    assert fixed.frames == ("00000005",)


def test_humans(tmp_path: Path) -> None:
    for person in ("2343", "2344", "2345", "2346"):
        write(tmp_path / person, count=16, suffix="npy")
    everybody = open_benchmark("human", tmp_path)
    assert everybody.names == ("2343", "2344", "2345", "2346")
    assert everybody[0].frames == ("000", "002", "004", "006", "008", "010", "012", "014")
    assert everybody[0].unit == "height"
    test, train = (open_benchmark("human", tmp_path, split=split) for split in ("test", "train"))
    assert test.names == ("2345", "2346") and set(test.names) <= set(THUMAN_TEST)
    assert train.names == ("2343", "2344") and len(train[0]) == 8
    with pytest.raises(ValueError, match="both sequences and a split"):
        open_benchmark("human", tmp_path, split="test", sequences={"2345": [0]})
    with pytest.raises(ValueError, match="no split 'val'"):
        open_benchmark("human", tmp_path, split="val")
    test_only = tmp_path / "only"
    write(test_only / "2345", suffix="npy")
    with pytest.raises(ValueError, match="holds nobody of THuman's split 'train': it has 1 people"):
        open_benchmark("human", test_only, split="train")


def test_scenes(tmp_path: Path) -> None:
    generate(tmp_path, scenes=1)
    dataset = open_benchmark("scenes", tmp_path)
    assert isinstance(dataset, SceneDataset) and len(dataset[0]) == 3


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("face", "RenderedDataset"),
        ("face-real", "BurstDataset"),
        ("human", "RenderedDataset"),
        ("clearpose", "ClearPoseDataset"),
        ("scenes", "SceneDataset"),
    ],
)
def test_each_has_its_reader(tmp_path: Path, name: str, reader: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=f"{tmp_path.name} holds no sequence that {reader} can"):
        open_benchmark(name, tmp_path)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        open_benchmark(name, tmp_path, colour=1)


def loaded_at_import(source: str) -> set[str]:
    """Packages that a module loads when it is imported: those outside of functions and of `if TYPE_CHECKING`."""
    found, waiting = set(), list(ast.parse(source).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ):
            continue
        waiting.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))
    return found


def test_the_room_is_light() -> None:
    """Pillow, OpenEXR, scipy and the like are loaded by what needs them."""
    assert loaded_at_import("import a.b\nif x:\n    from c.d import e\ndef f():\n    import g") == {"a", "c"}
    files = sorted(Path(room.__file__).parent.glob("*.py"))
    assert len(files) > 5
    for path in files:
        assert loaded_at_import(path.read_text()) <= {*sys.stdlib_module_names, "numpy", "torch"}, path.name


def test_every_public_name_is_there() -> None:
    assert all(getattr(room, name) is not None for name in room.__all__)
    assert room.SceneDataset is SceneDataset
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        room.Nothing  # noqa: B018
