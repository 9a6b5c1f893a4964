"""Many pictures from one command: lines, axes, sheets, presets, wildcards, folders, resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import checkpoint, photo
from PIL import Image
from test_cli import QUICK, error_of, generate, pixels, run, texts

from mlxdiff.batch import grid, presets, resume
from mlxdiff.batch.jobs import Job, check_axes, expand, read_axis, share, singly
from mlxdiff.batch.lines import Line, pictures_in, read_lines, with_folders
from mlxdiff.batch.wildcards import Wildcards
from mlxdiff.errors import UsageError
from mlxdiff.pictures.metadata import Metadata


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and a folder of settings of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXDIFF_CONFIG", str(tmp_path / "settings"))
    return tmp_path


# ------------------------------------------------------------------------------------------- lines


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("a cat", {"prompt": "a cat"}),
        ("{red|blue} cat", {"prompt": "{red|blue} cat"}),
        ('{"prompt": "a", "steps": 3}', {"prompt": "a", "steps": 3}),
        ('{"prompt": "a", "cfg_scale": 3}', {"prompt": "a", "guidance": 3.0}),
        ('{"loras": ["a.pt:0.5", ["b.pt", 2]]}', {"loras": (("a.pt", 0.5), ("b.pt", 2))}),
        ('{"original_size": [64, 32]}', {"original_size": (64, 32)}),
        ('--prompt "a cat" --steps 3', {"prompt": "a cat", "steps": 3}),
        (
            '--sampler_name "DPM++ 2M" --batch_size 2 --sd_model x.safetensors',
            {"sampler": "dpmpp-2m", "count": 2, "model": "x.safetensors"},
        ),
        ("--lora a.pt:0.5 --lora b.pt", {"loras": (("a.pt", 0.5), "b.pt")}),
        ("--guess-mode --control-scale 0.5", {"guess_mode": True, "control_scale": 0.5}),
        ("--guess_mode false", {"guess_mode": False}),
    ],
)
def test_a_line(line: str, options: dict[str, Any]) -> None:
    assert read_lines(line, "x") == [Line(options, "x, line 1")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": }', "is not JSON"),
        ('{"stepps": 3}', "did you mean steps?"),
        ('{"steps": 0}', "steps is 0"),
        ('{"steps": 3, "num_inference_steps": 4}', "given twice"),
        ('{"backend": "mlx"}', "give it on the command line (--backend)"),
        ("--prompt a cat", "'cat' belongs to no option"),
        ("--steps", "has no value"),
        ("--steps x", "whole number"),
        ('--prompt "a', "put quotes around"),
        ("--restore_faces true", "no option '--restore_faces'"),
        ("--batch_size 2 --n_iter 3", "count is given twice"),
        ("--guess-mode yes", "expected true or false"),
    ],
)
def test_a_line_that_is_wrong(line: str, says: str) -> None:
    (found,) = read_lines(line, "x")
    assert found.fault is not None and says in str(found.fault)


def test_lines_are_those_of_an_editor() -> None:
    text = "\ufeffone\r\n\n# a comment\ntwo\u2028still two\r"
    assert [(one.options["prompt"], one.place) for one in read_lines(text, "f")] == [
        ("one", "f, line 1"),
        ("two\u2028still two", "f, line 4"),
    ]


def test_a_folder_of_pictures(here: Path) -> None:
    folder = here / "in"
    folder.mkdir()
    with pytest.raises(UsageError, match="holds no picture"):
        pictures_in(folder)
    for name in ("b.png", "a.JPG", ".hidden.png", "notes.txt"):
        (folder / name).write_bytes(b"")
    lines = with_folders([Line({"prompt": "x"}, "p, line 1")], {"image": str(folder)})
    assert [Path(one.options["image"]).name for one in lines] == ["a.JPG", "b.png"]
    assert lines[0].place == "p, line 1: a.JPG"
    (bad,) = with_folders([Line({"image": str(here)}, "p, line 2")], {})
    assert bad.fault is not None


# -------------------------------------------------------------------------------------- expansion


def test_every_line_with_every_value() -> None:
    axes = [read_axis("steps=2,4"), read_axis('guidance_interval="0,0.5","0.2,1"')]
    lines = [Line({"prompt": "a"}), Line({"prompt": "b", "seed": 9})]
    jobs = expand({"count": 2, "steps": 7}, 5, lines, axes)
    assert len(jobs) == 8 and [job.first for job in jobs] == list(range(0, 16, 2))
    assert [job.options["steps"] for job in jobs[:4]] == [2, 2, 4, 4]
    assert jobs[1].options["guidance_interval"] == (0.2, 1.0)
    assert jobs[0].seeds == [5, 6] and jobs[4].seeds == [9, 10]
    assert jobs[1].labels == ("2", "0.2,1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps", "expected NAME=A,B,C"),
        ("steps=", "expected NAME=A,B,C"),
        ("stepps=1", "did you mean steps?"),
        ("steps=1,x", "whole number"),
        ("backend=mlx,numpy", "--backend"),
    ],
)
def test_an_axis_that_is_none(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_axis(text)


def test_at_most_two_axes() -> None:
    steps, seeds = read_axis("steps=1,2"), read_axis("seed=1,2")
    check_axes([steps, seeds])
    with pytest.raises(UsageError, match="at most 2"):
        check_axes([steps, seeds, read_axis("guidance=1")])
    with pytest.raises(UsageError, match="varies twice"):
        check_axes([steps, steps])


def test_processes_share_all_pictures_each_once() -> None:
    jobs = expand({"count": 3}, 5, [Line({"prompt": "a"}), Line({"prompt": "b"})])
    whole = {(one.first, one.seeds[0], one.options["prompt"]) for one in singly(jobs)}
    shares = [
        {(one.first, one.seeds[0], one.options["prompt"]) for one in share(jobs, rank, 2)}
        for rank in range(2)
    ]
    assert shares[0] | shares[1] == whole and not shares[0] & shares[1]
    assert len(shares[0]) == len(shares[1]) == 3


def test_a_preset_stands_behind(here: Path) -> None:
    folder = here / "settings" / "presets"
    folder.mkdir(parents=True)
    (folder / "ink.toml").write_text(
        'prompt = "{prompt}, ink"\nsteps = 9\ncfg-scale = 3\nloras = [["a.pt", 0.5], "b.pt"]\n'
    )
    preset = presets.read_preset("ink")
    assert preset["loras"] == (("a.pt", 0.5), "b.pt") and preset["guidance"] == 3.0
    (job,) = expand({"steps": 2}, 1, [Line({"prompt": "a cat"})], (), preset)
    assert job.options["prompt"] == "a cat, ink" and job.options["steps"] == 2
    with pytest.raises(UsageError, match="there are ink"):
        presets.read_preset("oil")
    for text, says in (("steps = ", "not TOML"), ("stepps = 1", "steps"), ("steps = 0", "steps")):
        (folder / "bad.toml").write_text(text)
        with pytest.raises(UsageError, match=says):
            presets.read_preset(str(folder / "bad.toml"))


# -------------------------------------------------------------------------------------- wildcards


def test_wildcards_are_chosen_by_the_seed(here: Path) -> None:
    (here / "animals").mkdir()
    (here / "animals" / "small.txt").write_text("# a comment\na cat\n{a dog|a fox}\n")
    words = Wildcards(here)
    text = "{red|blue|} __animals/small__ {on a {mat|sofa}|outside}"
    found = {seed: words.fill(text, seed) for seed in range(40)}
    assert found == {seed: Wildcards(here).fill(text, seed) for seed in range(40)}
    assert len(set(found.values())) > 10
    for one in found.values():
        assert not set(one) & set("{}|_")
    # The choice is the same on every machine and with every version of Python.
    assert "".join(words.fill("{a|b|c|d}", seed) for seed in range(6)) == "adaccb"
    assert words.fill("a {plain} text with __ and _x_", 1) == "a {plain} text with __ and _x_"


def test_wildcards_that_lead_nowhere(here: Path) -> None:
    (here / "loop.txt").write_text("__loop__ __loop__\n")
    (here / "empty.txt").write_text("# nothing\n")
    words = Wildcards(here)
    for text, says in (
        ("__none__", "there are empty, loop"),
        ("__loop__", "without end"),
        ("__empty__", "holds no line"),
        ("__../secret__", "leads out"),
    ):
        with pytest.raises(UsageError, match=says):
            words.fill(text, 1)


def test_a_wildcard_fills_each_picture_and_the_metadata(here: Path) -> None:
    words = Wildcards(here)
    jobs = expand({"prompt": "{red|blue} x", "count": 3}, 5, wildcards=words)
    assert [job.options["prompt"] for job in jobs] == [
        words.fill("{red|blue} x", s) for s in (5, 6, 7)
    ]
    assert jobs[0].said == {"prompt_template": "{red|blue} x"}
    (plain,) = expand({"prompt": "x", "count": 3}, 5, wildcards=words)
    assert plain.count == 3
    bad, good = expand(
        {}, 5, [Line({"prompt": "__x__"}, "l"), Line({"prompt": "y"})], wildcards=words
    )
    assert bad.fault is not None and good.fault is None


# ------------------------------------------------------------------------------------------ sheets


def test_the_places_of_a_sheet() -> None:
    axes = [read_axis("steps=2,4"), read_axis("sampler=euler,lcm")]
    places = grid.layout(expand({"prompt": "a"}, 5, axes=axes), axes)
    assert places.cells == [[0, 2], [1, 3]]
    assert places.columns == ("steps 2", "steps 4")
    assert places.rows == ("sampler euler", "sampler lcm")
    seeds = [read_axis("seed=1,2,3")]
    places = grid.layout(expand({"prompt": "a"}, 5, axes=seeds), seeds)
    assert places.cells == [[0, 1, 2]] and places.rows == ()
    places = grid.layout(expand({"prompt": "a", "count": 3}, 5), [])
    assert places.cells == [[0, 1], [2, None]]
    assert places.captions == (("seed 5", "seed 6"), ("seed 7", ""))


# ------------------------------------------------------------------------------------- the command


def test_one_bad_line_does_not_stop_the_rest(here: Path) -> None:
    (here / "p.txt").write_text(
        'a\n{"prompt": "b", "steps": 3, "seed": 7}\n--prompt c --steps 0\n'
        '--prompt "d" --strength 0.5\ne\n'
    )
    result = generate("--prompt-file", "p.txt", "-s", "1", "-o", "{index}.png", *QUICK)
    assert error_of(result) == "Error: 2 of 5 jobs could not be drawn; 3 pictures are saved"
    assert "Not drawn: p.txt, line 3: steps is 0" in result.stderr
    assert "Not drawn: p.txt, line 4: --strength needs an image" in result.stderr
    assert sorted(path.name for path in here.glob("*.png")) == ["0.png", "1.png", "4.png"]
    said = json.loads(texts(here / "1.png")["mlxdiff"])
    assert (said["prompt"], said["steps"], said["seed"]) == ("b", 3, 7)
    alone = generate("b", "-s", "7", *QUICK, "--steps", "3", "-o", "alone.png")
    assert alone.exit_code == 0
    np.testing.assert_array_equal(pixels(here / "1.png"), pixels(here / "alone.png"))


def test_axes_and_their_sheet(here: Path) -> None:
    axes = ("--vary-option", "steps=1,2", "--vary-option", "cfg-scale=1,3")
    result = generate("a", "-s", "1", *axes, *QUICK, "--grid", "sheet.png", "-o", "{index}.png")
    assert result.exit_code == 0, result.output
    said = [json.loads(texts(here / f"{i}.png")["mlxdiff"]) for i in range(4)]
    assert [(one["steps"], one["guidance"]) for one in said] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    with Image.open(here / "sheet.png") as sheet:
        assert sheet.width > 2 * 32 and sheet.height > 2 * 32
        seen = np.asarray(sheet)
    own = pixels(here / "3.png")
    where = np.lib.stride_tricks.sliding_window_view(seen, own.shape)
    assert (where == own).all(axis=(-3, -2, -1)).any()  # the last picture stands on it
    again = generate("a", "-s", "1", *QUICK, "--grid", "sheet.png")
    assert "already exists" in error_of(again)
    assert "end it in one of" in error_of(generate("a", *QUICK, "--grid", "x.bmp"))


def test_resume_skips_what_is_there(here: Path) -> None:
    (here / "p.txt").write_text("a\nb\n")
    command = ("--prompt-file", "p.txt", "-s", "1", "-b", "2", *QUICK)
    assert generate(*command).exit_code == 0
    whole = {path.name: path.read_bytes() for path in here.glob("*.png")}
    (here / "mlxdiff-2-1.png").unlink()
    (here / "mlxdiff-1-2.png").unlink()
    result = generate(*command, "--resume")
    assert result.exit_code == 0, result.output
    assert "2 of 4 pictures were there already" in result.stderr
    assert result.stdout.count("seed") == 2
    for name, data in whole.items():
        assert (here / name).read_bytes() == data
    one = ("a", "-s", "7", "-b", "2", *QUICK)  # the default names are the same with it
    assert generate(*one).exit_code == 0
    assert "2 of 2 pictures were there already" in generate(*one, "--resume").stderr
    other = generate(*command, "--resume", "--negative-prompt", "x")
    assert "drawn with another negative_prompt" in other.stderr and other.exit_code == 2
    assert "--resume needs --seed" in error_of(generate("a", "--resume", *QUICK))
    assert "--force" in error_of(generate("a", "-s", "1", "--resume", "--force", *QUICK))


def test_what_differs() -> None:
    one = Metadata(prompt="a", seed=1, version="1", extra={"eta": 0.5})
    assert (
        resume.differences(one, Metadata(prompt="a", seed=1, version="2", extra={"eta": 0.5})) == []
    )
    assert resume.differences(one, Metadata(prompt="b", seed=1, extra={})) == ["eta", "prompt"]


def test_a_folder_as_image_a_preset_and_wildcards(here: Path) -> None:
    (here / "in").mkdir()
    for name in ("one", "two"):
        photo_of = Image.fromarray(np.asarray(photo(32, 32)))
        photo_of.save(here / "in" / f"{name}.png")
    (here / "p.toml").write_text("steps = 2\nwidth = 32\nheight = 32\nstrength = 0.5\n")
    options = (
        "--image",
        "in",
        "--preset",
        "p.toml",
        "--wildcards",
        "-s",
        "1",
        "-o",
        "{image}.webp",
    )
    result = generate("{red|blue} cat", *options)
    assert result.exit_code == 0, result.output
    assert (here / "one.webp").is_file() and (here / "two.webp").is_file()
    from mlxdiff.pictures import metadata

    said = metadata.read(here / "two.webp").to_dict()
    assert said["prompt"] in ("red cat", "blue cat")
    assert said["prompt_template"] == "{red|blue} cat" and said["strength"] == 0.5
    literal = generate("{red|blue} cat", "-s", "1", *QUICK, "-o", "plain.png")  # only when asked
    assert literal.exit_code == 0
    assert json.loads(texts(here / "plain.png")["mlxdiff"])["prompt"] == "{red|blue} cat"


def test_lines_with_models_of_their_own(here: Path) -> None:
    lines = [{"prompt": "a"}, {"prompt": "a", "model": str(checkpoint("lcm"))}, {"prompt": "a"}]
    (here / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = generate("--prompt-file", "p.jsonl", "-s", "1", *QUICK, "-o", "{index}.png")
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(pixels(here / "0.png"), pixels(here / "2.png"))
    own = generate("a", "-m", checkpoint("lcm"), "-s", "1", *QUICK, "-o", "lcm.png")
    assert own.exit_code == 0, own.output
    np.testing.assert_array_equal(pixels(here / "1.png"), pixels(here / "lcm.png"))


def test_events(here: Path) -> None:
    (here / "p.txt").write_text("a\n--steps 0\n")
    how = ("--json", "--progress", "json")
    result = generate("--prompt-file", "p.txt", "-s", "1", *QUICK, *how)
    assert result.exit_code == 2
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert events[0]["schema"] == "mlxdiff.events/1" and events[0]["pictures"] == 2
    assert [one["event"] for one in events if one["event"] != "progress"] == [
        "begin",
        "picture",
        "failed",
        "end",
    ]
    stages = [one["stage"] for one in events if one["event"] == "progress"]
    assert set(stages) == {"load", "encode", "step", "decode"}
    last = [one for one in events if one.get("stage") == "step"][-1]
    assert (last["step"], last["steps"], last["seconds_left"]) == (2, 2, 0.0)
    assert events[-1] == {"event": "end", "saved": 1, "skipped": 0, "failed": 1}
    assert "--json" in error_of(generate("a", *QUICK, "--progress", "json"))


@pytest.mark.slow
def test_two_processes_draw_the_same_pictures_each_once(here: Path) -> None:
    pytest.importorskip("mlx.core")
    (here / "p.txt").write_text("a\nb\n")
    command = ["generate", "-m", str(checkpoint("sd15")), "--backend", "numpy", *QUICK]
    command += ["--prompt-file", "p.txt", "-b", "2", "-s", "1"]
    assert run(*command, "-o", "alone-{index}.png").exit_code == 0
    launch = Path(sys.executable).with_name("mlx.launch")
    done = subprocess.run(
        [launch, "-n", "2", "--", sys.executable, "-m", "mlxdiff", *command,
         "-o", "shared-{index}.png"],
        env=os.environ, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    drawn = [line for line in done.stdout.splitlines() if line.startswith("shared-")]
    assert len(drawn) == 4, done.stdout + done.stderr
    for i in range(4):
        assert sum(line.startswith(f"shared-{i}.png") for line in drawn) == 1
        np.testing.assert_array_equal(
            pixels(here / f"alone-{i}.png"), pixels(here / f"shared-{i}.png")
        )


def test_a_job_has_a_name() -> None:
    assert Job({}).name == "the command line"
    assert Job({}, "p, line 2", ("3", "euler")).name == "p, line 2, 3, euler"
