"""Pydantic models of the content that a report.json must have for a page and a card to be made from it.

Sections may be missing or null if they were not measured. Keys that no page shows are not checked.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from compressor.reading import elide

MAX_BLOCKS = 10_000  # the page has a column for each block
KINDS = {  # wording of faults, by pydantic's name of the fault
    **{"list_type": "is no list", "model_type": "is no object", "dict_type": "is no object", "string_type": "is no text"},
    **{"float_type": "is no number", "int_type": "is no whole number", "bool_type": "is neither true nor false"},
}
Text = Annotated[str, StringConstraints(max_length=1_000_000)]
Name = Annotated[str, StringConstraints(max_length=4096)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # seconds, bytes, rates
Loss = Annotated[float, Field(ge=0)]  # infinite where a model gives a token no chance
Count = Annotated[int, Field(ge=0, lt=2**63)]


def _layer(name: str) -> str:
    """Return the name of a layer if all numbers in it are possible block numbers; raise ValueError otherwise."""
    for digits in re.findall(r"\d+", name):
        if len(digits) > len(str(MAX_BLOCKS)) or int(digits) >= MAX_BLOCKS:
            raise ValueError(f"names block {elide(digits, 20)}, where fewer than {MAX_BLOCKS:,} are expected")
    return name


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Row(_Part):
    layer: Annotated[Name, AfterValidator(_layer)]
    option: Name
    bits_per_weight: Finite
    error: Loss


class _Figures(_Part):
    tokens: Count | None = None
    nll: float | None = None
    perplexity: Loss | None = None
    bits_per_byte: float | None = None
    reference_nll: float | None = None
    reference_perplexity: Loss | None = None
    reference_bits_per_byte: float | None = None
    delta_nll: float | None = None
    kl: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    flips: float | None = None


class _Text(_Figures):
    name: Name
    sha256: Name
    split: Name | None = None


class _Position(_Figures):
    first: Annotated[int, Field(ge=1, lt=2**31)]
    last: Annotated[int, Field(ge=1, lt=2**31)]
    tokens: Count


class _Protocol(_Part):
    seq_len: Count
    stride: Count | None
    bos: bool
    documents: bool
    dtype: Name


class _Quality(_Figures):
    perplexity: Loss | None = Field()
    tokens: Count
    source: Name
    seq_len: Count
    texts: list[_Text]
    positions: list[_Position]
    protocol: _Protocol


class _Task(_Part):
    task: Name
    metric: Name
    samples: Count | None = None
    value: float | None = None
    stderr: float | None = None
    reference_value: float | None = None
    reference_stderr: float | None = None
    lost: Count | None = None
    won: Count | None = None
    flips: float | None = None
    p_value: float | None = None


class _Sample(_Part):
    prompt: Text
    reference: Text
    model: Text
    text: Text | None = None


class _Check(_Part):
    check: Name
    outcome: Name
    detail: Text | None = None


class _Calibration(_Part):
    source: Name
    samples: Count
    seq_len: Count
    seed: int
    sha256: Name


class _Contestant(_Part):
    name: Name
    bits_per_weight: Finite
    kl: float
    seconds: Amount


class _Step(_Part):
    stage: Name
    number: Count
    seconds: Amount
    fitness: float


class _Search(_Part):
    best: Name
    contestants: list[_Contestant]
    steps: list[_Step]


class _Speed(_Part):
    phase: Name
    model: Name
    batch: Count
    tokens_per_second: Amount
    spread: float | None = None
    gb_per_second: Amount | None = None
    first_token_seconds: Amount | None = None


class _Speeds(_Part):
    device: Name
    dtype: Name
    bandwidth_gb_s: Amount | None
    rows: list[_Speed]
    threads: Count | None = None
    runtime: dict[str, Name] | None = None
    peak_memory_bytes: dict[str, Count | None] | None = None


class _Pruning(_Part):
    step: Name = Field(alias="pass")
    kl: Any = None
    tokens: Any = None

    @model_validator(mode="after")
    def _check_prompt(self) -> "_Pruning":
        """Check the values that the card shows for a soft prompt; notes of other passes are not shown anywhere."""
        pair = self.kl if isinstance(self.kl, list) else []
        if self.step == "soft_prompt" and not (
            len(pair) == 2 and all(type(one) in (int, float) for one in pair) and type(self.tokens) is int
        ):
            raise ValueError("of soft_prompt needs `kl` of two numbers and a number of `tokens`")
        return self


class _Report(_Part):
    model: Name
    path: Name
    out: Name
    rows: list[_Row]
    size_bytes: Amount
    source_size_bytes: Amount
    bits_per_weight: Finite
    model_bits_per_weight: Finite
    version: Name | None = None
    fingerprint: dict[str, Name] | None = None
    versions: dict[str, Name] | None = None
    command: Text | None = None
    layout: Name | None = None
    runs_code: bool | None = None
    warnings: list[Text] | None = None
    seconds: Amount | None = None
    peak_memory_bytes: Count | None = None
    peak_device_memory_bytes: Count | None = None
    calibration: _Calibration | None = None
    quality: _Quality | None = None
    tasks: list[_Task] | None = None
    samples: list[_Sample] | None = None
    speed: _Speeds | None = None
    verification: list[_Check] | None = None
    search: _Search | None = None
    pruning: list[_Pruning] | None = None


NEEDED = tuple(name for name, field in _Report.model_fields.items() if field.is_required())


def fault(report: Any) -> str | None:
    """Return why the content of a report.json cannot be shown, as part of a sentence; None if it can."""
    missing = [key for key in NEEDED if not isinstance(report, dict) or key not in report]
    if missing:
        return f"{len(missing)} of {len(NEEDED)} needed keys are missing ({', '.join(missing)})"
    try:
        _Report.model_validate(report)
    except ValidationError as error:
        first = error.errors()[0]
        place = _place(first["loc"])
        if first["type"] == "missing":
            return f"{_place(first['loc'][:-1])} lacks {first['loc'][-1]}"
        reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        return f"{place} {KINDS.get(first['type'], reason)}, but {elide(repr(first['input']), 40)}"
    return None


def _place(location: Sequence[int | str]) -> str:
    """Return a place in the report as a program would write it: `rows[0].error`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{elide(part, 40)}" for part in location]
    return "".join(parts).removeprefix(".")
