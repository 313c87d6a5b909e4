"""Test what can be tested of the Dockerfile without a container engine: what it copies, and the versions that it installs."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.lock import EXTRAS, requirements_of

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def read_lock() -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    return dict(line.split("==") for line in lines)


LOCK = read_lock()


def unmet(requirements: list[Requirement]) -> list[str]:
    """Return the requirements that the lock does not name, or names in a version outside their bounds."""
    return [
        str(each)
        for each in requirements
        if (name := canonicalize_name(each.name)) not in LOCK or not each.specifier.contains(LOCK[name], prereleases=True)
    ]


def test_what_the_dockerfile_copies_exists_and_is_not_left_out_by_dockerignore():
    sources = [word for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.M) for word in line.split()[:-1]]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert len(sources) >= 6 and set(sources) == kept
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_the_image_holds_every_folder_that_the_package_is_built_from():
    folders = {"pidistill", *PROJECT["tool"]["setuptools"]["package-dir"].values()}
    assert folders <= set(re.findall(r"^COPY (\w+) \w+$", DOCKERFILE, re.M))


def test_the_dockerfile_says_that_it_was_not_run():
    assert "neither been built nor run" in DOCKERFILE.splitlines()[0]


def test_the_lock_fits_the_bounds_of_the_project():
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = PROJECT["project"]["dependencies"] + [line for extra in EXTRAS for line in extras[extra]]
    assert len(wanted) > 14
    assert unmet([Requirement(line) for line in wanted]) == []


def test_a_version_outside_the_bounds_and_a_missing_package_are_found():
    assert unmet([Requirement("torch<2"), Requirement("no-such-package"), Requirement("torchtune==0.6.1")]) == [
        "torch<2",
        "no-such-package",
    ]


def test_the_lock_holds_what_the_locked_packages_ask_for():
    """Read from the packages that are installed here in the locked version."""
    installed = {canonicalize_name(each.name): each.version for each in metadata.distributions()}
    same = [name for name, version in LOCK.items() if Version(installed.get(name, "0")).public == version]
    assert "torchtune" in same
    assert {name: missing for name in same if (missing := unmet(requirements_of(name)))} == {}
