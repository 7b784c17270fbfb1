"""Makes docs/images/first_run.svg, the moving picture of the README, from the output of real commands.

    python tests/benchmarks/readme_picture.py

Shows the plan of a recipe, trains it, stops it by a signal, and resumes it on another layout. About a minute.
"""

import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "first_run.svg"
RECIPE = "text_classifier:pipeline"
COLUMNS, ROWS, SECONDS = 106, 18, 5
"""Size of a frame in characters, and how long each is shown."""
LAYOUT = "--mesh.pipeline 2 --mesh.data 2"
STEP = re.compile(r"step (\d+)/")
PHASE = re.compile(r"[A-Z][a-z]+ (JAX |to evaluate,? )?(\.\.\.|took |(kind of )?stage )")
"""Lines on what a run is doing; on a terminal they are one line, which vanishes."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        frames = [
            plan(folder),
            train(folder, f"{RECIPE} --run-dir run", stop_at=10),
            train(folder, f"{RECIPE} --run-dir run --resume {LAYOUT}"),
            [*run(folder, "checkpoint list run/checkpoints"), "", *run(folder, "metrics run")],
        ]
    PICTURE.write_text(moving(frames))
    print(f"wrote {PICTURE}")


def plan(folder: str) -> list[str]:
    """What `plan` prints down to the bubble; the table of memory is left out."""
    lines = run(folder, f"plan {RECIPE} --num-microbatches 4")
    (last,) = (number for number, line in enumerate(lines) if line.startswith("Expected bubble"))
    return lines[: last + 1]


def run(folder: str, arguments: str) -> list[str]:
    """The lines of a command that ends by itself, after the line that calls it."""
    process = start(folder, arguments)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return [f"$ meshpipe {arguments}", *(line for line in out.splitlines() if not PHASE.match(line))]


def train(folder: str, arguments: str, stop_at: int | None = None) -> list[str]:
    """The lines of a run, few of them of steps. With `stop_at`, it gets Ctrl-C's signal after that step's line."""
    process = start(folder, f"train {arguments}")
    lines = [f"$ meshpipe train {arguments}"]
    assert process.stdout is not None
    for line in process.stdout:
        if not PHASE.match(line):
            lines.append(line.rstrip())
        step = STEP.match(line)
        if stop_at and step and int(step[1]) >= stop_at:
            stop_at = None
            lines.append("^C")
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in (0, 130), lines
    return shortened(lines)


def shortened(lines: list[str]) -> list[str]:
    """At most four lines of steps: the first two and the last two."""
    steps = [number for number, line in enumerate(lines) if STEP.match(line)]
    dropped = steps[2:-2]
    kept = ["..." if number in dropped[:1] else line for number, line in enumerate(lines) if number not in dropped[1:]]
    return kept if dropped else lines


def start(folder: str, arguments: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": str(COLUMNS)}
    command = [sys.executable, "-m", "meshpipe", *arguments.split()]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def still(lines: list[str], number: int) -> str:
    """One frame as a picture of a terminal."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), highlight=False)
    for line in lines:
        style = "bold green" if line.startswith("$ ") else "bold red" if line == "^C" else ""
        console.print(Text(line, style=style), overflow="fold", no_wrap=False)
    written = len(console.export_text(clear=False).splitlines())
    for _ in range(ROWS - written):
        console.print()
    return console.export_svg(title="meshpipe", theme=MONOKAI, unique_id=f"frame{number}")


def moving(frames: list[list[str]]) -> str:
    """All frames in one picture, each shown for some seconds, again and again."""
    stills = [still(lines, number) for number, lines in enumerate(frames)]
    sizes = [re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', picture) for picture in stills]
    width, height = (max(float(size[axis]) for size in sizes if size) for axis in (1, 2))
    total = SECONDS * len(stills)
    style = [
        f"@keyframes shown {{ 0% {{ opacity: 1 }} {100 / len(stills):.4g}% {{ opacity: 0 }} }}",
        f".shown {{ opacity: 0; animation: shown {total}s infinite step-end }}",
        ".shown-0 { opacity: 1 }",
        *(f".shown-{number} {{ animation-delay: {number * SECONDS}s }}" for number in range(len(stills))),
    ]
    groups = [f'<g class="shown shown-{number}">\n{picture}\n</g>' for number, picture in enumerate(stills)]
    head = f'<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">'
    return "\n".join([head, "<style>", *style, "</style>", *groups, "</svg>", ""])


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"{time.monotonic() - began:.0f} s")
