"""Write requirements.lock: `python -m tests.support.lock > requirements.lock` in the environment that the tests ran in."""

from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

EXTRAS = ("sweep", "transformers", "tensorboard")  # of this package: the demo, newer model families, one metric logger
HEADER = """\
# The versions that the tests ran with, of this package's requirements and of theirs (Python 3.11, Linux). The Dockerfile
# installs them.
# What torch itself asks for on CUDA is not here: its wheel for CUDA pins it.
# python -m tests.support.lock > requirements.lock"""


def requirements_of(name: str, extras: tuple[str, ...] = ()) -> list[Requirement]:
    """Return what an installed package asks for on this machine, with some of its extras."""
    found = map(Requirement, metadata.requires(name) or ())
    return [each for each in found if not each.marker or any(each.marker.evaluate({"extra": e}) for e in ("", *extras))]


def locked_versions(package: str = "pidistill") -> dict[str, str]:
    """Return the installed version of everything that the package needs, directly or through others."""
    versions: dict[str, str] = {}
    waiting = requirements_of(package, EXTRAS)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in versions:
            versions[name] = Version(metadata.version(name)).public  # without `+cpu`
            waiting += requirements_of(name, tuple(requirement.extras))
    return dict(sorted(versions.items()))


if __name__ == "__main__":
    print(HEADER, *(f"{name}=={version}" for name, version in locked_versions().items()), sep="\n")
