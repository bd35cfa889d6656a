"""Colab's secrets, as $FAKE_COLAB_SECRET has them: missing, denied, timeout, or else a token."""

import os

from google.colab import _shell, errors


class SecretNotFoundError(errors.Error):
    pass


class NotebookAccessError(Exception):
    pass


class TimeoutException(Exception):
    """Not an ``errors.Error``, which huggingface_hub catches; its base on Colab is unknown."""


def get(key: str) -> str:
    _shell.record(f"secret {key}")
    state = os.environ["FAKE_COLAB_SECRET"]
    refusals = {
        "missing": SecretNotFoundError,
        "denied": NotebookAccessError,
        "timeout": TimeoutException,
    }
    if state in refusals:
        raise refusals[state](key)
    return state
