"""The embedded sample and base model, with the recipe that remakes them, and templates."""
