"""The errors of Colab's package."""


class Error(Exception):
    """Base class of most of them."""
