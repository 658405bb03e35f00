"""Formulas as MathML, made when the site is built, so that pages need no script for them.

mkdocs loads this file as a hook, which turns the LaTeX of the pages into MathML, and
mkdocstrings as a griffe extension, which turns the formulas of docstrings (reStructuredText)
into the Markdown of the pages.
"""

from __future__ import annotations

import html
import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves in the page.
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)

# ".. math:: formula", or the formula in the indented lines that follow.
_DIRECTIVE = re.compile(r"^\.\. math::[ ]*(.*)\n((?:[ ]+\S.*\n?|\n(?=[ ]+\S))*)", re.MULTILINE)
_ROLE = re.compile(r":math:`(.*?)`", re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace the formulas of a page."""
    content = _BLOCK.sub(lambda found: _mathml(found[1], "block"), content)
    return _INLINE.sub(lambda found: _mathml(found[1], "inline"), content)


def _mathml(latex: str, display: str) -> str:
    formula = convert(html.unescape(latex).strip(), display=display)
    # Without a mathematical font, browsers set what stands below a sum on top of it.
    formula = formula.replace("munderover>", "msubsup>").replace("munder>", "msub>")
    return f'<div class="formula">{formula}</div>' if display == "block" else formula


def to_markdown(docstring: str) -> str:
    """Return a docstring with its formulas between dollar signs."""
    docstring = _DIRECTIVE.sub(
        lambda found: f"$$\n{textwrap.dedent(found[1] + chr(10) + found[2]).strip()}\n$$\n",
        docstring,
    )
    return _ROLE.sub(lambda found: f"${' '.join(found[1].split())}$", docstring)


class DocstringFormulas(griffe.Extension):
    """Rewrite the formulas of every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
