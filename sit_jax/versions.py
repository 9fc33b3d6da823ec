"""Whether what is installed are the packages that the tests ran with.

Read from requirements.txt, before anything that may fail for it is imported.
"""

import re
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"
SIGNS = {"==": lambda a, b: a == b, ">=": lambda a, b: a >= b, "<": lambda a, b: a < b}


def warnings(text, installed):
    """Lines of requirements, a function name -> version or None -> sentences.

    What is not there is no matter: which packages a script needs, it says itself.
    """
    for line in text.splitlines():
        if not (line := line.partition("#")[0].strip()):
            continue
        name, bounds = re.fullmatch(r"([\w.-]+?)\s*([=<>].*)", line).groups()
        found = installed(name)
        if found and not all(_keeps(found, each) for each in bounds.split(",")):
            yield (
                f"WARNING: {name} {found} is installed, which was never tried; "
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


def _keeps(found, bound):
    sign, wanted = re.fullmatch(r"\s*(==|>=|<)\s*(\S+)\s*", bound).groups()
    a, b = _numbers(found), _numbers(wanted)
    length = max(len(a), len(b))
    a, b = (each + [0] * (length - len(each)) for each in (a, b))
    return SIGNS[sign](a, b)


def _numbers(version):
    """2.13.0+cpu -> [2, 13, 0]; of a release candidate as of its release."""
    return [int(n) for n in re.match(r"[\d.]*", version)[0].split(".") if n]
