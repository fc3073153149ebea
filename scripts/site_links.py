"""MkDocs hook: pages that show a file of the repository's root get links that work on the site.

README.md, CONTRIBUTING.md and CHANGELOG.md link to each other and to docs/ as GitHub needs it.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace a snippet of such a file by its text, with links relative to docs/."""
    return re.sub(r'^--8<-- "([A-Z]+\.md)"$', lambda snippet: site_text(snippet[1]), markdown, flags=re.MULTILINE)


def site_text(name: str) -> str:
    """Text of a file of the repository's root, with links relative to docs/."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for file, page in PAGES.items():
        text = text.replace(f"]({file}", f"]({page}")
    return text.replace("](docs/", "](")
