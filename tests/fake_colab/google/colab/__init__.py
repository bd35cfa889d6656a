"""A stand-in for Colab's own package: what the lessons and huggingface_hub look at, and no more."""
