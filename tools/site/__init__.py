"""The offline renderer: the book of `_quarto.yml` as a folder of web pages, with pip packages
alone.

config (which chapters) -> cells (a notebook as markdown) -> numbering (labels and numbers) -> links
(references, citations) -> mathematics, code -> pages (one template) -> audit (of what was written).
Each step adds to one list of problems; a book with a problem isn't published.
"""
