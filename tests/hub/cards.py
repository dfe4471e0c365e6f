"""What the Hub accepts as the YAML header of a README.md."""

from __future__ import annotations

import re

import yaml

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LICENSES = {"apache-2.0", "mit", "other", "unknown", "cc-by-4.0", "cc-by-nc-4.0", "openrail", "bsd-3-clause"}


def validate(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card."""
    match = re.match(r"---\r?\n(.*?)\r?\n?---\r?(\n|$)", content, re.DOTALL)
    if not match:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        header = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {' '.join(str(error).split())}"], []
    if header is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(header, dict):
        return ["the metadata must be a mapping"], []
    errors = []
    for key in ("base_model", "datasets"):
        for value in _listed(header.get(key)):
            if not isinstance(value, str) or not _HUB_ID.fullmatch(value):
                errors.append(f'"{key}" with value "{value}" is not valid. Use a model id from https://hf.co/models.')
    for value in _listed(header.get("license")):
        if value not in _LICENSES:
            errors.append(f'"license" must be one of [{", ".join(sorted(_LICENSES))}]')
    if not all(isinstance(tag, str) for tag in _listed(header.get("tags"))):
        errors.append('"tags" must be an array of strings')
    for key in ("library_name", "pipeline_tag"):
        if not isinstance(header.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    return errors, []


def _listed(value: object) -> list[object]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]
