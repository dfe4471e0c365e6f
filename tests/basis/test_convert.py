"""The release's subspace files: spans kept, single directions where they are defined, round trips, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peft_attrsub import Basis, BasisError
from peft_attrsub.basis.convert import RELEASE_ATTRIBUTES, convert_release, to_release_layout

MODULES = {
    "frame_blocks.attn.qkv.0": ("aggregator.frame_blocks.0.attn.qkv", 36, 12),
    "frame_blocks.mlp.fc1.10": ("aggregator.frame_blocks.10.mlp.fc1", 48, 12),
    "global_blocks.mlp.fc2.2": ("aggregator.global_blocks.2.mlp.fc2", 12, 48),
    "global_blocks.attn.proj.2": ("aggregator.global_blocks.2.attn.proj", 12, 12),
}
NAMES = [name for name, _, _ in MODULES.values()]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(n, d, seed=0):
    return torch.linalg.qr(gaussian(n, d, seed=seed).double()).Q.float().contiguous()


def released(d, kind="singular", modules=MODULES):
    """Tensors of a file: A (d x in), B (out x d) by module."""
    tensors = {}
    for i, (key, (_, n, m)) in enumerate(modules.items()):
        b, a = orthonormal(n, d, 2 * i), orthonormal(m, d, 2 * i + 1).T.contiguous()
        if kind == "singular":
            root = torch.linspace(3, 0.5, d).sqrt()
            b, a = b * root, root[:, None] * a
        elif kind == "gaussian":
            b, a = gaussian(n, d, seed=i), gaussian(d, m, seed=99 - i)
        tensors |= {f"{key}.A": a.contiguous(), f"{key}.B": b.contiguous()}
    return tensors


@pytest.fixture
def write(tmp_path):
    def write(tensors, name="geometry_texture_16.safetensors"):
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    return write


def projector(x):
    """Onto the span of the columns, by the pseudo-inverse."""
    return x.double() @ torch.linalg.pinv(x.double())


def assert_same_span(x, y):
    torch.testing.assert_close(projector(x), projector(y), atol=1e-5, rtol=0)


def assert_orthonormal(x):
    torch.testing.assert_close(x.T @ x, torch.eye(x.shape[1]), atol=1e-5, rtol=0)


# What is kept


@pytest.mark.parametrize("kind", ["singular", "orthonormal", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_spans_are_kept(write, kind, dtype):
    tensors = {key: value.to(dtype) for key, value in released(8, kind).items()}
    basis = convert_release(write(tensors), attributes=list(RELEASE_ATTRIBUTES))
    assert basis.attributes == ["light", "camera", "geometry", "texture"]
    assert basis.modules == sorted(NAMES, key=lambda n: (n.split(".")[1], int(n.split(".")[2]), n))
    assert basis.config.base_model == "facebook/VGGT-1B"
    for key, (module, n, m) in MODULES.items():
        assert basis.layout(module).shape == (n, m)
        for i, attribute in enumerate(basis.attributes):
            part = slice(2 * i, 2 * i + 2)
            u, s, v = basis.factors(module, attribute)
            assert u.dtype == s.dtype == v.dtype == torch.float32
            assert_orthonormal(u)
            assert_orthonormal(v)
            assert (s > 0).all() and (s[:-1] >= s[1:]).all()
            assert_same_span(u, tensors[f"{key}.B"][:, part])
            assert_same_span(v, tensors[f"{key}.A"][part].T)


@given(d=st.integers(1, 6), cut=st.integers(1, 5), seed=st.integers(0, 50), kind=st.booleans())
def test_any_update_of_the_file_is_one_of_ours(d, cut, seed, kind, tmp_path_factory):
    """dW = B M A for any core M lies in span(U) x span(V) of the joint basis, and the other way round."""
    path = tmp_path_factory.mktemp("release") / "file.safetensors"
    tensors = released(d, "gaussian" if kind else "singular")
    save_file(tensors, path)
    attributes = {"first": min(cut, d - 1), "second": d - min(cut, d - 1)} if d > 1 else "only"
    basis = convert_release(path, attributes=attributes)
    for key, (module, _, _) in MODULES.items():
        a, b, _ = basis.joint(module)
        assert a.shape[1] == b.shape[1] == d
        update = (tensors[f"{key}.B"] @ gaussian(d, d, seed=seed) @ tensors[f"{key}.A"]).double()
        inside = a.double() @ (a.double().T @ update @ b.double()) @ b.double().T
        torch.testing.assert_close(inside, update, atol=1e-4 * float(update.abs().max()), rtol=0)


def test_singular_vectors_are_kept_one_by_one(write):
    tensors = released(4)
    basis = convert_release(write(tensors))
    assert basis.attributes == ["shared"]
    for key, (module, _, _) in MODULES.items():
        u, s, v = basis.factors(module, "shared")
        root = s.sqrt()
        torch.testing.assert_close(s, torch.linspace(3, 0.5, 4), rtol=1e-4, atol=0)
        torch.testing.assert_close(u * root, tensors[f"{key}.B"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(root[:, None] * v.T, tensors[f"{key}.A"], rtol=1e-4, atol=1e-5)


def test_directions_are_sorted_by_strength(write):
    tensors = released(4)
    turned = {k: v.flip(0).contiguous() if k.endswith("A") else v.flip(1).contiguous() for k, v in tensors.items()}
    straight, back = convert_release(write(tensors)), convert_release(write(turned, "turned.safetensors"))
    for module in NAMES:
        for one, other in zip(straight.factors(module, "shared"), back.factors(module, "shared"), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_columns_without_lengths_stay_in_the_files_order(write, dtype):
    """With equal singular values an SVD of B A would turn them at will, and a smaller dim cut anywhere."""
    tensors = {key: value.to(dtype) for key, value in released(4, "orthonormal").items()}
    basis = convert_release(write(tensors)).select(dim=2)
    for key, (module, _, _) in MODULES.items():
        u, _, v = basis.factors(module, "shared")
        assert ((u.T @ tensors[f"{key}.B"].float()[:, :2]).diagonal() > 0.99).all()
        assert ((v.T @ tensors[f"{key}.A"].float()[:2].T).diagonal() > 0.99).all()


def test_else_the_svd_of_the_product(write):
    tensors = released(3, "gaussian")
    basis = convert_release(write(tensors))
    for key, (module, _, _) in MODULES.items():
        u, s, v = basis.factors(module, "shared")
        torch.testing.assert_close((u * s) @ v.T, tensors[f"{key}.B"] @ tensors[f"{key}.A"], rtol=1e-3, atol=1e-4)


def test_widths_may_differ_by_module(write):
    one, two = (
        released(2, modules=dict(list(MODULES.items())[:2])),
        released(4, modules=dict(list(MODULES.items())[2:])),
    )
    basis = convert_release(write(one | two), attributes=["geometry", "texture"])
    assert [basis.dim(module, "texture") for module in NAMES] == [1, 1, 2, 2]


def test_pi3s_decoder(write):
    tensors = released(4, modules={"decoder.attn.qkv.7": ("", 36, 12), "decoder.mlp.fc2.0": ("", 12, 48)})
    basis = convert_release(write(tensors), base_model="yyfz233/Pi3")
    assert basis.modules == ["decoder.0.mlp.fc2", "decoder.7.attn.qkv"]
    assert basis.config.base_model == "yyfz233/Pi3"


# Round trips


@pytest.mark.parametrize("kind", ["singular", "gaussian"])
def test_round_trip(write, tmp_path, kind):
    basis = convert_release(write(released(6, kind)), attributes={"light": 2, "texture": 4})
    basis.save_pretrained(tmp_path / "basis")
    path = to_release_layout(Basis.from_pretrained(tmp_path / "basis"), tmp_path / "again.safetensors")
    tensors = load_file(path)
    assert {key.rpartition(".")[0] for key in tensors} == set(MODULES)
    for key, (_, n, m) in MODULES.items():
        assert tensors[f"{key}.A"].shape == (6, m) and tensors[f"{key}.B"].shape == (n, 6)
    again = convert_release(path, attributes={"light": 2, "texture": 4})
    assert again.attributes == basis.attributes and again.modules == basis.modules
    for module in NAMES:
        for attribute in ("light", "texture"):
            pairs = zip(again.factors(module, attribute), basis.factors(module, attribute), strict=True)
            for one, other in pairs:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_file_is_the_releases_where_its_factors_are_singular(write, tmp_path):
    tensors = released(4)
    again = load_file(to_release_layout(convert_release(write(tensors)), tmp_path / "again.safetensors"))
    assert again.keys() == tensors.keys()
    for key, value in tensors.items():
        torch.testing.assert_close(again[key], value, rtol=1e-4, atol=1e-5)


def test_writing_refuses(write, tmp_path):
    basis = convert_release(write(released(2)))
    path = to_release_layout(basis, tmp_path / "out.safetensors")
    with pytest.raises(BasisError, match="exists already"):
        to_release_layout(basis, path)
    before = path.read_bytes()
    to_release_layout(basis, path, overwrite=True)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["geometry_texture_16.safetensors", "out.safetensors"]
    with pytest.raises(BasisError, match="nowhere"):
        to_release_layout(basis, tmp_path / "nowhere" / "out.safetensors")
    other = Basis.from_factors(
        {"a": {"camera_head.trunk.0.attn.qkv": (torch.eye(4, 2), torch.ones(2), torch.eye(3, 2))}}
    )
    with pytest.raises(BasisError, match=r"camera_head.trunk.0.attn.qkv.*select\(\)"):
        to_release_layout(other, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


# Refusals


def test_no_such_file_and_no_safetensors(tmp_path):
    with pytest.raises(BasisError, match=r"none\.safetensors.*is no file"):
        convert_release(tmp_path / "none.safetensors")
    with pytest.raises(BasisError, match="is no file"):
        convert_release(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"pickle or whatever")
    with pytest.raises(BasisError, match=r"x\.safetensors.*no safetensors file"):
        convert_release(tmp_path / "x.safetensors")
    save_file(released(2), tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-100])
    with pytest.raises(BasisError, match="truncated"):
        convert_release(tmp_path / "cut.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(BasisError, match="holds no tensor"):
        convert_release(tmp_path / "empty.safetensors")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("base_model.model.aggregator.frame_blocks.0.attn.qkv.lora_A.weight", "lora_A.*not of the release's layout"),
        ("frame_blocks.attn.qkv.A", "not of the release's layout"),
        ("frame_blocks.attn.qkv.0.C", "not of the release's layout"),
        ("patch_embed.attn.qkv.0.A", "patch_embed"),
        ("frame_blocks.attn.qkv.5.A", r"lacks frame_blocks\.attn\.qkv\.5\.B"),
        ("frame_blocks.attn.qkv.5.B", r"lacks frame_blocks\.attn\.qkv\.5\.A"),
    ],
)
def test_keys_that_do_not_belong(write, key, said):
    with pytest.raises(BasisError, match=said):
        convert_release(write({**released(2), key: torch.ones(3, 3)}))


@pytest.mark.parametrize("shape", [(3, 12), (12,), (2, 12, 1), (0, 12)], ids=str)
def test_widths_that_do_not_fit(write, shape):
    tensors = {**released(2), "frame_blocks.attn.qkv.0.A": torch.ones(shape)}
    with pytest.raises(BasisError, match=r"frame_blocks\.attn\.qkv\.0 has A.*and B \(36, 2\)"):
        convert_release(write(tensors))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(write, bad):
    tensors = released(2)
    tensors["global_blocks.mlp.fc2.2.B"][0, 0] = bad
    with pytest.raises(BasisError, match=r"global_blocks\.mlp\.fc2\.2 holds NaN"):
        convert_release(write(tensors))


def test_dependent_directions(write):
    zero, twice, wide = released(3), released(3), released(2)
    zero["frame_blocks.attn.qkv.0.A"][1] = 0
    twice["frame_blocks.attn.qkv.0.B"][:, 1] = 2 * twice["frame_blocks.attn.qkv.0.B"][:, 0]
    wide |= {"frame_blocks.attn.qkv.0.A": gaussian(20, 12), "frame_blocks.attn.qkv.0.B": gaussian(36, 20)}
    for i, tensors in enumerate((zero, twice, wide)):
        with pytest.raises(BasisError, match=r"aggregator\.frame_blocks\.0\.attn\.qkv.*'shared'.*not independent"):
            convert_release(write(tensors, f"{i}.safetensors"))


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        (["a", "b", "c"], r"8 directions, which 3 attributes.*evenly"),
        ({"a": 4, "b": 5}, r"8 directions.*share out 9"),
        ({"a": 9, "b": -1}, "one or more"),
        (["a", "a"], "each once"),
        ([], "one attribute or more"),
        (["a.b", "c"], "cannot name an attribute"),
    ],
    ids=str,
)
def test_attributes_that_do_not_fit(write, attributes, said):
    with pytest.raises(BasisError, match=said):
        convert_release(write(released(8)), attributes=attributes)
