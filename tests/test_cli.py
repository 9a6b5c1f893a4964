"""The command line as a user meets it: what it prints, what it leaves behind, how it ends."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner, Result
from golden_data import GOLDEN, checkpoint, photo
from PIL import Image
from single_files import single_file

from mlxdiff.cli import ProgressBar, main
from mlxdiff.cli.progress import Bar
from mlxdiff.pictures.image import save_png
from mlxdiff.pictures.metadata import Metadata
from mlxdiff.run.progress import Progress


def run(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def texts(path: Path) -> dict[str, str]:
    """The text chunks of a PNG."""
    with Image.open(path) as picture:
        return dict(picture.text)  # type: ignore[attr-defined]


def generate(*arguments: str | Path, stdin: str | None = None) -> Result:
    return run("generate", "-m", checkpoint("sd15"), "--backend", "numpy", *arguments, stdin=stdin)


QUICK = ("--steps", "2", "-W", "32", "-H", "32")


def error_of(result: Result) -> str:
    """The one error line of a run that failed by the user's doing."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0]


def test_a_picture_is_written_and_reported(here: Path) -> None:
    result = generate("a red circle", "-s", "3", *QUICK)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("mlxdiff-3.png  seed 3  ")
    assert pixels(here / "mlxdiff-3.png").shape == (32, 32, 3)


def test_json_and_count(here: Path) -> None:
    result = generate("a", "-s", "7", "-b", "2", "-o", "x/{index}-{seed}.png", "--json", *QUICK)
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [r["path"] for r in records] == ["x/0-7.png", "x/1-8.png"]
    assert [r["seed"] for r in records] == [7, 8]
    wanted = {"path", "seed", "width", "height", "sampler", "schedule", "steps", "seconds"}
    assert all(wanted | {"peak_memory_bytes"} <= set(r) for r in records)
    assert all((here / r["path"]).is_file() for r in records)
    # Each picture of a run is the one that its seed gives alone.
    alone = generate("a", "-s", "8", "-o", "alone.png", *QUICK)
    assert alone.exit_code == 0
    assert np.array_equal(pixels(here / "x/1-8.png"), pixels(here / "alone.png"))


def test_metadata_replays_the_picture(here: Path) -> None:
    options = ("-g", "3.5", "-n", "blurry", "--schedule", "karras", "-o", "first.png")
    options += ("--guidance-interval", "0.5,1", "--feature-reuse", "2")
    assert generate('two, "words"\nSteps: 3', "-s", "5", *QUICK, *options).exit_code == 0
    again = generate("--from-image", "first.png", "-o", "second.png")
    assert again.exit_code == 0, again.output
    first, second = here / "first.png", here / "second.png"
    assert np.array_equal(pixels(first), pixels(second))
    assert texts(first) == texts(second)
    assert "Negative prompt: blurry" in texts(first)["parameters"]
    assert generate("x", "--no-metadata", "-o", "bare.png", *QUICK).exit_code == 0
    assert texts(here / "bare.png") == {}


def test_embeddings(here: Path) -> None:
    shutil.copy(GOLDEN / "prompts/cat-toy.safetensors", here / "toy.safetensors")
    result = generate("a toy", "--embedding", "toy.safetensors:toy", *QUICK, "-o", "first.png")
    assert result.exit_code == 0, result.output
    assert "Embedding toy.safetensors: 'toy' stands for 3 vectors" in result.stderr
    again = generate("--from-image", "first.png", "-o", "second.png")
    assert again.exit_code == 0, again.output
    assert np.array_equal(pixels(here / "first.png"), pixels(here / "second.png"))
    (here / "toy.safetensors").rename("moved.safetensors")
    assert "--embedding" in error_of(generate("--from-image", "first.png", "-o", "third.png"))
    given = ("--from-image", "first.png", "--embedding", "moved.safetensors:toy", "-o", "third.png")
    assert generate(*given).exit_code == 0
    assert np.array_equal(pixels(here / "first.png"), pixels(here / "third.png"))
    assert "no word" in generate("a", "--embedding", "none.pt:").stderr


def test_prompt_syntax_and_clip_skip_come_back_with_a_picture(here: Path) -> None:
    given = ("a (red:1.4) [cat|dog]", "--prompt-syntax", "a1111", "--clip-skip", "1", "-s", "3")
    assert generate(*given, *QUICK, "-o", "first.png").exit_code == 0
    again = generate("--from-image", "first.png", "-o", "second.png")
    assert again.exit_code == 0, again.output
    assert np.array_equal(pixels(here / "first.png"), pixels(here / "second.png"))
    # What A1111 drew is in its syntax.
    text = {"parameters": texts(here / "first.png")["parameters"].replace("mlxdiff", "v1.10 #")}
    save_png(Image.open("first.png"), here / "foreign.png", text)
    other = generate("--from-image", "foreign.png", "-o", "third.png")
    assert other.exit_code == 0, other.output
    assert np.array_equal(pixels(here / "first.png"), pixels(here / "third.png"))


def test_an_image_to_start_from_and_its_replay(here: Path) -> None:
    Image.fromarray(photo(40, 75)).save("photo.png")
    options = ("-i", "photo.png", "--strength", "0.5", "--steps", "4", "--sampler", "ddim")
    result = generate("a", *options, "--eta", "0.5", "-s", "1", "-o", "first.png", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["width"], record["height"]) == (72, 40)
    assert (record["image"], record["strength"], record["eta"]) == ("photo.png", 0.5, 0.5)
    assert "--image" in error_of(generate("--from-image", "first.png", "-o", "x.png"))
    again = generate("--from-image", "first.png", "-i", "photo.png", "-o", "second.png")
    assert again.exit_code == 0, again.output
    assert np.array_equal(pixels(here / "first.png"), pixels(here / "second.png"))
    assert texts(here / "first.png") == texts(here / "second.png")
    other = generate("--from-image", "first.png", "-i", "first.png", "-o", "third.png")
    assert other.exit_code == 0
    assert not np.array_equal(pixels(here / "first.png"), pixels(here / "third.png"))


def test_a_refiner_and_another_vae_and_their_replay(here: Path) -> None:
    for name, target in (("sdxl", "base"), ("sdxl-refiner", "refiner"), ("taesd", "tiny")):
        shutil.copytree(checkpoint(name), target)
    first = run(
        *("generate", "a", "-m", "base", "--refiner", "refiner", "--vae", "tiny", "-s", "1"),
        *("--denoising-end", "0.6", "--aesthetic-score", "7", "--backend", "numpy", "--json"),
        *("--steps", "5", "-W", "32", "-H", "32", "-o", "first.png"),
    )
    assert first.exit_code == 0, first.output
    record = json.loads(first.stdout)
    assert (record["vae"], record["refiner"], record["aesthetic_score"]) == ("tiny", "refiner", 7.0)
    again = run("generate", "--from-image", "first.png", "--backend", "numpy", "-o", "second.png")
    assert again.exit_code == 0, again.output
    assert np.array_equal(pixels(here / "first.png"), pixels(here / "second.png"))
    assert texts(here / "first.png") == texts(here / "second.png")
    alone = ("generate", "a", "-m", "refiner", "--backend", "numpy", "--steps", "4")
    assert "--image" in error_of(run(*alone))
    result = run(*alone, "-i", "first.png", "-s", "1", "-o", "alone.png")
    assert result.exit_code == 0, result.output
    again = run(
        *("generate", "--from-image", "alone.png", "-i", "first.png", "--backend", "numpy"),
        *("-o", "alone-again.png"),
    )
    assert again.exit_code == 0, again.output
    assert np.array_equal(pixels(here / "alone.png"), pixels(here / "alone-again.png"))


@pytest.mark.parametrize(
    "extra", [{"strength": "much"}, {"crop": [1]}, {"crop": [0.5, 1]}, {"vae": 3}]
)
def test_metadata_that_is_no_settings_is_refused(here: Path, extra: dict[str, object]) -> None:
    save_png(photo(32, 32), "x.png", Metadata(prompt="a", extra=extra).chunks())
    assert next(iter(extra)) in error_of(generate("--from-image", "x.png", "-o", "y.png"))


def test_a_download_is_shown_as_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("fetching", quiet=False) as progress:
        assert progress is not None
        for done in range(0, 101, 10):
            progress(done, 100, "unet/model.safetensors")
    said = capsys.readouterr().err
    assert "fetching" in said and said.count("\n") <= 1
    with ProgressBar("fetching", quiet=True) as progress:
        assert progress is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_progress_fits_the_terminal(
    columns: int, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that is written again; it never wraps, and nothing of it stays."""
    seen = Terminal()
    monkeypatch.setattr("sys.stderr", seen)
    monkeypatch.setattr("mlxdiff.cli.streams.width", lambda: columns)
    bar = Bar(pictures=2)
    for stage, item in (("load", "text_encoder"), ("encode", "")):
        bar.on_progress(Progress(stage, item))
    for index in range(3):
        bar.on_progress(Progress("step", seconds_left=5.0 - index))
        step = SimpleNamespace(index=index, total=3, seed=2**63, seconds=1.25)
        bar.advance(step, 0)  # type: ignore[arg-type]
    bar.on_progress(Progress("decode"))
    bar.finish()
    with ProgressBar("fetching", quiet=False) as progress:
        assert progress is not None
        for done in (0, 50, 100):
            progress(done, 100, "text_encoder/model-00001-of-00002.fp16.safetensors")
    said = seen.getvalue()
    assert "\n" not in said and all(len(one) < columns for one in said.split("\r"))
    assert said.rstrip(" \r") != said and not said.split("\r")[-1]  # cleared
    for words in (
        "loading text encoder",
        "encoding",
        "picture 1 of 2, seed",
        "decoding",
        "fetching",
    ):
        assert words in said
    if columns == 200:
        assert "step 2 of 3, 1.25 s each, 0:04 left" in said and "[####" in said
        assert "50 %" in said and "left  text_encoder/model" in said


def test_an_unfinished_line_of_progress_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Terminal()
    monkeypatch.setattr("sys.stderr", seen)
    bar = Bar()
    bar.advance(SimpleNamespace(index=0, total=3, seed=7, seconds=1.0), 0)  # type: ignore[arg-type]
    bar.finish()
    assert seen.getvalue().endswith("step 1 of 3, 1.00 s each\n")


def test_prompt_file_and_stdin(here: Path) -> None:
    (here / "prompts.txt").write_text("a red circle\n\na blue square\n", encoding="utf-8")
    result = generate("--prompt-file", "prompts.txt", "-s", "1", *QUICK)
    assert result.exit_code == 0, result.output
    assert (here / "mlxdiff-1-0.png").is_file() and (here / "mlxdiff-1-1.png").is_file()
    result = generate("--prompt-file", "-", "-s", "2", *QUICK, stdin="only one\n")
    assert result.exit_code == 0, result.output
    assert (here / "mlxdiff-2.png").is_file()


def test_a_long_prompt_is_cut_with_a_note(here: Path) -> None:
    result = generate("circle " * 90 + "square", "-s", "1", *QUICK)
    assert result.exit_code == 0
    assert "Note: " in result.stderr and "square" in result.stderr


def test_words_unknown_to_the_built_in_model_are_noted_once(here: Path) -> None:
    (here / "prompts.txt").write_text("a red horse\na red circle on the moon\n", encoding="utf-8")
    result = run("generate", "--prompt-file", "prompts.txt", "-n", "ugly", "-s", "1", *QUICK)
    assert result.exit_code == 0, result.output
    notes = [line for line in result.stderr.splitlines() if line.startswith("Note: ")]
    assert sum("knows only these words" in note for note in notes) == 1
    for word in ("horse", "ugly", "moon"):
        assert sum(f"does not know '{word}'" in note for note in notes) == 1
    own = ("-W", "64", "-H", "64")
    assert run("generate", "a red circle", "-s", "2", *QUICK, *own).stderr.count("Note: ") == 0


def test_what_has_no_effect_is_noted(here: Path) -> None:
    result = generate("a", "-n", "b", "-g", "1", "-s", "1", *QUICK)
    assert result.exit_code == 0
    assert "Note: --negative-prompt has no effect" in result.stderr


def test_unseeded_pictures_tell_their_seed(here: Path) -> None:
    result = generate("a", "--json", *QUICK)
    seed = json.loads(result.stdout)["seed"]
    assert (here / f"mlxdiff-{seed}.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "no prompt"),
        (("a", "-p", "b"), "PROMPT and --prompt"),
        (("a", "-W", "33"), "nearest: 32 or 40"),
        (("a", "-H", "0"), "height 0"),
        (("a", "--steps", "0"), "steps"),
        (("a", "--steps", "2000"), "steps"),
        (("a", "--count", "0"), "--count"),
        (("a", "-g", "nan"), "guidance"),
        (("a", "--guidance-rescale", "2"), "--guidance-rescale"),
        (("a", "--guidance-interval", "0.5"), "START,END"),
        (("a", "--guidance-interval", "0,0.01"), "--guidance-interval"),
        (("a", "--feature-reuse", "0"), "--feature-reuse"),
        (("a", "--sampler", "best"), "dpmpp-2m"),
        (("a", "--schedule", "best"), "karras"),
        (("a", "--prompt-2", "b"), "no second text encoder"),
        (("a", "--original-size", "512"), "HxW"),
        (("a", "--dtype", "int4"), "float32"),
        (("a", "--backend", "cuda"), "numpy"),
        (("a", "-o", "x.gif"), ".webp"),
        (("a", "-o", "{name}.png"), "{seed}"),
        (("a", "-o", "{.png"), "--output"),
        (("a", "-b", "2", "-o", "x.png"), "{index}"),
        (("--prompt-file", "none.txt"), "none.txt"),
        (("--from-image", "none.png"), "none.png"),
        (("a", "--lora", "x"), "--lora"),
        (("a", "--strength", "0.5"), "--image"),
        (("a", "-i", "none.png"), "none.png"),
        (("a", "--eta", "0.5"), "ddim"),
        (("a", "--denoising-end", "0.5"), "SDXL"),
        (("a", "--aesthetic-score", "5"), "SDXL"),
        (("a", "--refiner", checkpoint("sdxl")), "SDXL"),
        (("a", "--vae", "none"), "none"),
        (("a", "--vae", checkpoint("sd15") / "unet"), "not a VAE"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    here: Path, arguments: tuple[str, ...], says: str
) -> None:
    assert says in error_of(generate(*arguments))
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("model", ["none", "some/where/else", "empty", "file.bin"])
def test_a_model_that_is_none(here: Path, model: str) -> None:
    (here / "empty").mkdir()
    (here / "file.bin").write_bytes(b"\x00" * 64)
    assert model in error_of(run("generate", "-m", model, "a"))


def test_an_existing_file_is_not_overwritten(here: Path) -> None:
    (here / "x.png").write_text("mine")
    assert "--force" in error_of(generate("a", "-o", "x.png", *QUICK))
    assert (here / "x.png").read_text() == "mine"
    assert generate("a", "-o", "x.png", "--force", *QUICK).exit_code == 0


def test_convert_info_and_generate_from_the_converted_folder(here: Path) -> None:
    result = run("convert", checkpoint("sd15"), "converted", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "converted" in result.stdout
    facts = json.loads(run("info", "converted", "--json").stdout)
    assert facts["family"] == "sd1"
    assert facts["kind"] == "converted"
    assert facts["components"]["unet"]["bits_per_weight"] == 32
    assert 0 < facts["memory"]["peak_bytes_low_memory"] <= facts["memory"]["peak_bytes"]
    assert "float32" in run("info", "converted").stdout.lower() or "F32" in json.dumps(facts)
    drawn = [
        run("generate", "a", "-m", m, "-s", "1", "--backend", "numpy", "-o", f"{i}.png", *QUICK)
        for i, m in enumerate((checkpoint("sd15"), "converted"))
    ]
    assert [d.exit_code for d in drawn] == [0, 0]
    assert np.array_equal(pixels(here / "0.png"), pixels(here / "1.png"))
    assert "exists" in error_of(run("convert", checkpoint("sd15"), "converted"))
    facts = json.loads(run("info", "0.png", "--json").stdout)
    assert facts["prompt"] == "a" and facts["seed"] == 1


def test_a_single_file_is_described_converted_and_drawn_with(here: Path) -> None:
    folder = checkpoint("sd15")
    path = single_file(folder, here / "my_model.safetensors")
    facts = json.loads(run("info", path, "--config", folder, "--json").stdout)
    assert (facts["kind"], facts["family"]) == ("single file", "sd1")
    result = run("convert", path, "out", "--config", folder, "--prediction-type", "v_prediction")
    assert result.exit_code == 0, result.output
    said = run("info", "out").stdout
    assert "prediction type: v_prediction" in said
    assert "my_model.safetensors: " in said  # a file's name stays as it is
    drawing = ("generate", "a", "-s", "1", "--backend", "numpy", *QUICK)
    assert run(*drawing, "-m", path, "--config", folder, "-o", "0.png").exit_code == 0
    assert run(*drawing, "-m", folder, "-o", "1.png").exit_code == 0
    assert np.array_equal(pixels(here / "0.png"), pixels(here / "1.png"))


def test_debug_shows_the_traceback(here: Path) -> None:
    result = run("generate", "-m", "none", "a", "--debug")
    assert result.exception is not None and not isinstance(result.exception, SystemExit)


def command(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mlxdiff", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing(here: Path, number: signal.Signals, code: int) -> None:
    process = command(
        *("generate", "a", "-m", str(checkpoint("sd15")), "--backend", "numpy"),
        *("--steps", "900", "-o", "x.png"),
        cwd=here,
    )
    assert process.stderr is not None
    assert any("seed" in line for line in process.stderr)  # the first step is done
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Interrupted" in stderr and "Traceback" not in stderr
    assert list(here.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_a_reader_that_leaves_early_sees_no_error(here: Path) -> None:
    process = command("info", str(checkpoint("sd15")), cwd=here)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait(timeout=60)


def test_help_names_the_commands_and_imports_nothing_heavy(here: Path) -> None:
    code = (
        "import sys; from mlxdiff.cli import main; main(['--help'], standalone_mode=False);"
        "print(sorted({'numpy', 'mlx', 'PIL', 'huggingface_hub', 'tokenizers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "generate" in out.stdout and "convert" in out.stdout
    assert out.stdout.splitlines()[-1] == "[]"


def test_every_option_of_generate_stands_in_one_section() -> None:
    from mlxdiff.cli.generate import generate
    from mlxdiff.cli.options import TABLES, TableOption
    from mlxdiff.run.options import SECTIONS
    from mlxdiff.run.table import entries

    own = {p.name: p.section for p in generate.params if isinstance(p, TableOption)}
    assert set(own.values()) == set(SECTIONS)
    assert set(own) == {e.name for t in TABLES for e in entries(t).values() if e.flags}
    text = run("generate", "--help").output
    assert [line[:-1] for line in text.splitlines() if line in {f"{s}:" for s in SECTIONS}] == list(
        SECTIONS
    )


def test_long_loading_is_announced(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "loading" not in generate("a", "-s", "1", *QUICK).stderr
    monkeypatch.setattr("mlxdiff.run.network_cache._LONG_TO_LOAD", 0)
    lines = generate("a", "-s", "2", *QUICK).stderr.splitlines()
    found = [line for line in lines if line.startswith("loading ")]
    assert [line.split(",")[0] for line in found] == [
        "loading text_encoder",
        "loading unet",
        "loading vae",
    ]
    assert "GPU" not in "".join(found)
    assert "loading" not in generate("a", "-s", "3", "--quiet", *QUICK).stderr
    monkeypatch.setattr("mlxdiff.backends.numpy.NumPyBackend.has_gpu", staticmethod(lambda: True))
    result = generate("a", "-s", "4", "--backend", "numpy", *QUICK)
    assert "its first use compiles kernels for the GPU" in result.stderr
