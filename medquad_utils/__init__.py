"""Plumbing, plots and checks of a hands-on QLoRA course on MedQuAD. Imports no torch."""

__version__ = "0.1.0"
STOPPED = "stopped; files that were written are complete."  # after Ctrl-C


class CourseError(Exception):
    """A mistake that the reader can fix: what is wrong, what was expected, what to do next."""
