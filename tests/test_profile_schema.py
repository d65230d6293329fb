"""The published schema of profiles: it holds for all that is shipped, and refuses what the reader refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from autocompress.cli import app
from autocompress.errors import UsageError
from autocompress.hwprofiles import HardwareProfile, load_profile
from autocompress.hwprofiles.profiles import SHIPPED
from autocompress.hwprofiles.schema import ProfileFile, json_schema

VALIDATOR = Draft202012Validator(json_schema())


def smaller(name: str, part: str) -> dict[str, Any]:
    """A shipped profile with the first three of its entries or laws (the first law is that of all kernels)."""
    data = json.loads((SHIPPED / f"{name}.json").read_text())
    return {**data, part: data[part][:3]}


MEASURED, FITTED = smaller("h200-fp16", "entries"), smaller("pixel3", "laws")
OLD = {key: value for key, value in MEASURED.items() if key in ProfileFile.model_json_schema()["required"]} | {
    "schema": 1
}
DOCUMENTS = [MEASURED, FITTED, OLD]


def usable(document: Any) -> bool:
    try:
        HardwareProfile.from_json(document).predict_ns([])
    except UsageError:
        return False
    return True


def paths(value: Any, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(path for key, part in items for path in paths(part, (*prefix, key)))]


def changed(document: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """A copy with another value at a place; ``...`` takes what is there away."""
    if not path:
        return document if value is ... else value
    copied = copy.deepcopy(document)
    inner = copied
    for step in path[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copied


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.floats(-2, 2) | st.sampled_from(["", "conv", "float", "u8s8"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["family", "ns", "mape"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def test_it_is_a_schema_of_draft_2020_12() -> None:
    Draft202012Validator.check_schema(json_schema())
    assert json_schema()["$schema"].endswith("2020-12/schema")


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_what_is_shipped_is_valid(path: Path) -> None:
    VALIDATOR.validate(json.loads(path.read_text()))
    VALIDATOR.validate(json.loads(json.dumps(load_profile(path).to_json())))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_it_refuses_what_the_reader_refuses_and_nothing_else(data: st.DataObject) -> None:
    document = data.draw(st.sampled_from(DOCUMENTS))
    path = data.draw(st.sampled_from(paths(document)))
    document = changed(document, path, data.draw(st.just(...) | values))
    assert VALIDATOR.is_valid(document) == usable(document)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("entries", 1, "ns"), 0, "entries[1].ns is a number above 0, got 0"),
        (("entries", 2, "kernel"), [3], "entries[2].kernel is a list of at least 2, got [3]"),
        (("entries", 0, "in_shape", 1), 1.5, "entries[0].in_shape[1] is a whole number, got 1.5"),
        (("entries", 0, "stride"), ..., "needs the field 'entries[0].stride'"),
        (("layout", "block"), "16", "layout.block is a whole number, got '16'"),
        (("layout",), [], "layout is an object, got []"),
        (("int8_evidence",), {"float_ms": -1}, "int8_evidence.float_ms is a number of at least 0, got -1"),
        (("source",), {"licence": 5}, "source.licence is a text, got 5"),
        (("schema",), True, "has schema 1 or 2"),
        (("entries",), [], "needs measured kernels or fitted laws"),
    ],
)
def test_validate_names_the_field_in_one_sentence(
    tmp_path: Path, path: tuple[str | int, ...], value: Any, sentence: str
) -> None:
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(changed(MEASURED, path, value)))
    run = CliRunner().invoke(app, ["profile", "validate", str(file)])
    assert run.exit_code == 2
    assert sentence in run.stderr and len(run.stderr.strip().splitlines()) == 1
    assert not VALIDATOR.is_valid(json.loads(file.read_text()))


def test_the_schema_is_printed() -> None:
    for args in (["profile", "schema"], ["profile", "schema", "--json"]):
        run = CliRunner().invoke(app, args)
        assert run.exit_code == 0 and json.loads(run.stdout) == json_schema()
