"""One page per benchmark: `write_readme.py` makes README.md and the figures from them and from results/*.json.

A page has TITLE, QUESTION (one line), `markdown(result) -> str` and, where there is something to draw,
`figures(result) -> {file stem: matplotlib Figure}`, which its markdown shows as figures/<stem>.png. Every number
comes from the result; `_words.py` has the tables and the spelling of numbers.
"""
