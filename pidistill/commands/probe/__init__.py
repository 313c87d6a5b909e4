"""`pidistill probe`: measure what the teacher gains from its privileged information, under several wordings, before training.

Enters: a config. Leaves: a table with one row per wording, and the override of the wording that is recommended. Read
``command.py`` first; ``wordings.py`` lists the wordings, ``measure.py`` samples and scores.
"""
