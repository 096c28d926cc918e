"""Are the CUDA kernels right on this GPU? Every format, every instance, shapes that divide by nothing, graphs, streams.

    scripts/gpu/check [--formats NAME …] [--sanitizer after|only|never]

Products are compared with x W^T in fp64, W being what the codes are defined to stand for. Outputs are full of NaN before, and
so are margins around them, which have to stay so. All products are made with and without programmatic dependent launch, by
which a kernel starts while the one before it runs. A compute-sanitizer, if there is one for this GPU, watches a small part.

Exit status: 0 all right, 1 something is wrong, 2 there is no GPU that the kernels can use.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from checks import Case, Finding, Load, dequantised, laid_out, natively, products, worst
from compiling import compile_all
from concurrency import in_a_graph, on_two_streams
from sanitizer import TOOLS, watched
from weights import FORMATS, Format

from compressor.errors import KernelError
from compressor.runtime.kernels import cuda, native
from compressor.runtime.kernels.cuda import instances, program
from compressor.runtime.kernels.layouts import Layout

TOKENS = (1, 7, 8, 16, 33, 64, 65)
SHAPES = (  # made as small as a format asks for
    (45, 1000),  # neither whole tiles nor whole chunks, where the format can have them so
    (16, 128),  # fewer chunks than warps
    (272, 3968),  # more chunks than a block takes at a time
    (4096, 4096),
    (28672, 1024),  # more tiles of rows than blocks: the instances for many rows
    (1024, 14336),
)
SMALL = ((45, 1000), (16, 128))
NATIVE = "fp8-row"  # what the tensor cores multiply by as it is
SQUARE = 1024  # of chains, whose outputs are the next product's activations


def fitting(form: Format, shape: tuple[int, int]) -> tuple[int, int]:
    """The largest shape below, one at least, that a format can have."""
    rows, columns = shape
    return max(form.rows, rows - rows % form.rows), max(form.columns, columns - columns % form.columns)


def compile_formats(cases: Sequence[Case], device: torch.device) -> None:
    """Compile what all checks need, in parallel."""
    start = time.perf_counter()
    architecture = program.architecture(torch.cuda.get_device_capability(device))
    compile_all([(case.layout, instances.tiles(case.layout)) for case in cases], architecture)
    print(f"compiled for {architecture} in {time.perf_counter() - start:.1f} s", flush=True)


def load_on(device: torch.device, layout: Layout, overlapping: bool) -> program.Program:
    """The kernels of a layout."""
    return program.load(layout.name, device.index, None, overlapping)


def through_the_entry(case: Case) -> Iterator[Finding]:
    """Check the function that the rest of the package calls: it chooses the instance, and dequantizes where there are many
    tokens.
    """
    for tokens in (1, cuda.FUSED_ROWS, cuda.FUSED_ROWS + 1, 200):
        x_MK, bias_N, expected = case.problem(tokens, bias=True)
        found = cuda.linear(x_MK, case.parts, case.layout, case.rows, bias_N)
        yield case.compared(f"linear of {tokens} tokens", found, expected)


def of_format(name: str, device: torch.device, load: Load) -> Iterator[Finding]:
    """All that is asked of a format."""
    form = FORMATS[name]
    for shape in dict.fromkeys(fitting(form, shape) for shape in SHAPES):
        case = laid_out(name, *shape, device)
        yield from products(case, load, TOKENS)
        yield from dequantised(case, load)
        yield from through_the_entry(case)
    layers = [laid_out(name, SQUARE, SQUARE, device) for _ in range(4)]
    for tokens in (1, 16):
        yield from in_a_graph(layers, load, tokens)
        yield from on_two_streams(layers, load, tokens)


def sanitised(names: Sequence[str], device: torch.device, load: Load) -> Iterator[Finding]:
    """A part for compute-sanitizer: few launches, and no kernels but our own, as all else is done on the CPU."""
    for name in names:
        for shape in dict.fromkeys(fitting(FORMATS[name], shape) for shape in SMALL):
            case = laid_out(name, *shape, torch.device("cpu")).on(device)
            yield from products(case, load, (1, 33))
            yield from dequantised(case, load)


def report(name: str, found: Sequence[Finding], seconds: float) -> bool:
    """Prints what was found, and tells whether all was right."""
    wrong = [finding for finding in found if not finding.right]
    worst_error = max((finding.error for finding in found if finding.right), default=0.0)
    print(
        f"{name:24} {len(found):5} checks, {len(wrong)} wrong, largest error {worst_error:.2e}, {seconds:.1f} s", flush=True
    )
    for finding in worst(wrong, 5):
        print(f"    {finding.what}: {finding.error:.3g}, {finding.limit:.3g} is allowed", flush=True)
    return not wrong


def check_native(device: torch.device) -> bool:
    """Runs and prints the checks of products without our kernels, where the device has them."""
    lacking, start = native.lacking(device), time.perf_counter()
    if lacking is not None:
        print(f"native: left out, {lacking}", flush=True)
        return True
    found = [finding for shape in SHAPES for finding in natively(NATIVE, *shape, device, TOKENS)]
    return report("native", found, time.perf_counter() - start)


def check(names: Sequence[str], device: torch.device) -> bool:
    """Runs and prints all checks of some formats."""
    right, load = True, partial(load_on, device)
    compile_formats([laid_out(name, *fitting(FORMATS[name], SMALL[0]), torch.device("cpu")) for name in names], device)
    for name in names:
        start = time.perf_counter()
        try:
            found = list(of_format(name, device, load))
            torch.cuda.synchronize()
        except (KernelError, RuntimeError) as error:  # an illegal access, which also ends all that would follow
            print(f"{name:24} failed: {error}", flush=True)
            return False
        right &= report(name, found, time.perf_counter() - start)
    return right & (NATIVE not in names or check_native(device))


def watched_by_all(names: Sequence[str]) -> bool:
    """Prints what compute-sanitizer's tools say, and tells whether they found nothing."""
    right = True
    for tool in TOOLS:
        outcome, detail = watched(tool, [sys.executable, __file__, "--sanitized", "--formats", *names])
        print(f"compute-sanitizer {tool}: {outcome}{f' ({detail})' if detail else ''}", flush=True)
        right &= outcome != "failed"
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the CUDA kernels with what they are defined to compute.")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS), metavar="NAME")
    parser.add_argument("--sanitizer", choices=("after", "only", "never"), default="after", help="when it watches a part")
    parser.add_argument("--sanitized", action="store_true", help="do the part that it watches")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("scripts/gpu/check: this machine has no CUDA GPU; run it on one that has\n")
        return 2
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    first = laid_out(options.formats[0], 64, 128, torch.device("cpu"))
    if (obstacle := cuda.obstacle(first.layout, device, torch.bfloat16)) is not None:
        sys.stderr.write(f"scripts/gpu/check: the kernels cannot run here: {obstacle}; see compressor/runtime/kernels/cuda\n")
        return 2
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}", flush=True)
    if options.sanitized:
        return not report("sanitized", list(sanitised(options.formats, device, partial(load_on, device))), 0.0)
    right = options.sanitizer == "only" or check(options.formats, device)
    if options.sanitizer != "never":
        right &= watched_by_all(options.formats)
    print("all right" if right else "WRONG: see above", flush=True)
    return not right


if __name__ == "__main__":
    raise SystemExit(main())
