"""The boring part of a recipe: start, load, update, checkpoints, metrics, evaluation."""
