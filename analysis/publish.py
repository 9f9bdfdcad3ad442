"""What the tables of an ablation are made of, small enough for git: `python -m analysis ablate … --publish docs/results/mine`.

    publish(run_folders, out, to)

Of each run its settings, plan, choice, loss at every step and findings, in the layout of the ablation's own folder, so that a copy of it in `--out`
(`cp -rL docs/results/mine runs/mine`) is taken for these runs and none of them is run again. No weights, media or pages.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from data.files import write_text

PARTS = ("config.yaml", "code.txt", "weights.txt", "plan.json", "best.json", "metrics.jsonl", "findings/after.json")


def publish(runs: Sequence[Path], out: Path, to: Path) -> None:
    """Copy finished runs from `out` to `to`. Findings before training that several runs share are there once, runs have a link to them. Paths below
    the working directory become relative, JSON is on one line. What else is in `to` stays.
    """
    shared = {}
    for path in sorted((out / "diagnoses").glob("*.json")):
        shared[_text(path)] = to / path.relative_to(out)
        write_text(to / path.relative_to(out), _text(path))
    for run in runs:
        home = to / run.relative_to(out)
        for name in PARTS:
            if (run / name).is_file():
                write_text(home / name, _text(run / name))
        before, text = home / "findings" / "before.json", _text(run / "findings" / "before.json")
        before.unlink(missing_ok=True)
        if text in shared:
            before.symlink_to(os.path.relpath(shared[text], before.parent))
        else:
            write_text(before, text)


def _text(path: Path) -> str:
    text = path.read_text(encoding="utf-8").replace(f"{Path.cwd()}/", "")
    return json.dumps(json.loads(text), ensure_ascii=False) + "\n" if path.suffix == ".json" else text
