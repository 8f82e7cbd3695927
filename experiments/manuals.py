"""English text for a real model: the HTML pages of Debian's manuals without their tags.

    apt-get download python3.11-doc linux-doc-6.1 debian-handbook sqlite3-doc git-doc
    mkdir manuals; for f in *.deb; do dpkg -x $f manuals/${f%%_*}; done
    rm -r manuals/debian-handbook/usr/share/doc/debian-handbook/html/[a-df-z]?-?? # translations
    rm -r manuals/debian-handbook/usr/share/doc/debian-handbook/html/e[a-mo-z]-??
    python experiments/manuals.py manuals    # docs.jsonl.gz; labelled: docs/git-doc.jsonl, ...

A line is a page, {"text": ...}. In docs.jsonl.gz they are in random order; in docs/ those of a
folder are a file, a class for saebench.py --data. Pages of less than 500 characters are left out,
and those whose text has been there.
"""

import gzip
import json
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import model_loaders
import saeft

BLOCKS = set("p div pre li tr h1 h2 h3 h4 h5 h6 br dt dd section table ul ol dl".split())
SILENT = {"script", "style", "head", "nav", "footer"}  # what is not read


class Page(HTMLParser):
    """The text of a page, a line for each block."""

    def __init__(self, html: str):
        super().__init__()
        self.parts, self.silent = [], 0
        self.feed(html)
        lines = [re.sub(r"[ \t]+$", "", line) for line in "".join(self.parts).splitlines()]
        self.text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()

    def handle_starttag(self, tag, attrs):
        self.silent = 0 if tag == "body" else self.silent + (tag in SILENT)  # </head> may lack
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        self.silent = max(0, self.silent - (tag in SILENT))
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.silent:
            self.parts.append(data)


def read(folder: Path, seen: set[str]) -> list[str]:
    """The texts of a folder's pages, but those that have been `seen`."""
    texts = []
    for path in sorted(folder.rglob("*.html")):
        page = Page(path.read_text(encoding="utf-8", errors="replace"))
        if len(page.text) >= 500 and page.text not in seen:
            seen.add(page.text)
            texts.append(page.text)
    return texts


def run(argv: list[str] | None) -> None:
    parser = model_loaders.Parser(__doc__)
    parser.add_argument("folder", type=model_loaders.expanded, help="a folder for each manual")
    parser.add_argument("--out", type=model_loaders.expanded, default=Path("docs"))
    args = parser.parse_args(argv)
    manuals = [path for path in sorted(args.folder.glob("*")) if path.is_dir()]
    saeft.refuse(not manuals, f"{args.folder} has no folder of a manual")
    pages, seen = [], set()
    for manual in manuals:
        texts = read(manual, seen)
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        model_loaders.write_text(args.out / f"{manual.name}.jsonl", "".join(lines))
        model_loaders.say(f"{manual.name}: {len(texts)} pages, {sum(map(len, texts)):,} characters")
        pages += lines
    random.Random(0).shuffle(pages)
    with gzip.open(f"{args.out}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(pages)


def main(argv: list[str] | None = None) -> int:
    return saeft.exit_status("manuals", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
