"""Keep libraries from writing to the terminal of somebody who did not ask."""


def quiet() -> None:
    """Errors of transformers and datasets only: what matters is raised, the rest is chatter about lengths and dtypes."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def tell_kernels() -> None:
    """Write to stderr which kernel multiplies, and why."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("compressor.runtime.kernels.dispatch")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
