"""orthonormalise against Gram-Schmidt in float64, column by column: the fast ways must give the slow one's columns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_attrsub.basis import joint
from peft_attrsub.basis.joint import DROP_BELOW, orthonormalise

from .helpers import orthonormal


def slow(blocks):
    """Q and the columns kept of each block, by the textbook."""
    q, kept = [], {}
    for name, block in blocks.items():
        kept[name] = []
        for j, column in enumerate(block.double().T):
            for _ in range(3):
                for earlier in q:
                    column = column - earlier * (earlier @ column)
            if column.norm() > DROP_BELOW and len(q) < block.shape[0]:
                q.append(column / column.norm())
                kept[name].append(j)
    return torch.stack(q, 1), kept


def compare(blocks, tolerance=2e-6):
    q, kept = slow(blocks)
    found = orthonormalise(blocks)
    assert found.kept == kept
    assert found.q.dtype == torch.float32 and found.q.is_contiguous()
    torch.testing.assert_close(found.q.double(), q, rtol=0, atol=tolerance)
    assert [s.stop - s.start for s in found.slices.values()] == [len(c) for c in kept.values()]


def blocks_of(n, dims, generator):
    return {f"a{i}": orthonormal(n, d, generator).float() for i, d in enumerate(dims)}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    n=st.integers(6, 60),
    dims=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    shared=st.integers(0, 3),
    off=st.sampled_from([0.0, 1e-5, 0.1]),
)
def test_any_blocks(seed, n, dims, shared, off):
    """Also blocks that share directions, exactly or nearly, that are empty, and more columns than rows."""
    generator = torch.Generator().manual_seed(seed)
    blocks = blocks_of(n, dims, generator)
    first, last = next(iter(blocks)), list(blocks)[-1]
    take = min(shared, dims[0], dims[-1])
    if last != first and take:
        noisy = blocks[first][:, :take] + off * torch.randn(n, take, generator=generator) / n**0.5
        blocks[last][:, :take] = noisy / noisy.norm(dim=0)
    if sum(dims) == 0:
        assert orthonormalise(blocks).q.shape == (n, 0)
    else:
        compare(blocks, 2e-6 if off != 1e-5 else 1e-5)


WAYS = ("_cholesky_qr", "_skipping_qr", "_householder_qr")


def spied(monkeypatch, blocks):
    """Which ways were tried for some blocks, the last of them with success."""
    tried = []
    for name in WAYS:
        real = getattr(joint, name)
        monkeypatch.setattr(joint, name, lambda *a, n=name, f=real: tried.append(n) or f(*a))
    orthonormalise(blocks)
    monkeypatch.undo()
    return tried


@pytest.mark.parametrize("way", range(3), ids=WAYS)
def test_every_way_is_taken_and_gives_the_same(monkeypatch, way):
    generator = torch.Generator().manual_seed(way)
    blocks = blocks_of(80, [8, 8, 8], generator)
    if way == 1:
        blocks["a2"][:, 3] = blocks["a0"][:, 5]
    if way == 2:  # each column a thousandth off the span of others, and leaning on the difference of two of them
        e = orthonormal(80, 24, generator)
        e[:, 16] = e[:, 0] + 1.2e-3 * e[:, 16].clone()
        e[:, 17] = 0.7 * e[:, 0] + 700 * (e[:, 16] - e[:, 0]) + 1.2e-3 * e[:, 17].clone()
        blocks = {f"a{i}": (e / e.norm(dim=0)).float()[:, 8 * i : 8 * i + 8] for i in range(3)}
    assert spied(monkeypatch, blocks) == list(WAYS[: way + 1])
    compare(blocks)


def test_columns_stored_in_bfloat16_take_a_second_round(monkeypatch):
    """Their squares are off by 4e-3, and one of two nearly dependent blocks is enough to need the second round."""
    generator = torch.Generator().manual_seed(0)
    blocks = {name: block.bfloat16() for name, block in blocks_of(300, [16, 16], generator).items()}
    mixed = blocks["a0"].float() + 0.1 * blocks["a1"].float()
    blocks["a1"] = (mixed / mixed.norm(dim=0)).bfloat16()
    rounds = []
    real = joint._orthonormal
    monkeypatch.setattr(joint, "_OFF", 1e-8)  # no first round is that good
    monkeypatch.setattr(joint, "_orthonormal", lambda q: rounds.append(real(q)) or rounds[-1])
    compare(blocks, 1e-5)
    assert rounds == [False]


def test_no_result_depends_on_the_default_device():
    generator = torch.Generator().manual_seed(0)
    blocks = blocks_of(30, [4, 4], generator)
    expected = orthonormalise(blocks).q
    with torch.device("meta"):
        assert torch.equal(orthonormalise(blocks).q, expected)
