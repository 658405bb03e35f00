"""Make the engine's configuration take packs, or refuse them with the reason."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from expertsteer.errors import PackError, ParameterError
from expertsteer.vllm_plugin.loading import check_against_checkpoint, digests_of, load_shelf
from expertsteer.vllm_plugin.settings import KEY, PluginSettings, read_settings
from expertsteer.vllm_plugin.versions import check_version, is_supported
from expertsteer.vllm_plugin.wrapping import wrap_once

__all__ = ["wrap_configuring"]

_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "expertsteer.vllm_plugin.workers.cpu.SteeringWorker",
    "vllm.v1.worker.gpu_worker.Worker": "expertsteer.vllm_plugin.workers.gpu.SteeringWorker",
}
_V2_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


def wrap_configuring() -> None:
    """Read the plugin's settings wherever an engine is configured."""
    from vllm.engine.arg_utils import EngineArgs

    wrap_once(EngineArgs, "create_engine_config", _taking_packs)


def _taking_packs(original: Any) -> Any:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = read_settings(self.additional_config)
        if settings is None:
            config = original(self, *args, **kwargs)
        else:
            check_version()
            _choose_model_runner()
            config = original(self, *args, **kwargs)
            _configure(config, settings)
        if is_supported():
            _wrap_requests(config)
        return config

    return create_engine_config


def _choose_model_runner() -> None:
    # The vectors' strengths follow the batch that the first model runner prepares.
    if os.environ.setdefault(_V2_RUNNER, "0") != "0":
        raise ParameterError(
            f"Got {_V2_RUNNER}={os.environ[_V2_RUNNER]}, but packs work with the other model "
            f"runner only. Set {_V2_RUNNER}=0, or leave it out."
        )


def _configure(config: Any, settings: PluginSettings) -> None:
    _refuse_unsupported(config)
    shelf = load_shelf(settings)
    model = config.model_config
    _check_shape(shelf, model)
    check_against_checkpoint(
        shelf, _local_folder(config, settings.force), model.model, force=settings.force
    )
    digested = settings.model_copy(update={"digests": digests_of(shelf.packs)})
    # The compiled model holds the additions; that the configuration tells of the packs
    # keeps its cached code apart from that of the same model without.
    config.additional_config = {**config.additional_config, KEY: digested.model_dump()}
    config.parallel_config.worker_cls = _WORKERS[config.parallel_config.worker_cls]


def _refuse_unsupported(config: Any) -> None:
    parallel = config.parallel_config
    refused = {
        "speculative decoding": config.speculative_config is not None,
        "batches split in two (--enable-dbo, --ubatch-size)": parallel.use_ubatching,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,
        "keys and values from other engines (--kv-transfer-config)": (
            config.kv_transfer_config is not None
        ),
        "pooling models": config.model_config.runner_type != "generate",
        "encoder-decoder models": config.model_config.is_encoder_decoder,
        "diffusion models": config.model_config.is_diffusion,
        f"the worker {parallel.worker_cls}": parallel.worker_cls not in _WORKERS,
        "this model, which needs model runner V2": config.use_v2_model_runner,
    }
    for feature, found in refused.items():
        if found:
            raise ParameterError(
                f"Got packs together with {feature}, but expected either. Leave one out."
            )


def _check_shape(shelf: Any, model: Any) -> None:
    """Compare depth and width, which the configuration tells whatever the weights are."""
    n_layers, width = model.get_total_num_hidden_layers(), model.get_hidden_size()
    for name, pack in shelf.packs.items():
        if (pack.target.n_layers, pack.target.width) != (n_layers, width):
            raise PackError(
                f"Cannot serve the pack {name!r}: got the model {model.model!r} of {n_layers} "
                f"blocks and width {width}, but this pack is for {pack.target.name!r}: "
                f"{pack.target.n_layers} blocks, width {pack.target.width}. A pack fits only "
                "models of its own depth and width."
            )


def _local_folder(config: Any, force: bool) -> Path:
    """Return where the model's files lie, fetched as the engine is about to fetch them."""
    model = config.model_config
    folder = Path(model.model)
    if folder.is_dir() or force:
        return folder
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            model.model,
            revision=model.revision,
            cache_dir=config.load_config.download_dir,
            allow_patterns=["*.safetensors", "*.safetensors.index.json", "config.json"],
        )
    )


def _wrap_requests(config: Any) -> None:
    from expertsteer.vllm_plugin.admission import Admission, wrap_input_processor
    from expertsteer.vllm_plugin.api import wrap_requests
    from expertsteer.vllm_plugin.prefix_caching import wrap_block_keys
    from expertsteer.vllm_plugin.settings import settings_of

    wrap_block_keys()
    wrap_input_processor()
    wrap_requests(Admission(settings_of(config.additional_config)))
