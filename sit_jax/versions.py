"""Whether what is installed are the packages that the tests ran with.

Read from requirements.txt, before anything that may fail for it is imported.
"""

from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"


def warnings(text, installed):
    """Lines of requirements, a function name -> version or None -> sentences.

    What is not there is no matter: which packages a script needs, it says itself.
    """
    from packaging.requirements import Requirement

    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    for line in filter(None, lines):
        wanted = Requirement(line)
        found = installed(wanted.name)
        if found and not wanted.specifier.contains(found, prereleases=True):
            yield (
                f"WARNING: {wanted.name} {found} is installed, which was never tried; "
                f"requirements.txt wants {line}"
            )


def of_this_environment():
    """-> sentences; none where there is no requirements.txt."""
    from importlib import metadata

    def installed(name):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    text = REQUIREMENTS.read_text() if REQUIREMENTS.is_file() else ""
    return list(warnings(text, installed))
