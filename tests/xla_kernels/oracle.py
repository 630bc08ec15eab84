"""ADC in NumPy, written for these tests alone: float32 sums from subspace 0 upward."""

import numpy as np


def numpy_scores(tables, codes, gain=None, offset=None):
    tables, codes = np.asarray(tables), np.asarray(codes)
    total = np.zeros((tables.shape[0], codes.shape[0]), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for j in range(codes.shape[1]):
            total += tables[:, j, codes[:, j]]
        if gain is not None:
            total = total * gain
        if offset is not None:
            total = total + offset
    return total


def numpy_top_k(tables, codes, k, gain=None, offset=None, valid=None):
    scores = numpy_scores(tables, codes, gain, offset)
    b, n = scores.shape
    scores = np.where(np.isnan(scores), -np.inf, scores).astype(np.float32)
    if valid is not None:
        scores = np.where(valid, scores, -np.inf).astype(np.float32)
    scores[~np.isfinite(tables).all(axis=(1, 2))] = -np.inf
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int32)
    best = np.take_along_axis(scores, ids, axis=1) if n else np.zeros((b, 0), np.float32)
    ids[best == -np.inf] = -1
    missing = ((0, 0), (0, k - ids.shape[1]))
    return (
        np.pad(best, missing, constant_values=-np.inf),
        np.pad(ids, missing, constant_values=-1),
    )
