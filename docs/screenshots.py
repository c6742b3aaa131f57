"""Make the pictures of docs/start/pictures: terminal, TensorBoard and report of three small runs.

    python docs/screenshots.py [FOLDER]

FOLDER (default: runs/screenshots) keeps the runs, so that a second call only takes the pictures.
Needs `chromium` (its name or path in $CHROMIUM), and takes about ten minutes on two CPU cores.
"""

import contextlib
import fcntl
import html
import os
import pty
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import termios
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

PICTURES = Path(__file__).resolve().parent / "start" / "pictures"
CONNECTIONS = ("residual", "hc", "mhc")
COLUMNS = 100
PROGRAM = [sys.executable, "-m", "mhc_lightning"]
SETTINGS = [
    *("model.dim=64", "model.num_layers=8", "model.ffn_dim=128", "data.sequence_length=128"),
    *("trainer.max_steps=200", "trainer.val_check_interval=50", "trainer.log_every_n_steps=5"),
    "optimizer.warmup_steps=20",
]


def main(folder: Path) -> None:
    """Run what is missing, and take every picture."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    library = Path(sysconfig.get_path("stdlib"))
    texts = [f"input={library / name}" for name in ("json", "email")]
    subprocess.run(
        [*PROGRAM, "prepare", "--config", "mhc_quickstart", *texts, "output=data/mine"], check=True
    )
    for connection in CONNECTIONS:
        terminal = Path(f"terminal_{connection}.txt")
        if not terminal.exists():
            words = [f"output_dir=runs/{connection}", f"connection={connection}"]
            words = ["fit", "--config", "mhc_quickstart", "data.path=data/mine", *words]
            screen = screen_of([*PROGRAM, *words, *SETTINGS, "overwrite=true"])
            shown = shlex.join(["python", "-m", "mhc_lightning", *words])
            terminal.write_text(f"$ {shown} …\n{screen}", encoding="utf-8")
    runs = [f"runs/{connection}" for connection in CONNECTIONS]
    subprocess.run([*PROGRAM, "report", *runs, "output=report"], check=True)
    photograph_terminal(Path("terminal_mhc.txt"))
    photograph(Path("report/index.html").resolve().as_uri(), "report.png", 1200, 900)
    with tensorboard() as address:
        photograph(f"{address}/#custom_scalars", "tensorboard.png", 1280, 860, seconds=60)


def screen_of(command: list[str]) -> str:
    """What a terminal shows at the end of a command."""
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe(command[0], command, {**os.environ, "TERM": "xterm", "COLUMNS": str(COLUMNS)})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    output = b""
    with contextlib.suppress(OSError):  # how a terminal says that its program has ended
        while part := os.read(terminal, 1 << 16):
            output += part
    os.waitpid(process, 0)
    return final_screen(output.decode())


def final_screen(output: str) -> str:
    """Lines as they stand after carriage returns and moves up by a line."""
    lines: list[str] = [""]
    row = column = 0
    for part in output.replace("\x1b[A", "\x00"):
        if part == "\r":
            column = 0
        elif part == "\x00":
            row = max(0, row - 1)
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + 1 :]
            column += 1
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def photograph_terminal(text: Path) -> None:
    """A picture of lines of text, light on dark."""
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    style = (
        "margin:0;padding:16px;background:#1e2129;color:#e6e6e6;"
        "font:14px/1.5 'DejaVu Sans Mono',monospace;white-space:pre-wrap"
    )
    page = Path("terminal.html").resolve()
    body = html.escape("\n".join(lines))
    page.write_text(f'<meta charset="utf-8"><body style="{style}">{body}', encoding="utf-8")
    height = 32 + 21 * sum(1 + len(line) // (COLUMNS + 5) for line in lines)
    photograph(page.as_uri(), "terminal.png", 930, height)


def photograph(address: str, name: str, width: int, height: int, seconds: int = 5) -> None:
    """A picture of a page in a window of this size."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or "chromium"
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update"),
                *("--disable-sync", "--hide-scrollbars", f"--user-data-dir={profile}"),
                *(f"--window-size={width},{height}", f"--virtual-time-budget={1000 * seconds}"),
                *(f"--screenshot={PICTURES / name}", address),
            ],
            check=True,
            capture_output=True,
        )
    print(f"{PICTURES / name}: {(PICTURES / name).stat().st_size / 1000:.0f} kB")


@contextlib.contextmanager
def tensorboard() -> Iterator[str]:
    """TensorBoard on the runs, while the context lasts; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = str(Path(sys.executable).with_name("tensorboard"))
    command = [program, "--logdir", "runs", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            with contextlib.suppress(OSError), urllib.request.urlopen(address):
                break
            time.sleep(1)
        time.sleep(15)  # until it has read the runs
        yield address
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/screenshots"))
