"""The entry point of group ``vllm.general_plugins``: registers ``--load-format tardis`` with vLLM."""


def register() -> None:
    """Registers the loader; vLLM calls this in each of its processes."""
    from vllm.model_executor.model_loader import register_model_loader

    from tardis_fx.serving.loader import TardisLoader

    register_model_loader("tardis")(TardisLoader)
