"""griffe extension: the code under `Example:` in a docstring is shown as code."""

import re
import textwrap
from typing import Any

import griffe

SECTION = re.compile(r"^Example:\n((?:[ \t]+\S.*\n?|[ \t]*\n)+)", re.MULTILINE)


class ExampleSections(griffe.Extension):
    """griffe knows `Examples:`, and takes code only after `>>>` or in a fence."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub(_as_code, obj.docstring.value)


def _as_code(section: re.Match[str]) -> str:
    code = textwrap.dedent(section[1]).strip("\n")
    kind = "pycon" if code.startswith(">>>") else "python"
    return f"**Example**\n\n```{kind}\n{code}\n```\n"
