"""Show what a run would see: both prompts from the ids that are built, what is private in them, lengths and budget.

marks.py    where the privileged information stands in a decoded prompt, and where the two views differ
rows.py     one row as the model will see it; lengths and dropped rows over the first rows of a dataset
budget.py   rollouts and tokens of a round
findings.py what is probably not meant: privileged information in the student's view, phrases that count as leaks in it
scan.py     every row of the datasets: what a run would take, leave out and refuse, by kind
show.py     all of it on a terminal
command.py  the `pidistill preview` command
"""
