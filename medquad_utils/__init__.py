"""Plumbing, plots and checks of a hands-on QLoRA course: MedQuAD, 4 bits, LoRA, SFT. Importing it imports no torch."""

__version__ = "0.1.0"


class CourseError(Exception):
    """A mistake that the reader can mend; the message says what is wrong, what was expected and what to do next."""
