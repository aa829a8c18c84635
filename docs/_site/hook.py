"""Events of MkDocs: adds generated pages, leads links to the right places, renders formulas."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import generate
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = generate.ROOT
TOP = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
FORMULA = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)
ENTITIES = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}


def on_config(config: Any) -> Any:
    """List pages that the navigation does not name under "More", so that none is lost."""
    named = str(config.nav)
    pages = (path.name for path in sorted((ROOT / "docs").glob("*.md")))
    if more := [name for name in pages if f"'{name}'" not in named]:
        config.nav.append({"More": more})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside docs/ or are made of the code."""
    for source, page in TOP.items():
        text = (ROOT / source).read_text("utf-8").replace("](docs/", "](").replace('"docs/', '"')
        files.append(File.generated(config, page, content=text))
    made = {"settings.md": generate.settings, "examples.md": generate.examples}
    for page, make in made.items():
        files.append(File.generated(config, page, content=make()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Add what is generated to a page, and change links that leave docs/."""
    name = page.file.src_uri
    more = {"methods.md": generate.methods, "results.md": generate.recipe_files}
    parts = [markdown, *(make() for where, make in more.items() if where == name)]
    parts += [text for where, text in generate.interfaces().items() if where == name]
    return LINK.sub(lambda found: inside(*found.groups(), files), "\n\n".join(parts))


def inside(text: str, target: str, files: Files) -> str:
    """Return a link within the site; of a file that is no page of it, the text alone."""
    if re.match(r"[\w+]+:", target) or target.startswith("#"):
        return f"[{text}]({target})"
    place, separator, anchor = target.removeprefix("../").removeprefix("docs/").partition("#")
    if place in TOP:
        return f"[{text}]({TOP[place]}{separator}{anchor})"
    if place.startswith("examples/"):
        return f"[{text}](examples.md#{Path(place).name.replace('.', '')})"
    if files.get_file_from_path(place) is None and (ROOT / place).exists():
        return f"{text} (`{place}`)" if text.strip("`") != place else f"`{place}`"
    return f"[{text}]({place}{separator}{anchor})"


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Render formulas as MathML, which browsers show without any script."""
    return FORMULA.sub(lambda found: math(found[2], found[1] == "div"), html)


def math(latex: str, block: bool) -> str:
    for entity, sign in ENTITIES.items():
        latex = latex.replace(entity, sign)
    tag, display = ("div", "block") if block else ("span", "inline")
    return f'<{tag} class="arithmatex">{convert(latex.strip(), display=display)}</{tag}>'
