"""Which kernel is chosen, and how one is told."""

import logging
from collections.abc import Iterator

import pytest
import torch

from compressor.errors import KernelError
from compressor.formats.numerics.codes import IntCodes, values
from compressor.runtime.kernels import dispatch
from compressor.runtime.kernels.dispatch import choose
from compressor.runtime.kernels.layouts import layout_for, named
from compressor.runtime.kernels.op import packed_linear

CPU, META = torch.device("cpu"), torch.device("meta")
LAYOUT = "int4-g128-bf16"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Choices are remembered for the life of a process."""
    choose.cache_clear()
    yield
    choose.cache_clear()


def obstacle(monkeypatch: pytest.MonkeyPatch, kernel: str, reason: str | None) -> None:
    monkeypatch.setattr(dispatch.backend(kernel), "obstacle", lambda *_: reason)


def codes(rows: int = 24, columns: int = 200) -> IntCodes:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator)  # noqa: E731
    scale = torch.rand(rows, 1, generator=generator).bfloat16()
    return IntCodes(4, draw(rows, columns), scale, draw(rows, 1), torch.randperm(columns, generator=generator))


def test_on_a_cpu_the_cpu_kernel_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    obstacle(monkeypatch, "cpu", None)
    assert choose(LAYOUT, CPU, torch.bfloat16).kernel == "cpu"


def test_what_no_kernel_can_do_the_reference_does_and_it_is_told_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    obstacle(monkeypatch, "cpu", "it rains")
    assert choose(LAYOUT, CPU, torch.bfloat16).kernel == "reference"
    assert [(record.levelno, "cpu: it rains" in record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, True)
    ]


def test_it_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    obstacle(monkeypatch, "cpu", None)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            choose(LAYOUT, CPU, torch.bfloat16)
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith(f"{LAYOUT}: cpu kernel (")


@pytest.mark.parametrize(("kernel", "why"), [("cpu", "it rains"), ("cuda", "the activations are on cpu")])
def test_a_kernel_that_was_asked_for_is_taken_or_refused(kernel: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    obstacle(monkeypatch, "cpu", "it rains")
    with pytest.raises(KernelError, match=f"kernel `{kernel}` cannot multiply by {LAYOUT} on cpu: {why}"):
        choose(LAYOUT, CPU, torch.bfloat16, kernel)


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(KernelError, match="no kernel named `tpu`; known: auto, native, cuda, cpu, reference"):
        choose(LAYOUT, CPU, torch.bfloat16, "tpu")


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(KernelError, match="no layout named `int9-g7`"):
        named("int9-g7")


def test_the_reference_multiplies_by_what_the_codes_mean() -> None:
    made, x = codes(), torch.randn(2, 3, 200)
    layout = layout_for(made)
    assert layout is not None
    parts = list(layout.arrange(made).values())
    y = packed_linear(x, parts, None, layout.name, 24, "reference")
    torch.testing.assert_close(y.double(), x.double() @ values(made).double().T, atol=1e-3, rtol=1e-4)


def test_the_operator_keeps_its_promises_to_the_compiler() -> None:
    made = codes()
    layout = layout_for(made)
    assert layout is not None
    parts = list(layout.arrange(made).values())
    torch.library.opcheck(packed_linear, (torch.randn(2, 200), parts, torch.randn(24), layout.name, 24, "reference"))


def test_a_gradient_is_refused_where_it_is_asked_for() -> None:
    made, x = codes(), torch.randn(2, 200, requires_grad=True)
    layout = layout_for(made)
    assert layout is not None
    y = packed_linear(x, list(layout.arrange(made).values()), None, layout.name, 24, "reference")
    with pytest.raises(KernelError, match="packed layers know no gradient"):
        y.sum().backward()
