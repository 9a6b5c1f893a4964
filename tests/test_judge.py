"""CLIP as a judge: scores, labels and similarity against transformers; the best of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from clip_files import FORMS, SIDE, TEXTS, write_clip
from folders import write_json
from golden_data import GOLDEN, checkpoint, photo
from PIL import Image
from safetensors.numpy import load_file, save_file

import mlxdiff
from mlxdiff.cli import main
from mlxdiff.errors import CheckpointError, ConfigError, UsageError
from mlxdiff.machine.disk import read_json
from mlxdiff.run.judge import groups

EXPECTED = np.load(GOLDEN / "clip.npz")
PICTURES = [photo(28, 28), photo(40, 61), photo(90, 33), photo(20, 25)]
RUN: dict[str, Any] = {"width": 32, "height": 32, "steps": 2, "guidance": 3.0, "seed": 5}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.mark.parametrize("form", FORMS)
def test_scores_equal_transformers(form: str, backend: str, tmp_path: Path) -> None:
    """The logits within 2e-5 of their scale: float32 in another order of sums."""
    judge = mlxdiff.load_judge(
        write_clip(tmp_path / "clip", form), backend=backend, dtype="float32"
    )
    bound = 2e-5 * judge.clip.scale
    np.testing.assert_allclose(
        judge.scores(PICTURES, TEXTS), EXPECTED[f"{form}/logits"], atol=bound
    )
    np.testing.assert_allclose(judge.similarities(PICTURES), EXPECTED[f"{form}/cosines"], atol=2e-5)
    shares = judge.labels(PICTURES, TEXTS, "{}")
    np.testing.assert_allclose(shares, EXPECTED[f"{form}/shares"], atol=bound)
    assert EXPECTED[f"{form}/logits"].std() > 0.05 * judge.clip.scale  # or this would prove nothing


@pytest.mark.parity
@pytest.mark.parametrize("form", FORMS)
def test_transformers_reads_the_same_folder(form: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = write_clip(tmp_path / "clip", form)
    judge = mlxdiff.load_judge(folder, backend="numpy")
    model = transformers.CLIPModel.from_pretrained(folder)
    from mlxdiff.pictures.image import to_clip

    pixels = [to_clip(one, SIDE, judge.clip.mean, judge.clip.std) for one in PICTURES]
    ids = torch.tensor([judge.clip.tokenizer.encode(text) for text in TEXTS])
    with torch.no_grad():
        out = model(
            input_ids=ids,
            pixel_values=torch.from_numpy(np.concatenate(pixels)).permute(0, 3, 1, 2),
        )
    np.testing.assert_allclose(
        judge.scores(PICTURES, TEXTS),
        out.logits_per_image.numpy(),
        atol=2e-5 * judge.clip.scale,
    )


def test_near_duplicates_are_grouped() -> None:
    cosines = np.eye(6)
    for i, j in ((0, 3), (3, 5), (1, 4)):
        cosines[i, j] = cosines[j, i] = 0.98
    assert groups(cosines) == [[0, 3, 5], [1, 4]]
    assert groups(cosines, 0.99) == []


def test_the_command_line(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all").mkdir()
    for i, picture in enumerate((photo(40, 61), photo(20, 25), photo(40, 61))):
        Image.fromarray(picture).save(tmp_path / "all" / f"{i}.png")
    (tmp_path / "labels.txt").write_text("a\n\nb\n")

    def run(*arguments: str) -> Any:
        command = ["score", *arguments, "--judge", str(clip), "--backend", "numpy"]
        return CliRunner().invoke(main, command)

    lines = [json.loads(line) for line in run("all", "-p", "a b", "--json").stdout.splitlines()]
    expected = EXPECTED["openai/logits"]
    assert [line["prompt"] for line in lines] == ["a b"] * 3
    for line, row in zip(lines, (1, 3, 1), strict=True):
        assert abs(line["score"] - expected[row, 0]) < 2e-3
    found = run("all", "--duplicates", "--threshold", "0.9999").stdout.split()
    assert [Path(one).name for one in found] == ["0.png", "2.png"]
    similar = run("all/0.png", "all", "--similar", "--json").stdout.splitlines()
    assert json.loads(similar[0])["cosine"] == 1.0
    labelled = run("all/0.png", "--label-file", "labels.txt", "--json").stdout
    assert sum(json.loads(labelled)["labels"].values()) == pytest.approx(1, abs=1e-3)
    for arguments, says in (
        (("all/0.png",), "says nothing about how it was made.*--prompt"),
        (("all/0.png", "--label", "a"), "one label is always right"),
        (("all/0.png", "--label", "a", "--similar"), "both given"),
        (("all/0.png", "--similar"), "one picture only"),
        (("all", "-p", "a", "--threshold", "0.5"), "no effect without --duplicates"),
        (("none.png", "-p", "a"), "no such picture"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert __import__("re").search(says, result.output.replace("\n", " ")), result.output


def test_the_best_of_several_is_kept(clip: Path, backend: str) -> None:
    """It is what its own seed gives alone; its metadata name all seeds, with their scores."""
    model = checkpoint("sd15")
    pipe = mlxdiff.load(model, backend=backend, judge=clip)
    steps: list[tuple[int, int]] = []
    result = pipe.generate(
        "a b", count=2, best_of=3, on_step=lambda s: steps.append((s.picture, s.seed)), **RUN
    )
    assert [seed for _, seed in steps[::2]] == [5, 6, 7, 8, 9, 10]
    assert [picture for picture, _ in steps[::2]] == [0, 0, 0, 1, 1, 1]
    assert len(result.images) == 2 and result.steps_of_a_picture == 2
    alone = mlxdiff.load(model, backend=backend)
    judge = mlxdiff.load_judge(clip, backend=backend)
    for i, image in enumerate(result.images):
        seeds = range(5 + 3 * i, 8 + 3 * i)
        drawn = [alone.generate("a b", **RUN | {"seed": seed}).images[0] for seed in seeds]
        scores = judge.scores(drawn, ["a b"])[:, 0]
        best = int(scores.argmax())
        np.testing.assert_array_equal(np.asarray(image), np.asarray(drawn[best]))
        extra = result.metadata[i].extra
        assert result.seeds[i] == result.metadata[i].seed == seeds[best]
        assert [seed for seed, _ in extra["scores"]] == list(seeds)
        np.testing.assert_allclose([s for _, s in extra["scores"]], scores, atol=1e-3)
        assert extra["score"] == max(s for _, s in extra["scores"]) and extra["judge"] == "clip"


def test_a_judge_alone_says_the_score(clip: Path) -> None:
    pipe = mlxdiff.load(checkpoint("sd15"), backend="numpy", judge=clip)
    result = pipe.generate("a b", **RUN)
    assert set(result.metadata[0].extra) >= {"score", "judge"}
    assert "best_of" not in result.metadata[0].extra
    pipe.set_judge(None)
    with pytest.raises(UsageError, match=r"there is no judge; give one \(judge\)"):
        pipe.generate("a b", best_of=2, **RUN)


def test_low_memory_and_rescue(clip: Path) -> None:
    """In low memory the same picture; a run that is stopped keeps the best so far."""
    pipe = mlxdiff.load(checkpoint("sd15"), backend="numpy", judge=clip)
    expected = pipe.generate("a b", best_of=3, **RUN)
    pipe.save_memory()
    result = pipe.generate("a b", best_of=3, **RUN)
    np.testing.assert_array_equal(np.asarray(result.images[0]), np.asarray(expected.images[0]))
    pipe.save_memory(False)
    run = pipe.stream("a b", best_of=3, **RUN)
    for step in run:
        if step.seed == 6 and step.index == 1:
            break
    (picture,) = run.rescue()
    assert [seed for seed, _ in picture.metadata.extra["scores"]] == [5, 6]


def test_a_picture_of_the_best_replays(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["generate", "a b", "-m", str(checkpoint("sd15")), "--backend", "numpy"]
    size = ["-W", "32", "-H", "32", "--steps", "2", "-s", "5"]
    best = ["--best-of", "3", "--judge", str(clip), "-o", "1.png"]
    first = CliRunner().invoke(main, [*command, *size, *best])
    assert first.exit_code == 0, first.output
    assert "the best of 3 (5: " in first.stdout
    again = ["generate", "--from-image", "1.png", "-m", str(checkpoint("sd15")), "-o", "2.png"]
    result = CliRunner().invoke(main, [*again, "--backend", "numpy"])
    assert result.exit_code == 0, result.output
    with Image.open("1.png") as a, Image.open("2.png") as b:
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    scored = CliRunner().invoke(main, ["score", "1.png", "--judge", str(clip), "--json"])
    with Image.open("1.png") as a:
        said = json.loads(a.text["mlxdiff"])["score"]
    assert json.loads(scored.stdout)["score"] == pytest.approx(said, abs=2e-3)


def test_what_is_no_clip_is_named(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not the folder of a CLIP"):
        mlxdiff.load_judge(tmp_path)
    with pytest.raises(CheckpointError, match="is a CLIPVisionModelWithProjection"):
        write_json(
            tmp_path / "v" / "config.json",
            {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model"},
        )
        mlxdiff.load_judge(tmp_path / "v")
    folder = write_clip(tmp_path / "clip")
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="visual_projection"):
        mlxdiff.load_judge(folder)
    del tensors["logit_scale"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="no logit_scale"):
        mlxdiff.load_judge(folder)
    folder = write_clip(tmp_path / "other")
    path = folder / "preprocessor_config.json"
    for change, says in (
        ({"do_center_crop": False}, "do_center_crop"),
        ({"resample": 2}, "resample"),
        ({"size": 30}, "size = 30"),
        ({"image_std": [0, 1, 1]}, "image_std"),
    ):
        original = read_json(path)
        write_json(path, {**original, **change})
        with pytest.raises(ConfigError, match=says):
            mlxdiff.load_judge(folder)
        write_json(path, original)
