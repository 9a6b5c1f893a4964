"""Faults: signals, killed processes, full and closed outputs. Nothing finished is lost, nothing is
half-written, no leftover stays after one more run.

pytest -m slow tests/test_faults.py      the whole table: stage x signal x 30 moments
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import lora_files
import pytest
from folders import wide
from golden_data import checkpoint
from PIL import Image
from single_files import single_file

import mlxdiff.convert
from mlxdiff.cli import convert as _convert  # noqa: F401 - imported before the processes fork
from mlxdiff.cli import main
from mlxdiff.machine import stopping
from mlxdiff.machine.temporary import FILES, is_abandoned, remove_leftovers, temporary_file
from mlxdiff.store.folder import open_folder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a system that forks")

SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGKILL": -9}
DRAW = ("generate", "a cat", "-m", str(checkpoint("sd15")), "--backend", "numpy", "-s", "3")
DRAW += ("-W", "32", "-H", "32", "--steps", "3", "-b", "4", "--quiet")
STAGES = {
    "draw": (*DRAW, "-o", "p-{seed}.png"),
    "low memory": (*DRAW, "-o", "p-{seed}.png", "--low-memory"),
    "preview": (*DRAW, "-o", "p-{seed}.png", "--preview"),
    "convert": ("convert", str(checkpoint("sd15")), "dest", "--quiet"),
}


def started(folder: Path, arguments: tuple[str, ...]) -> int:
    """Run a command in a fork of this process, which has all modules; return its process id."""
    ready = folder.with_suffix(".ready")
    ready.unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        while not ready.exists():
            time.sleep(0.002)
        return pid
    code = 99
    try:
        os.chdir(folder)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(
                number,
                signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL,
            )
        for name, stream in (("out", 1), ("err", 2)):
            path = folder.with_suffix(f".{name}")
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", closefd=False)
        stopping.own_process()
        ready.touch()
        main.main(list(arguments), prog_name="mlxdiff")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def said(folder: Path, name: str) -> str:
    return folder.with_suffix(f".{name}").read_text()


def pictures(folder: Path) -> list[Path]:
    """The finished pictures of a folder, each of which is whole."""
    found = sorted(p for p in folder.glob("p-*.png") if not p.stem.endswith("-preview"))
    for path in found:
        with Image.open(path) as picture:
            picture.load()
    return found


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def fault(folder: Path, stage: str, name: str, moment: float, again: int) -> Counter[str]:
    """Send a signal to a command, several times quickly; check what is left; run it once more."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pid = started(folder, STAGES[stage])
    time.sleep(moment)
    number = getattr(signal, name)
    os.kill(pid, number)
    for _ in range(again):
        time.sleep(random.uniform(0, 0.004))
        os.kill(pid, number)
    code = wait(pid)
    out, err = said(folder, "out"), said(folder, "err")
    assert "Traceback" not in err and "fault of mlxdiff" not in err, err
    assert code in (0, SIGNALS[name]), (code, err)
    reported = len(out.splitlines()) if stage != "convert" else 0
    there = len(pictures(folder))
    assert there >= reported
    if code not in (0, -9):
        assert leftovers(folder) == [], f"{stage}, {name} after {moment:.3f} s: {err}"
        assert "no partial files remain" in err or err == ""  # it only started
        if found := re.search(r"(\d+) of 4 pictures are saved", err):
            assert int(found[1]) == there == reported
    if (folder / "dest").exists():
        open_folder(folder / "dest").verify()
    # One more run removes what a killed process has left.
    more = (*STAGES[stage], "--force")
    if stage == "preview":
        for path in folder.glob("*-preview.png"):
            assert code != 0, path
    assert wait(started(folder, more)) == 0, said(folder, "err")
    assert leftovers(folder) == []
    if stage != "convert":
        assert len(pictures(folder)) == 4
        if name == "SIGKILL":
            assert not list(folder.glob("*-preview.png"))
    return Counter({f"{stage} {name} rc {code} {there} saved": 1})


@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_at_some_moments(stage: str, tmp_path: Path) -> None:
    """One handler serves all signals that can be handled; the slow table has each at each stage."""
    draw = random.Random(stage)
    for name in SIGNALS if stage in ("draw", "convert") else ("SIGTERM", "SIGKILL"):
        fault(tmp_path / "x", stage, name, draw.uniform(0.05, 0.6), again=draw.choice([0, 4]))


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_table_of_signals(stage: str, name: str, tmp_path: Path) -> None:
    draw, found = random.Random(f"{stage} {name}"), Counter[str]()
    longest = 0.9 if stage == "convert" else 1.5
    for _ in range(30):
        moment, again = draw.uniform(0.0, longest), draw.choice([0, 0, 1, 4])
        found += fault(tmp_path / "x", stage, name, moment, again)
    print(dict(found))


def test_finished_pictures_of_an_interrupted_count_are_kept(tmp_path: Path) -> None:
    """Case 09 of the public reports."""
    folder = tmp_path / "x"
    folder.mkdir()
    pid = started(folder, STAGES["draw"])
    while not (folder / "p-4.png").exists():
        time.sleep(0.005)
    os.kill(pid, signal.SIGINT)
    assert wait(pid) == 130
    saved = len(pictures(folder))
    assert 2 <= saved < 4
    assert f"{saved} of 4 pictures are saved" in said(folder, "err")


INTERRUPT_AT_IMPORT = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs in the background
moment, sys.argv = sys.argv[1], ["mlxdiff", "info"]

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == moment:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
runpy.run_module("mlxdiff", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "moment", ["mlxdiff.machine.stopping", "mlxdiff.cli", "click", "mlxdiff.cli.info"]
)
def test_ctrl_c_while_the_command_starts_is_silent(moment: str) -> None:
    """What comes before the first line of mlxdiff (Python's own start) is Python's to report."""
    run = [sys.executable, "-c", INTERRUPT_AT_IMPORT, moment]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (130, "", "")


# ------------------------------------------------------------------------------ outputs and folders


def command(folder: Path, *arguments: str, **how: object) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "mlxdiff", *DRAW, *arguments]
    return subprocess.run(run, cwd=folder, stderr=subprocess.PIPE, text=True, **how)  # type: ignore[call-overload,no-any-return]


def test_a_closed_standard_output_loses_no_picture(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    found = command(tmp_path, "-o", "p-{seed}.png", stdout=writer)
    assert len(pictures(tmp_path)) == 4
    assert found.returncode == 1 and found.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a system with /dev/full")
def test_a_full_standard_output_loses_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # what is buffered fails once more
    with open("/dev/full", "w") as full:
        found = command(tmp_path, "-o", "p-{seed}.png", stdout=full)
    assert len(pictures(tmp_path)) == 4
    assert found.returncode == 2
    assert "4 of 4 pictures are saved" in found.stderr and found.stderr.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a system with /dev/full")
@pytest.mark.parametrize("asked", [["--version"], ["--help"], ["generate", "--help"]])
def test_a_full_standard_output_of_help_is_said(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    run = [sys.executable, "-m", "mlxdiff", *asked]
    with open("/dev/full", "w") as full:
        found = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, text=True)
    assert found.returncode == 2
    assert found.stderr == "Error: No space left on device\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a system with /dev/full")
def test_a_lost_standard_error_loses_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    run = [sys.executable, "-m", "mlxdiff", *DRAW[:-1], "-o", "p-{seed}.png", "--preview"]
    with open("/dev/full", "w") as full:
        found = subprocess.run(run, cwd=tmp_path, stderr=full, stdout=subprocess.PIPE)
    assert found.returncode == 0 and len(pictures(tmp_path)) == 4


def test_names_that_standard_output_cannot_hold(tmp_path: Path) -> None:
    """A case of the public reports: a standard output in cp1252."""
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    found = command(tmp_path, "-o", "p-狐-{seed}.png", stdout=subprocess.PIPE, env=environment)
    assert found.returncode == 0, found.stderr
    assert len(pictures(tmp_path)) == 4 and r"p-\u72d0-3.png" in found.stdout


def in_process(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    from click.testing import CliRunner

    monkeypatch.chdir(folder)
    result = CliRunner().invoke(main, [*DRAW, *arguments])
    return result.exit_code, result.stderr


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_without_the_right_to_write_is_found_before_drawing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setattr("mlxdiff.run.drawing.Run.pictures", None)
    code, error = in_process(tmp_path, monkeypatch, "-o", "closed/p-{seed}.png")
    assert code == 2 and "closed: cannot be written to" in error


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="a folder that nobody can write to")
def test_a_folder_that_nobody_can_write_to_is_found_before_drawing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxdiff.run.drawing.Run.pictures", None)
    code, error = in_process(tmp_path, monkeypatch, "-o", "/proc/p-{seed}.png")
    assert code == 2 and "/proc: cannot be written to" in error


def test_a_picture_that_cannot_be_written_goes_to_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxdiff.errors import UsageError
    from mlxdiff.pictures import image

    own, rescue = image.write_bytes, tmp_path / "temporary"
    rescue.mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(rescue))

    def full(data: bytes, path: Path, overwrite: bool = False) -> None:
        if path.name == "p-5.png" and path.parent != rescue:
            raise UsageError(f"{path}: cannot be written (No space left on device)")
        own(data, path, overwrite)

    monkeypatch.setattr(image, "write_bytes", full)
    code, error = in_process(tmp_path, monkeypatch, "-o", "p-{seed}.png")
    assert code == 2, error
    assert [path.name for path in pictures(tmp_path)] == ["p-3.png", "p-4.png"]
    assert [path.name for path in pictures(rescue)] == ["p-5.png"]
    assert f"the picture is in {rescue / 'p-5.png'}" in error
    assert "3 of 4 pictures are saved" in error


def test_a_preview_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxdiff.cli.preview import Preview

    def fails(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Preview, "_write", fails)
    code, _ = in_process(tmp_path, monkeypatch, "-o", "p-{seed}.png", "--preview")
    assert code == 0 and len(pictures(tmp_path)) == 4


def test_default_names_are_numbered_and_explicit_ones_strict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        assert in_process(tmp_path, monkeypatch, "-b", "1")[0] == 0
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == ["mlxdiff-3.png", "mlxdiff-3_2.png"]
    code, error = in_process(tmp_path, monkeypatch, "-b", "1", "-o", "mlxdiff-3.png")
    assert code == 2 and "already exists" in error
    code, error = in_process(tmp_path, monkeypatch, "-o", "{date}/{model}-{prompt}-{seed:04d}.png")
    assert code == 0, error
    assert (tmp_path / time.strftime("%Y-%m-%d") / "checkpoint-a-cat-0004.png").is_file()


# ------------------------------------------------------------------------------- conversions, locks


def test_a_source_that_is_replaced_is_one_model_or_an_error(tmp_path: Path) -> None:
    """A file is replaced at each stage: after opening, after hashing, while tensors are written."""
    from mlxdiff.errors import CheckpointError

    file = "unet/diffusion_pytorch_model.safetensors"
    source, other = tmp_path / "m", tmp_path / "other"
    for stage in ("reading text_encoder", "reading unet", "unet/"):
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(checkpoint("sd15"), source)
        data = bytearray((source / file).read_bytes())
        other.write_bytes(data[:-64] + bytes(64))

        def replace(done: int, total: int, item: str, stage: str = stage) -> None:
            if other.exists() and item.startswith(stage):
                os.replace(other, source / file)

        with pytest.raises(CheckpointError, match=f"{file}: changed while it was converted"):
            mlxdiff.convert.convert(source, tmp_path / "out", progress=replace)
        assert not other.exists() and not (tmp_path / "out").exists() and leftovers(tmp_path) == []


@pytest.mark.parametrize("other", ["tokenizer/vocab.json", "x.yaml", "lora.safetensors"])
def test_what_is_read_beside_a_model_may_not_change(other: str, tmp_path: Path) -> None:
    from mlxdiff.errors import CheckpointError
    from mlxdiff.run.baking import Baking

    change, source = None, tmp_path / "x.safetensors"
    if other == "lora.safetensors":
        source = checkpoint("sd15")
        os.replace(lora_files.write("sd15-kohya", tmp_path), tmp_path / other)
        change = Baking([tmp_path / other])
    else:
        folder = wide(tmp_path / "folder")
        single_file(folder, source)
        shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
        (tmp_path / "x.yaml").write_text("model:\n  params:\n    linear_start: 0.00085\n")

    def touch(done: int, total: int, item: str) -> None:
        (tmp_path / other).write_bytes((tmp_path / other).read_bytes())

    with pytest.raises(CheckpointError, match=f"{other}: changed while it was converted"):
        mlxdiff.convert.convert(source, tmp_path / "out", change=change, progress=touch)
    assert not (tmp_path / "out").exists() and leftovers(tmp_path) == []
    mlxdiff.convert.convert(source, tmp_path / "out", change=change)
    open_folder(tmp_path / "out").verify()


def test_leftovers_go_and_files_in_use_stay(tmp_path: Path) -> None:
    stale = tmp_path / ".mlxdiff-0123456789abcdef.tmp"
    stale.write_bytes(b"half a pic")
    (tmp_path / ".mlxdiff-notes.tmp").write_bytes(b"mine")
    with temporary_file(tmp_path) as (path, _):
        assert is_abandoned(stale) is True
        remove_leftovers(tmp_path, FILES)
        assert path.exists() and not stale.exists()
    assert leftovers(tmp_path) == [".mlxdiff-notes.tmp"]


def test_a_folder_that_a_killed_run_had_put_aside_comes_back(tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    mlxdiff.convert.convert(checkpoint("sd15"), dest)
    dest.rename(tmp_path / ".dest.0123abcd.old")
    with pytest.raises(Exception, match="exists"):
        for _ in range(2):  # the first brings it back, for which it needs no force
            mlxdiff.convert.convert(checkpoint("sd15"), dest)
    open_folder(dest).verify()
    assert leftovers(tmp_path) == []
