"""What a profile's file holds, field by field: the reader checks files by it, and it is published as JSON Schema.

Knows nothing of latency models; ``profile.py`` makes one of what was read here.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails

from autocompress.types import Format, Int8Format

SCHEMA = 2
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _whole(value: Any) -> Any:
    """JSON does not tell 1.0 from 1."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, Strict()]
Amount = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Strict(), Field(ge=1), BeforeValidator(_whole)]
Shape = Annotated[list[Count], Field(min_length=1)]
Pair = Annotated[list[Count], Field(min_length=2, max_length=2)]
Score = Annotated[Annotated[int, Strict()] | Annotated[float, Strict()], WithJsonSchema({"type": "number"})]


class _Part(BaseModel):
    """Fields that are not known here are left alone: a newer version may have written them."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class EntryPart(_Part):
    """One measured kernel."""

    kind: Text = Field(description="operator, as types.Kernel names it: conv, linear, add …")
    in_shape: Shape = Field(description="(C, H, W), (C,) or (C, T), without the batch")
    out_shape: Shape
    kernel: Pair
    stride: Pair
    groups: Count
    format: Format
    fused: Text = Field(description="activation behind it, '' for none")
    n_inputs: Count
    ns: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)] = Field(description="nanoseconds of one run")
    interval: Amount = Field(description="half width of the 95 % interval, relative to ns")


class LawPart(_Part):
    """The law of one family of kernels: nanoseconds, the last four a thousand MACs, elements or weights."""

    family: list[Text] = Field(description="words of the family, [] for all kernels")
    overhead: Amount
    macs: Amount
    elements_in: Amount
    elements_out: Amount
    weights: Amount


class LayoutPart(_Part):
    """How the runtime rounds channels."""

    block: Count
    granule: Count


class ProfileFile(_Part):
    """A device as AutoCompress knows it: kernels that were measured on it, or laws that were fitted to networks.

    Version 1 had no laws and nothing that belongs to them.
    """

    version: Annotated[Literal[1, 2], BeforeValidator(_whole), Field(alias="schema")] = Field(
        description=f"version of this format; {SCHEMA} is written"
    )
    name: Text = Field(description="what budgets call it: latency_ms<=5@name")
    device: Text
    runtime: Text
    runtime_version: Text
    threads: Count
    batch: Count
    measured_at: Text
    entries: list[EntryPart] = Field(description="measured kernels; [] where there are laws")
    overhead_ns: Amount = Field(description="what one run costs beside its kernels")
    noise_floor: Amount
    int8_format: Int8Format = Field(description="fastest exact types of int8 activations and weights")
    int8_evidence: dict[str, Amount]
    layout: LayoutPart
    host: dict[str, Any]
    how: dict[str, Any]
    provenance: Text = Field(description="'measured', or 'fitted from published measurements'")
    laws: list[LawPart] = Field(default_factory=list, description="laws of kernel families, one of them of all kernels")
    source: dict[str, Text] = Field(default_factory=dict, description="of a fitted profile: citation and licence")
    fit_error: dict[str, dict[str, Score]] = Field(default_factory=dict, description="held-out errors by search space")
    limits: dict[str, Any] = Field(default_factory=dict, description="sizes and operators behind it")
    expected_error: Amount = Field(default=0.0, description="relative error that nine in ten networks stayed below")


def json_schema() -> dict[str, Any]:
    """The format as JSON Schema, draft 2020-12, for programs that write profiles or check them before they are used."""
    found = ProfileFile.model_json_schema(by_alias=True)
    # What predicts: kernels, or laws with one of all kernels among them. Pydantic has no words for that.
    root = {"contains": {"properties": {"family": {"maxItems": 0}}}}
    predicts = [
        {"properties": {"laws": root}, "required": ["laws"]},
        {"properties": {"laws": {"maxItems": 0}, "entries": {"minItems": 1}}},
    ]
    return {"$schema": DIALECT, **found, "title": "AutoCompress hardware profile", "anyOf": predicts}


_SAID = {
    "greater_than_equal": "is a number of at least {ge:g}",
    "greater_than": "is a number above {gt:g}",
    "finite_number": "is a number",
    "float_type": "is a number",
    "int_type": "is a whole number",
    "int_from_float": "is a whole number",
    "string_type": "is a text",
    "list_type": "is a list",
    "dict_type": "is an object",
    "model_type": "is an object",
    "too_short": "is a list of at least {min_length}",
    "too_long": "is a list of at most {max_length}",
}


def first_error(error: ValidationError) -> tuple[str, str | None]:
    """The first field that cannot be used (``entries[3].ns``), and what is wrong with it; ``None`` where it is missing."""
    found = error.errors()[0]
    steps = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in found["loc"]).lstrip(".")
    return steps, None if found["type"] == "missing" else f"{_law(found)}, got {_short(found['input'])}"


def _law(found: ErrorDetails) -> str:
    context = found.get("ctx", {})
    if found["type"] == "literal_error":
        return "is one of " + ", ".join(re.findall(r"'(.*?)'", str(context["expected"])))
    said = _SAID.get(found["type"])
    return said.format(**context) if said else f"cannot be used ({found['msg']})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
