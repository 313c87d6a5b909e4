"""Show what a run would see: both prompts from the ids that are built, what is private in them, lengths and budget.

Enters: a config. Leaves: rows as the model will see them, on a terminal or as JSON. Read command.py first, then rows.py, which
judges a row as a run would.
"""
