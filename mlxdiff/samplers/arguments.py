"""The arguments of a scheduler class, read from a checkpoint's scheduler_config.json.

As in diffusers' `X.from_config(config)`, a key that the file does not write takes X's own default,
and keys of other schedulers are skipped. Here a key that no scheduler of diffusers has is an error
(else a typo would silently have no effect). So is a value that is not implemented.

One default differs on purpose: clip_sample is False where the file does not write it. The
reference's True was made for pixel models, and holds for them here too. On a latent model's
DPM-Solver config it turns DDIM and DDPM into noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlxdiff.errors import ConfigError, quoted

# Every key of every scheduler in diffusers 0.42.1, and three keys of older files.
KNOWN_KEYS = frozenset(
    """
    algorithm_type alpha_cum_end alpha_cum_start base_image_seq_len base_shift beta_end beta_max
    beta_min beta_schedule beta_start block_length clip_denoised clip_sample clip_sample_range
    correct_steps corrector_k corrector_order corrector_selection corrector_selection_tau
    corrector_steps disable_corrector dynamic_thresholding_ratio editing_threshold entropy_bound eps
    eta euler_at_final final_sigmas_type final_step_size_scale flow_shift gamma gamma_cum_end
    gamma_cum_start interpolation_type invert_sigmas lambda_min_clipped lower_order_final
    mask_token_id masking_schedule max_image_seq_len max_shift minimal_topk n_grid noise_mode
    noise_sampler_seed num_inference_steps num_policy_substeps num_train_timesteps num_vec_classes
    original_inference_steps predict_x0 prediction_type predictor_order rescale_betas_zero_snr rho s
    s_churn s_max s_min s_noise sample_max_value sampling_eps scale_factors scaler schedule_mode
    scheduler_type set_alpha_to_one shift shift_terminal sigma_data sigma_max sigma_min
    sigma_schedule skip_prk_steps snr snr_shift_scale solver_order solver_p solver_type stage_range
    stages steps_offset stochastic_sampling t_lim_ode t_lim_ode_below t_max t_min
    tail_step_multiplier tail_steps tau_func threshold thresholding time_shift_type timestep_scaling
    timestep_spacing timestep_type trained_betas tsr_k tsr_sigma upscale_mode use_beta_sigmas
    use_dynamic_shifting use_exponential_sigmas use_flow_sigmas use_karras_sigmas use_lu_lambdas
    variance_type predict_epsilon tensor_format quantization_config
    """.split()
)

# The values that the classes here accept. A class can replace a row with its `choices`.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    # Flow matching and learned variances belong to models that are not Stable Diffusion.
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
    "solver_p": (None,),
}
_SIGMA_RANGE = {"sigma_min": None, "sigma_max": None}

# The file can come from anyone: wild numbers overflow, or ask for endless tables.
_LARGEST = 100_000
_BETWEEN_0_AND_1 = ("beta_start", "beta_end")


class SchedulerArguments(Mapping[str, Any]):
    """The checked arguments of one scheduler class: a read-only mapping, entries also attributes.

    Args:
        config: the JSON object of scheduler_config.json. Keys that begin with an underscore are
            diffusers' own notes. Keys listed under `_use_default_values` count as absent.
        class_name: the diffusers class, for messages.
        defaults: every argument of that class with its default.
        overrides: values that the sampler's id or the schedule fixes, whatever the file says.
        choices: allowed values of a key, where they are not the usual ones.
    Raises: ConfigError for an unknown key, a wrong type, or a value that is not implemented.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        class_name: str,
        defaults: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
        choices: Mapping[str, tuple[Any, ...]] | None = None,
    ) -> None:
        if not isinstance(config, Mapping):
            raise ConfigError(
                f"scheduler_config.json must hold an object, not {type(config).__name__}"
            )
        written = {key: value for key, value in config.items() if not key.startswith("_")}
        unknown = sorted(set(written) - KNOWN_KEYS)
        if unknown:
            raise ConfigError(
                f"scheduler_config.json: unknown key {unknown[0]!r}: no diffusers scheduler has it"
            )
        for key in config.get("_use_default_values") or ():
            written.pop(key, None)
        # diffusers keeps sigma_min and sigma_max for every class that spaces sigmas, its own
        # argument or not.
        defaults = {**_SIGMA_RANGE, **defaults}
        values = {key: written.get(key, default) for key, default in defaults.items()}
        values.update(overrides or {})
        allowed = {**_CHOICES, **(choices or {})}
        for key, value in values.items():
            values[key] = _checked(key, value, defaults[key], allowed.get(key), class_name)
        self._values = values

    def replace(self, **values: Any) -> SchedulerArguments:
        """Return a copy with other (unchecked) values."""
        copy = object.__new__(SchedulerArguments)
        copy._values = {**self._values, **values}
        return copy

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __getattr__(self, key: str) -> Any:
        try:
            return self.__dict__["_values"][key]
        except KeyError:
            raise AttributeError(key) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _checked(
    key: str, value: Any, default: Any, choices: tuple[Any, ...] | None, class_name: str
) -> Any:
    """Return `value` in the type of `default`; raise ConfigError with the accepted values."""

    def refuse(expected: str) -> ConfigError:
        return ConfigError(
            f"scheduler_config.json: {key} is {quoted(value)}; {class_name} takes {expected} here"
        )

    if choices is not None:
        if not any(
            value is choice or (type(value) is type(choice) and value == choice)
            for choice in choices
        ):
            raise refuse(" or ".join(repr(choice) for choice in choices))
        return value
    if isinstance(default, bool):
        if not isinstance(value, bool) and value is not None:
            raise refuse("true or false")
        return bool(value)
    if isinstance(default, int):
        least = 0 if key == "steps_offset" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise refuse(f"a whole number of at least {least}")
        if value > _LARGEST:
            raise refuse(f"a whole number of at most {_LARGEST}")
        return value
    if isinstance(default, float) or key in _SIGMA_RANGE:
        if value is None and default is None:
            return None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or value != value:  # NaN
            raise refuse("a number")
        if key in _BETWEEN_0_AND_1 and not 0 < value < 1:
            raise refuse("a number between 0 and 1")
        if key in _SIGMA_RANGE and not 0 <= value:
            raise refuse("a number of at least 0")
        if abs(value) > _LARGEST and value != default:  # lambda_min_clipped is -inf by default
            raise refuse(f"a number from -{_LARGEST} to {_LARGEST}")
        return float(value)
    if isinstance(default, list) or (key == "trained_betas" and value is not None):
        least, most = (0, 1) if key == "trained_betas" else (-_LARGEST, _LARGEST)
        if not isinstance(value, (list, tuple)) or not all(
            isinstance(number, (int, float)) and least <= number <= most for number in value
        ):
            raise refuse(f"a list of numbers from {least} to {most}")
    return value
