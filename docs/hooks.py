"""Links of the pages that leave docs/, for mkdocs.

The pages are also read in a clone, where `../pec_jax/rl/update.py` is a good link. The site has no
such file: there the link goes to the repository, if mkdocs.yml names one as `repo_url`, and is
otherwise replaced by the path. A link to nothing stays as it is, so that mkdocs reports it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<!!)\[([^\]\[]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The page with every such link replaced; mkdocs calls it before it renders the page."""
    here = Path(page.file.abs_src_path).parent

    def replaced(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        path = (here / target).resolve()
        on_the_site = path.is_file() and path.is_relative_to(DOCS)
        if "://" in target or on_the_site or not path.exists():
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        if config.repo_url:
            kind = "tree" if path.is_dir() else "blob"
            return f"[{text}]({config.repo_url.rstrip('/')}/{kind}/main/{name}{match[3] or ''})"
        return f"`{name}`" if text in name else f"{text} (`{name}`)"

    return LINK.sub(replaced, markdown)
