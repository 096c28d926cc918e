"""The calibration rows that `compress` draws from a source, as a file for the peers: both are then given the same tokens.

    python scripts/benchmarks/rows_run.py MODEL SOURCE SAMPLES SEQ_LEN ROWS.json

Not part of the benchmark's own process, which stays small: a child's peak memory starts with that of its parent.
"""

import json
import sys
from pathlib import Path

from compressor.model.tokenizer import load_tokenizer
from compressor.pipeline.calibration.data import load_samples


def main() -> None:
    model, source, samples, seq_len, out = sys.argv[1:]
    drawn = load_samples(source, load_tokenizer(Path(model)), samples=int(samples), seq_len=int(seq_len))
    Path(out).write_text(json.dumps({"sha256": drawn.sha256, "rows": drawn.tokens.tolist()}), encoding="utf-8")


if __name__ == "__main__":
    main()
