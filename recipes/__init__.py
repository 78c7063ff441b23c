"""Recipes: Hydra YAML only; this file lets `importlib.resources` find them."""
