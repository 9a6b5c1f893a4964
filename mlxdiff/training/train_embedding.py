"""``mlxdiff train embedding`` as a function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxdiff.errors import UsageError
from mlxdiff.loading import load
from mlxdiff.run.table import make
from mlxdiff.training import embedding, plan, session
from mlxdiff.training.data import open_asked
from mlxdiff.training.lora import check_trainable
from mlxdiff.training.options import TrainEmbeddingOptions
from mlxdiff.training.process import Process
from mlxdiff.training.run import Done, run, silent


def train_embedding(folder: str | Path, **given: Any) -> Done:
    """Teach a model a word: textual inversion. No weight of the model changes.

    Args:
        folder: pictures of what the word means, each with a caption that has the word
            (docs/training.md).
        given: the options of ``training.options.TrainEmbeddingOptions`` by name.
    Raises: UsageError, CheckpointError, ConfigError, HubError; OSError if the disk fails.
    """
    options = make(TrainEmbeddingOptions, given)
    word = (options.word or "").strip()
    if not word or len(word.split()) > 1:
        raise UsageError("no word to teach: give one without spaces (--word '<robot>')")
    opened = session.begin(Path(folder), options, options, "embedding", ".safetensors")
    assert opened.pipe is not None
    plain = check_trainable(opened.pipe.model)
    vectors = embedding.first_vectors(plain, options.init_word, options.vectors, options.seed)
    model = embedding.with_word(plain, word, vectors)
    data = open_asked(
        folder,
        model,
        options,
        opened.cache(options.cache),
        tokens=True,
    )
    embedding.check_captions([one.picture.caption for one in data.examples], word)
    names = ("unet", *model.texts.names)
    frozen = sum(plan.frozen_bytes(plain, name, opened.options) for name in names)
    trained = sum(rows.size for rows in vectors.values())
    return run(
        opened,
        data,
        Process.from_config(model.source.scheduler_config),
        plan.expect(model.source.config("unet"), data, opened.options, frozen, trained, False),
        lambda: embedding.Embedding(model, word, vectors, options.form),
        open_result=lambda files: load(
            model=options.model, embeddings=[(files[0], word)], low_memory=True
        ),
        say=options.say or silent,
        word=word,
    )
