"""The offline renderer: the book of `_quarto.yml` as a folder of web pages, with pip packages
alone.

config (which chapters) -> cells (a notebook as markdown) -> numbering (labels and numbers) -> links
(references, citations) -> mathematics, code -> pages (one template) -> audit (of what was written).
Each step adds to one list of problems; a book with a problem isn't published.

The renderer trusts its notebooks: HTML and scripts in their outputs, stored ones included, go into
the pages as they are, because the book's own figures are made of them. What it checks is that a
page fetches nothing from elsewhere. So a notebook from someone else is read before it is rendered,
as its code is read before it is run.
"""
