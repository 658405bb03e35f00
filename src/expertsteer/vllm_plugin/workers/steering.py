"""What a worker does beyond vLLM's own: steer the model that it loaded."""

from __future__ import annotations

from typing import Any

from expertsteer.vllm_plugin.coefficients import Coefficients
from expertsteer.vllm_plugin.layers import steer_layers
from expertsteer.vllm_plugin.loading import load_shelf
from expertsteer.vllm_plugin.settings import settings_of

__all__ = ["SteersItsModel"]


class SteersItsModel:
    """Mixed into a worker of vLLM, ahead of it."""

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        """Load the model and make it take vectors, before anything is compiled."""
        super().load_model(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        settings = settings_of(self.vllm_config.additional_config)
        assert settings is not None  # the configuration names this worker with them only
        shelf = load_shelf(settings)
        runner = self.model_runner
        coefficients = Coefficients(shelf.names, runner.max_num_tokens, self.device)
        steer_layers(
            runner.get_model(),
            self.vllm_config.model_config.get_total_num_hidden_layers(),
            [pack.scaled_vectors(1.0) for pack in shelf.packs.values()],
            coefficients.tensor,
        )
        prepare_inputs = runner._prepare_inputs

        def prepare(scheduler_output: Any, n_scheduled: Any) -> Any:
            coefficients.prepare(runner, scheduler_output.scheduled_new_reqs, n_scheduled)
            return prepare_inputs(scheduler_output, n_scheduled)

        runner._prepare_inputs = prepare
