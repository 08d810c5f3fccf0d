"""Routers for experts that were never routed to: rows computed from text, without training.

forcing.py       one expert for every token of a batch; what a router is given
measure.py       text by expert → second moments of the router's inputs
statistics.py    those moments on disk, expert by expert
rows.py          moments → router rows → a plan that has them
search.py        how large the rows should be, on held-out text
initialise.py    all of it together
"""
