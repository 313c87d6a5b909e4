"""Test the table that an evaluation prints."""

from rich.console import Console

from recipes.evaluate_distributed import table_of


def test_brackets_in_names_of_domains_and_kinds_are_shown_as_they_are(capsys):
    numbers = {"success/[easy]": 0.5, "success/[easy]_interval": [0.25, 0.75], "success/[/x]": 0.125}
    Console(width=100).print(table_of("[none] 4 rows, per view", {"student": numbers}))
    printed = capsys.readouterr().out
    for text in ("[none] 4 rows, per view", "success/[easy]", "0.5 [0.25, 0.75]", "success/[/x]"):
        assert text in printed
