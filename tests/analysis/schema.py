"""The form of `Analysis.to_dict()`: keys and types exactly, and plain JSON."""

import json
import math

NUMBER = (int, float)
WHOLE = int
SHARE = {"share": NUMBER, "expected": NUMBER}
BAND = {"mean": NUMBER, "low": NUMBER, "high": NUMBER}


class Maybe:
    """The type, or null."""

    def __init__(self, kind):
        self.kind = kind


class ByName:
    """An object with free keys, whose values are alike."""

    def __init__(self, kind):
        self.kind = kind


SCHEMA = {
    "format": WHOLE,
    "basis": {
        "name": str, "source": Maybe(str), "base_model": Maybe(str), "digest": str, "dtype": str, "attributes": [str],
        "modules": WHOLE, "command": Maybe(str),
    },
    "settings": {"draws": WHOLE, "mismatches": WHOLE, "seed": WHOLE},
    "rules": dict.fromkeys(("drop", "pattern", "suggested_dim", "muted", "null", "permutation", "captured"), str),
    "modules": [{"name": str, "depth": Maybe(WHOLE), "stack": str, "kind": str, "n": WHOLE, "m": WHOLE}],
    "spectra": [{
        "module": str, "attribute": str, "rank": Maybe(WHOLE), "dim": WHOLE, "singular_values": [NUMBER],
        "first_singular_values": [NUMBER],
        "drops": [{"index": WHOLE, "factor": NUMBER}], "pattern": Maybe(str), "gap": Maybe(NUMBER),
        "suggested_dim": Maybe(WHOLE), "energy_at_dim": Maybe(NUMBER), "energy_at_suggested": Maybe(NUMBER),
        "captured_energy": Maybe(NUMBER), "largest": Maybe(NUMBER), "weights": [NUMBER], "residuals": [NUMBER],
        "energies": [NUMBER],
    }],
    "nulls": [{"n": WHOLE, "d": WHOLE, "d_other": WHOLE, "mean": [NUMBER], "low": [NUMBER], "high": [NUMBER]}],
    "overlaps": [{
        "module": str, "attribute": str, "other": str, "side": str, "eigenvalues": [NUMBER], "smallest": NUMBER,
        "null": WHOLE, "permuted": Maybe(BAND),
    }],
    "pairs": [{
        "attribute": str, "other": str, "side": str, "modules": WHOLE, "median": NUMBER, "low": NUMBER,
        "high": NUMBER, "null_median": NUMBER, "null_low": NUMBER, "null_high": NUMBER,
        "permuted_median": Maybe(NUMBER), "share_above_half": NUMBER, "share_below_null": NUMBER,
    }],
    "adapters": [{
        "attribute": str, "adapter": str, "revision": Maybe(str), "weight_median": NUMBER, "weight_min": NUMBER,
        "weight_max": NUMBER, "residual_median": NUMBER, "energy_median": NUMBER, "muted_share": NUMBER, "muted": bool,
    }],
    "explained": [{
        "adapter": str, "source_of": [str], "modules_missing": [str], "joint": NUMBER, "expected": NUMBER,
        "attributes": ByName(SHARE),
        "modules": [{"module": str, "norm": NUMBER, "joint": NUMBER, "expected": NUMBER, "attributes": ByName(SHARE)}],
    }],
}  # fmt: skip


def check_schema(value, schema, where="$"):
    """Keys, order of keys aside, and types exactly; numbers are finite."""
    if isinstance(schema, Maybe):
        if value is not None:
            check_schema(value, schema.kind, where)
    elif isinstance(schema, ByName):
        assert type(value) is dict and all(type(key) is str for key in value), where
        for key, one in value.items():
            check_schema(one, schema.kind, f"{where}.{key}")
    elif isinstance(schema, dict):
        assert type(value) is dict and value.keys() == schema.keys(), (where, set(value) ^ set(schema))
        for key, one in schema.items():
            check_schema(value[key], one, f"{where}.{key}")
    elif isinstance(schema, list):
        assert type(value) is list, where
        for i, one in enumerate(value):
            check_schema(one, schema[0], f"{where}[{i}]")
    else:
        kinds = schema if isinstance(schema, tuple) else (schema,)
        assert type(value) in kinds, (where, value)
        assert not isinstance(value, float) or math.isfinite(value), (where, value)


def plain(record):
    """The record after a trip through strict JSON, which must not change it."""
    back = json.loads(json.dumps(record, allow_nan=False))
    assert back == record
    return back
