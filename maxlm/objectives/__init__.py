"""Training objectives: each is one module here that defines `OBJECTIVE`.

docs/adding-an-objective.md walks through one.
"""
