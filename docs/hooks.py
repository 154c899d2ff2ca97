"""For mkdocs: the repository's own pages (README and others) become pages of the site."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {
    "index.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
    "LICENSE": "LICENSE",
    "benchmarks/README.md": "benchmarks/README.md",
}


def on_files(files, config):
    for page, source in PAGES.items():
        text = (ROOT / source).read_text()
        text = text.replace("](docs/", "](").replace('src="docs/', 'src="')
        text = text.replace("](../docs/", "](../")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, **kwargs):
    """Links to the sources, which the site doesn't have, as their text alone."""
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)
