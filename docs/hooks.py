"""For mkdocs: pages link to files of the repository, and the site has only what is in docs/."""

import posixpath
import re


def on_page_markdown(markdown, *, page, **_):
    """Where a link leaves docs/, the site names the file instead: [report](../bench/x.json)
    becomes report (`bench/x.json`)."""
    def named(link):
        text, target = link.groups()
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri),
                                                 target))
        if path.startswith("docs/"):
            return link[0]
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    return re.sub(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s]+)\)", named, markdown)
