"""Test that the Python entry points which the package documents run as they are written."""

import textwrap

import pidistill
from tests.support.runs import metrics, save_config, small_config, weights


def documented_code() -> str:
    """Return the code at the end of the package's docstring."""
    page = pidistill.__doc__
    return textwrap.dedent(page[page.index("    from omegaconf") :])


def test_the_documented_code_trains_a_run(tiny_base, tmp_path, monkeypatch):
    (tmp_path / "configs" / "tiny").mkdir(parents=True)
    cfg = small_config("pi_distill", tiny_base, tmp_path / "run", max_steps=2)
    save_config(cfg, tmp_path / "configs" / "tiny" / "pi_distill.yaml")
    monkeypatch.chdir(tmp_path)
    code = documented_code()
    assert "recipe.train()" in code and "recipe.cleanup()" in code
    exec(compile(code, "pidistill.__doc__", "exec"), {})
    assert [row["step"] for row in metrics(tmp_path / "run") if "loss" in row] == [1, 2]
    assert weights(tmp_path / "run")
