"""Times contestants in turns and keeps what comes of it, whatever happens."""

import gc
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from contestants import DENSE, FUSED, UNPACKED, Contestant, layout_named
from show import in_a_line, table
from timing import Budget, Gpu, OutOfTimeError, in_turns, write

from compressor.runtime.kernels.cuda import instances

LAST, LAST_MINUTES = "model", 2.0  # the section that minutes are kept for

Row = dict[str, Any]
Section = Callable[[list[Row]], None]


@dataclass
class Bench:
    """Where is measured, how long, and what was found so far."""

    gpu: Gpu
    budget: Budget
    path: Path
    formats: Sequence[str]
    results: dict[str, Any] = field(default_factory=dict)
    reserve: float = 0.0  # minutes

    def run(self, sections: Mapping[str, Section], **about: Any) -> bool:
        """Measures, and writes the file all the while. False if a section failed."""
        self.results |= {**about, "machine": self.gpu.facts(), "copy_bytes_per_second": self.gpu.copy_bytes_per_second()}
        self.gpu.compile([(layout, instances.tiles(layout)) for layout in map(layout_named, self.formats)])
        found = self.results["sections"] = {
            name: {"outcome": "skipped", "detail": None, "seconds": 0.0, "rows": []} for name in sections
        }
        for name, section in sections.items():
            self.reserve = LAST_MINUTES if LAST in sections and name != LAST else 0.0
            self.measure(name, section, found[name])
        return all(section["outcome"] != "failed" for section in found.values())

    def measure(self, name: str, section: Section, found: dict[str, Any]) -> None:
        """One section, whatever happens in it."""
        started = self.budget.now()
        try:
            self.budget.check(self.reserve)
            found["outcome"] = "started"
            section(found["rows"])
            found["outcome"] = "done"
        except OutOfTimeError as error:
            found |= {"outcome": "cut short" if found["rows"] else "skipped", "detail": str(error)}
        except Exception as error:  # of any kind: the other sections are still wanted
            found |= {"outcome": "failed", "detail": in_a_line(error)}
            traceback.print_exc()
        found["seconds"] = self.budget.now() - started
        self.save()
        said = ", ".join(filter(None, (found["outcome"], found["detail"], f"{found['seconds']:.0f} s")))
        print(f"\n{name}: {said}\n{table(found['rows'])}", flush=True)
        gc.collect()
        if found["outcome"] != "failed":
            self.gpu.release()

    def save(self) -> None:
        """Writes what there is."""
        sections = self.results["sections"].items()
        rows = [row for name, section in sections if name.startswith("products") for row in section["rows"]]
        write(self.path, self.results | {"switch_points": switch_points(rows)})

    def race(self, contestants: Sequence[Contestant], tokens: int, rows: list[Row], **about: Any) -> list[Contestant]:
        """Times contestants against the first, adds their rows, and gives back those that did not fail."""
        self.budget.check(self.reserve)
        timers, able = {}, []
        for one in contestants:
            try:
                timers[one.name] = self.gpu.chain(one.calls(tokens))
                able.append(one)
            except Exception as error:
                if not one.foreign:
                    raise
                failed = {"tokens": tokens, "format": one.format, "kernel": one.kernel, "failed": in_a_line(error)}
                rows.append(about | failed)
        taken = in_turns(timers)
        for one in able:
            rows.append(about | {"tokens": tokens} | self.figures(one, taken[one.name], taken[able[0].name]))
        self.save()
        return able

    def figures(self, one: Contestant, times: Sequence[float], of_first: Sequence[float]) -> Row:
        """Return the summary of the times of some rounds."""
        rate = one.nbytes / median(times)
        return {
            "format": one.format,
            "kernel": one.kernel,
            "nbytes": one.nbytes,
            "microseconds": 1e6 * median(times),
            "spread": (max(times) - min(times)) / median(times),
            "gb_per_second": rate / 1e9,
            "of_copy": rate / self.results["copy_bytes_per_second"],
            "speedup": median(first / own for first, own in zip(of_first, times, strict=True)),
        }


def switch_points(rows: Sequence[Row]) -> list[Row]:
    """For each shape and format, from how many tokens on dequantising first is faster, None where it never is."""
    taken: dict[tuple[tuple[int, ...], str], dict[int, dict[str, float]]] = {}
    for row in rows:
        of_tokens = taken.setdefault((tuple(row["shape"]), row["format"]), {}).setdefault(row["tokens"], {})
        of_tokens[row["kernel"]] = row["microseconds"]
    found = []
    for (shape, name), by_tokens in taken.items():
        both = {tokens: way for tokens, way in by_tokens.items() if name != DENSE and UNPACKED in way}
        slower = [tokens for tokens, way in both.items() if way[FUSED] <= way[UNPACKED]]
        later = [tokens for tokens in sorted(both) if tokens > max(slower, default=0)]
        if both:
            found.append({"shape": list(shape), "format": name, "tokens": later[0] if later else None})
    return found
