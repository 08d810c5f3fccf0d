"""Recipes: operations chained in a YAML file, under the names that they have everywhere. Commands
are carried out by the same steps.

values.py      plain values → the fields of an options dataclass, or what is wrong with them
inputs.py      what a step reads and writes beside its options: models, texts, statistics, files
state.py       where a recipe stands, and whoever watches it
acts.py        what the steps that make a model do; fewer.py: those that leave fewer experts;
               recovery.py: what is done about what is lost
findings.py    the steps that make no model: they measure one, or write about it
steps.py       the steps there are
reading.py     YAML → a recipe; every fault with its line, and what was probably meant
missing.py     files that it needs and that are not there
conditions.py  what the result of a step is held to
running.py     a recipe rehearsed, and carried out: plans stay plans until one must be written
schema.py      the JSON schema that editors complete and check by
"""
