"""Hold recipes to run with `tune run` or to copy; the package never imports them.

This file makes ./recipes a real package, so that `tune run --nproc_per_node N recipes/x.py` finds it before the
top-level `recipes` that torchtune installs (whose import raises).
"""
