"""mkdocs hook: pages link to files in bench/results, which lie outside of docs/. The site gets a copy of them."""

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "bench" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"data/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    to_docs = "../" * page.file.src_uri.count("/")
    return markdown.replace(f"({to_docs}../bench/results/", f"({to_docs}data/")
