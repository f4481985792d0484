"""MkDocs hook: pages show figures of ``results/``, which lie outside the documentation's folder.

Pages link them as ``../results/KEY.svg``, which is right where the repository is browsed; on the site they stand under
``results/``.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


RESULTS = Path(__file__).resolve().parents[1] / "results"


def on_files(files: Files, config: Any) -> Files:
    """Add every figure."""
    for figure in sorted(RESULTS.glob("*.svg")):
        files.append(File.generated(config, f"results/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at where the site has the figures."""
    return markdown.replace("](../results/", "](results/") if page.file.src_uri == "papers.md" else markdown
