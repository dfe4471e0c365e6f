"""Slow, obvious references for the tests: every matrix is formed dense, in float64, and nothing is clever."""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch

DENSE_EPS_FLOOR = 1e-300  # only keeps 0/0 away when every adapter is zero


@dataclass
class DenseIRLS:
    """Result of `irls_dense`: U (n x d), S (d), V (m x d), and one entry per iteration of the rest."""

    U: np.ndarray
    S: np.ndarray
    V: np.ndarray
    weights: np.ndarray  # [k], those that follow from the returned subspace
    objectives: list[float]  # sum_i (eps^2 + ||X - dW_i||_F^2)^(alpha/2) after each iteration
    first_spectrum: np.ndarray
    last_spectrum: np.ndarray

    @property
    def low_rank(self) -> np.ndarray:
        return (self.U * self.S) @ self.V.T


def as_dense(delta) -> np.ndarray:
    """Any tensor or array as a float64 numpy matrix."""
    return delta.detach().cpu().double().numpy() if isinstance(delta, torch.Tensor) else np.asarray(delta, np.float64)


def adapter_scale(deltas) -> float:
    """The length that eps is measured in: the (lower) median of ||dW_i||_F over adapters that are not 0."""
    norms = sorted(n for n in (np.linalg.norm(as_dense(d)) for d in deltas) if n > 0)
    return float(norms[(len(norms) - 1) // 2]) if norms else 0.0


def objective(low_rank, deltas, alpha: float, eps: float) -> float:
    """sum_i (eps_abs^2 + ||X - dW_i||_F^2)^(alpha/2), eps_abs = eps * adapter_scale."""
    X = as_dense(low_rank)
    floor = (eps * adapter_scale(deltas)) ** 2
    return float(sum((floor + np.linalg.norm(X - as_dense(d)) ** 2) ** (alpha / 2) for d in deltas))


def irls_dense(deltas, dim: int, alpha=1.0, eps=1e-6, max_iter=50, tol=1e-6) -> DenseIRLS:
    """minimise over rank-d X: sum_i (eps_abs^2 + ||X - dW_i||_F^2)^(alpha/2), by reweighting (paper, 3.2).

    C = sum w_i dW_i / sum w_i ;  X = best rank-d part of C
    w_i = (eps_abs^2 + ||X - dW_i||^2)^(-(2 - alpha)/2)
    """
    deltas = [as_dense(d) for d in deltas]
    floor = (eps * adapter_scale(deltas)) ** 2 + DENSE_EPS_FLOOR
    w = np.ones(len(deltas))
    objectives, first = [], None
    for _ in range(max_iter):
        C = sum(wi * d for wi, d in zip(w, deltas, strict=True)) / w.sum()
        U, S, Vt = np.linalg.svd(C, full_matrices=False)
        first = S if first is None else first
        X = (U[:, :dim] * S[:dim]) @ Vt[:dim]
        squared = floor + np.array([np.linalg.norm(X - d) ** 2 for d in deltas])
        w = squared ** (-(2 - alpha) / 2)
        w = w / w.max()  # only the ratios matter; keeps 1e-6 and 1e6 adapters in range
        objectives.append(float((squared ** (alpha / 2)).sum()))
        if len(objectives) > 1 and objectives[-2] - objectives[-1] <= tol * objectives[-2]:
            break
    return DenseIRLS(U[:, :dim], S[:dim], Vt[:dim].T, w, objectives, first, S)


def projector(columns) -> np.ndarray:
    """Orthogonal projector onto the span of orthonormal columns: Q Q^T."""
    Q = as_dense(columns)
    return Q @ Q.T


def span_projector(*blocks) -> np.ndarray:
    """Projector onto the joint span of any columns, by scipy's SVD-based `orth`."""
    columns = np.concatenate([as_dense(b) for b in blocks], axis=1)
    return projector(scipy.linalg.orth(columns, rcond=1e-6)) if columns.size else np.zeros((columns.shape[0],) * 2)


def largest_angle(X, Y) -> float:
    """Largest principal angle between two column spaces of equal dimension, in degrees."""
    return float(np.degrees(scipy.linalg.subspace_angles(as_dense(X), as_dense(Y)).max()))


def effective_rank(spectrum) -> float:
    """(||W||_F / ||W||_2)^2 from singular values (paper, importance allocation)."""
    s = as_dense(spectrum)
    return float((s**2).sum() / (s**2).max())


def importance_literal(ranks, dim: int) -> list[int]:
    """d_l = d * floor(ER_l / mean ER), as the paper prints it."""
    mean = sum(ranks) / len(ranks)
    return [int(dim * np.floor(r / mean)) for r in ranks]


def energy_captured(delta, U, V) -> float:
    """||U U^T dW V V^T||_F^2 / ||dW||_F^2: the share of an update that a basis can express."""
    delta = as_dense(delta)
    return float(np.linalg.norm(projector(U) @ delta @ projector(V)) ** 2 / np.linalg.norm(delta) ** 2)
