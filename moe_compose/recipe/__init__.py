"""Recipes: operations chained in a YAML file, under the names that they have everywhere.

values.py     plain values → the fields of an options dataclass, or what is wrong with them
inputs.py     what a step reads beside its options: models, texts, statistics
acts.py       what each step does
steps.py      the steps there are
reading.py    YAML → a recipe; every fault with its line, and what was probably meant
running.py    a recipe carried out: plans stay plans until something must be written
schema.py     the JSON schema that editors complete and check by
"""
