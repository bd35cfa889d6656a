"""The embedded sample (``conditions.toml``) and the embedded base model (``tiny/``), with the recipe that remakes them."""
