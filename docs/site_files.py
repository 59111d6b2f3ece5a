"""A hook of MkDocs: pages outside docs/ become part of the site (README.md as its start, CONTRIBUTING.md, CHANGELOG.md,
benchmarks/, recipes/), and links, which are written for the repository, are made to fit the site. Its root is docs/."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
SHOWN = {".md", ".png", ".html", ".py", ".yaml"}  # of benchmarks/ and recipes/


def on_files(files: Files, config: Any) -> Files:
    for source, name in OUTSIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    for path in sorted([*(ROOT / "benchmarks").rglob("*"), *(ROOT / "recipes").glob("*")]):
        if path.suffix in SHOWN and "__pycache__" not in path.parts:
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    readme = files.get_file_from_path("benchmarks/README.md")
    readme.dest_uri = "benchmarks/README/index.html"  # docs/benchmarks.md is benchmarks/index.html
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    name = page.file.src_uri
    if name in OUTSIDE.values():  # docs/X is X
        return re.sub(r"\]\(docs/", "](", markdown)
    if name.startswith("benchmarks/"):  # ../docs/X is ../X
        return re.sub(r"\]\(((?:\.\./)+)docs/", r"](\1", markdown)
    return re.sub(r"\]\(\.\./(?=benchmarks/|recipes/|[A-Z]+\.md)", "](", markdown)  # ../X of docs/PAGE.md is X
