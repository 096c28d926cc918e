"""Machine code as text: what a cubin's kernels are made of, by NVIDIA's disassembler."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import kept

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Instruction:
    name: str  # "LDG.E.128.CONSTANT"
    operands: str
    labels: tuple[str, ...]  # that jumps to here name


@dataclass(frozen=True)
class Kernel:
    """The instructions of one kernel."""

    instructions: list[Instruction]

    def count(self, name: str) -> int:
        """Instructions of a kind, whatever their modifiers."""
        return kinds(self.instructions)[name]

    def wide_loads(self) -> int:
        """Loads of 16 bytes from global memory."""
        return sum(one.name.startswith("LDG") and ".128" in one.name for one in self.instructions)

    def main_loop(self) -> list[Instruction]:
        """The loop with the most products on tensor cores, without what is outside of it."""
        places = {label: i for i, one in enumerate(self.instructions) for label in one.labels}
        loops = []
        for i, one in enumerate(self.instructions):
            target = re.search(r"\((\.L_x?_?\w+)\)", one.operands) if one.name.startswith("BRA") else None
            if target and places.get(target[1], i) < i:
                loops.append(self.instructions[places[target[1]] : i + 1])
        products = max(kinds(loop)["HMMA"] for loop in loops)
        return min((loop for loop in loops if kinds(loop)["HMMA"] == products), key=len)


def kinds(instructions: list[Instruction]) -> Counter[str]:
    """How many there are of each kind, whatever their modifiers."""
    return Counter(one.name.partition(".")[0] for one in instructions)


def tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, from a wheel or the path."""
    wheels = (found for path in sys.path if path for found in Path(path).glob(f"nvidia/*/bin/{name}"))
    return next((str(path) for path in wheels), None) or shutil.which(name)


def kernels(cubin: Path) -> dict[str, Kernel]:
    """The kernels of a cubin, by the name they have in it."""
    text = _output("nvdisasm", "-c", cubin)
    found: dict[str, Kernel] = {}
    for section in re.split(r"\n\.text\.", text)[1:]:
        name, _, body = section.partition(":\n")
        found[name] = Kernel(_instructions(body))
    return found


def registers(cubin: Path) -> dict[str, tuple[int, int]]:
    """Registers of a thread and bytes of its stack, by kernel."""
    text = _output("cuobjdump", "--dump-resource-usage", cubin)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", text)
    return {name: (int(count), int(stack)) for name, count, stack in found}


def parameters(cubin: Path) -> list[list[tuple[int, int]]]:
    """Offset and size of each parameter, of each kernel."""
    text = _output("cuobjdump", "-elf", cubin)
    found = []
    for section in re.split(r"\n\.nv\.info\.", text)[1:]:
        places = re.findall(r"Ordinal : 0x(\w+)\s+Offset  : 0x(\w+)\s+Size    : 0x(\w+)", section)
        found.append([(int(at, 16), int(size, 16)) for _, at, size in sorted(places, key=lambda place: int(place[0], 16))])
    return found


def _instructions(body: str) -> list[Instruction]:
    found, labels = [], []
    for line in body.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels.append(label[1])
        elif instruction := INSTRUCTION.search(line):
            found.append(Instruction(instruction[2], instruction[3], tuple(labels)))
            labels = []
    return found


def _output(name: str, option: str, cubin: Path) -> str:
    """Return what a tool says of a cubin."""
    program = tool(name)
    assert program is not None
    command = [program, option, str(cubin)]
    depends = (name, option, kept.version(program), cubin.read_bytes())
    return kept.text(lambda: subprocess.run(command, capture_output=True, text=True, check=True).stdout, *depends)
