"""CLIP's text and image encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxdiff.networks.config.reader import MOST_LAYERS, SETTING, TRAINING, ConfigReader

CLIP_NO_EFFECT: dict[str, str] = {
    "attention_dropout": TRAINING,
    "dropout": TRAINING,
    "initializer_factor": TRAINING,
    "initializer_range": TRAINING,
    "logit_scale_init_value": TRAINING,
    "gradient_checkpointing": TRAINING,
    "architectures": "read where the class of the encoder is decided",
    "bos_token_id": "the tokenizer decides it",
    "pad_token_id": "the tokenizer decides it",
    "model_type": "checked by its value",
    "torch_dtype": "weights carry their own type",
    "dtype": "weights carry their own type",
    "transformers_version": SETTING,
} | dict.fromkeys(
    # What transformers' PretrainedConfig writes into every file, by version.
    """add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id
    length_penalty max_length
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores prefix problem_type pruned_heads remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings
    tokenizer_class top_k top_p torchscript typical_p use_bfloat16 use_cache
    use_return_dict""".split(),
    SETTING,
)


@dataclass(frozen=True)
class CLIPTextConfig:
    """A CLIP text encoder (Radford et al. 2021), as transformers' CLIPTextModel(WithProjection).

    ``eos_token_id`` 2 is the legacy value: the end of the text is then where the largest id stands.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    with_projection: bool = False

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        where: str = "text_encoder/config.json",
        with_projection: bool | None = None,
    ) -> CLIPTextConfig:
        """Read a config.json.

        Args:
            data: the JSON object.
            where: the file's name in messages.
            with_projection: whether the class is CLIPTextModelWithProjection (model_index.json
                knows); None: as ``architectures`` says.
        Raises: ConfigError.
        """
        reader = ConfigReader(data, where, ("CLIPTextModel", "CLIPTextModelWithProjection"))
        reader.only("model_type", "clip_text_model", "clip_text_model", "clip")
        architectures = data.get("architectures") or ["CLIPTextModel"]
        known = ("CLIPTextModel", "CLIPTextModelWithProjection")
        if not isinstance(architectures, list) or architectures[0] not in known:
            raise reader.fail("architectures", architectures, " or ".join(known))
        if with_projection is None:
            with_projection = architectures[0] == "CLIPTextModelWithProjection"
        config = cls(
            vocab_size=reader.integer("vocab_size", 49408),
            hidden_size=reader.integer("hidden_size", 512),
            intermediate_size=reader.integer("intermediate_size", 2048),
            projection_dim=reader.integer("projection_dim", 512),
            num_hidden_layers=reader.integer("num_hidden_layers", 12, most=MOST_LAYERS),
            num_attention_heads=reader.integer("num_attention_heads", 8),
            max_position_embeddings=reader.integer("max_position_embeddings", 77),
            hidden_act=reader.only("hidden_act", "quick_gelu", "quick_gelu", "gelu"),
            layer_norm_eps=reader.number("layer_norm_eps", 1e-5),
            eos_token_id=reader.integer("eos_token_id", 49407, least=0),
            with_projection=with_projection,
        )
        reader.finish(CLIP_NO_EFFECT)
        if config.hidden_size % config.num_attention_heads:
            raise reader.fail(
                "num_attention_heads", config.num_attention_heads, "a divisor of hidden_size"
            )
        return config


@dataclass(frozen=True)
class CLIPVisionConfig:
    """A CLIP image encoder, as transformers' CLIPVisionModelWithProjection."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "image_encoder/config.json"
    ) -> CLIPVisionConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = ConfigReader(data, where, ("CLIPVisionModelWithProjection",))
        reader.only("model_type", "clip_vision_model", "clip_vision_model")
        reader.only("num_channels", 3, 3)
        config = cls(
            hidden_size=reader.integer("hidden_size", 768),
            intermediate_size=reader.integer("intermediate_size", 3072),
            projection_dim=reader.integer("projection_dim", 512),
            num_hidden_layers=reader.integer("num_hidden_layers", 12, most=MOST_LAYERS),
            num_attention_heads=reader.integer("num_attention_heads", 12),
            image_size=reader.integer("image_size", 224, most=1 << 14),
            patch_size=reader.integer("patch_size", 32),
            hidden_act=reader.only("hidden_act", "quick_gelu", "quick_gelu", "gelu"),
            layer_norm_eps=reader.number("layer_norm_eps", 1e-5),
        )
        reader.finish(CLIP_NO_EFFECT)
        for key, value, whole in (
            ("num_attention_heads", config.num_attention_heads, config.hidden_size),
            ("patch_size", config.patch_size, config.image_size),
        ):
            if whole % value:
                raise reader.fail(key, value, f"a divisor of {whole}")
        return config
